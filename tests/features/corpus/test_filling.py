"""Columns that a manifest may leave out: clips named by their files, splits by a hash of their groups."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mediafiles import write_manifest

from features.corpus.manifest import read_corpus
from features.corpus.validation import validate


def people(clips, speakers):
    return [
        {"video": f"clips/{n}.mp4", "group": f"s{n % speakers}", "emotion": "ab"[n // speakers % 2]}
        for n in range(clips)
    ]


@pytest.mark.parametrize("speakers", [3, 24, 300])
def test_without_splits_a_group_is_in_one_and_no_split_is_empty(tmp_path, speakers):
    corpus = read_corpus(write_manifest(tmp_path / "corpus.csv", people(3 * speakers, speakers)))
    clips = list(corpus.clips())
    assert [clip.clip_id for clip in clips] == [clip.video for clip in clips]
    of_group = {clip.group: clip.split for clip in clips}
    assert all(clip.split == of_group[clip.group] for clip in clips)
    assert set(of_group.values()) == {"train", "val", "test"}
    if speakers == 300:
        shares = Counter(of_group.values())
        assert [shares[s] / speakers for s in ("train", "val", "test")] == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert [note for note in corpus.notes if "by 'group'" in note]
    assert validate(corpus).rows == 3 * speakers


def test_clips_that_are_added_move_no_other(tmp_path):
    few, more = (
        {clip.clip_id: clip.split for clip in read_corpus(write_manifest(tmp_path / name, people(n, n))).clips()}
        for name, n in (("few.csv", 400), ("more.csv", 500))
    )
    assert few.items() <= more.items()


def test_csv_parquet_and_a_manifest_with_the_columns_written_out_are_the_same_corpus(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "group"} for row in people(40, 5)]
    in_csv = read_corpus(write_manifest(tmp_path / "corpus.csv", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    filled = [
        {**row, "clip_id": clip.clip_id, "split": clip.split} for row, clip in zip(rows, in_csv.clips(), strict=True)
    ]
    written = read_corpus(write_manifest(tmp_path / "full.csv", filled))
    others = [read_corpus(str(tmp_path / "corpus.parquet")), written]
    assert all(validate(corpus) == validate(in_csv) for corpus in others) and not written.notes
    assert validate(in_csv).splits.keys() == {"train", "val", "test"}


def test_segments_of_a_file_have_names_of_their_own(tmp_path):
    rows = [{"audio": "a.wav", "video": "", "start": n / 2, "label": "xy"[n % 2]} for n in range(20)]
    clips = list(read_corpus(write_manifest(tmp_path / "corpus.csv", rows)).clips())
    assert clips[3].clip_id == "a.wav@1.5" and len({clip.clip_id for clip in clips}) == 20


def test_a_column_that_looks_like_a_group_is_pointed_out(tmp_path):
    rows = [{"speaker": row.pop("group"), **row} for row in people(40, 5)]
    (note,) = [note for note in read_corpus(write_manifest(tmp_path / "corpus.csv", rows)).notes if "speaker" in note]
    assert note == "nothing keeps a speaker in one split; call the column 'speaker' 'group' where that is meant"
