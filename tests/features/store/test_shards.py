"""A shard is committed whole or is not there, and the same samples are the same bytes."""

import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from storefiles import (
    FEATURES,
    LABELS,
    files_of,
    make_clip,
    make_clips,
    make_sample,
    make_spec,
    write_shard,
    write_store,
)

from features.errors import StoreError
from features.store import Feature, Store
from features.store.samples import pack, sample_key
from features.store.shards import Failure, ShardWriter, create_store, find_store, sweep_litter

STRANGE_IDS = ["a.b.c", "deep/er/than.this", "../up", "grüße/Ωμέγα 猫", "100%2E", "sp ace", "x" * 300 + ".é"]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    clips = make_clips(9, 2, 3)
    write_store(tmp_path / "one", clips)
    write_store(tmp_path / "two", clips)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_strange_clip_ids_survive(tmp_path):
    store = write_store(tmp_path, [make_clip(name) for name in STRANGE_IDS])
    rows = store.index().to_pylist()
    assert [row["clip_id"] for row in rows] == STRANGE_IDS
    for number, row in enumerate(rows):
        sample = store.read(row["shard"], row["offset"], row["nbytes"])
        assert sample["json"]["clip_id"] == STRANGE_IDS[number]
        assert (sample["video"] == make_sample(number).features["video"]).all()


def test_a_key_is_percent_encoded_with_its_dots_and_no_two_ids_share_one(tmp_path):
    assert sample_key("a.b/c é") == "a%2Eb%2Fc%20%C3%A9"
    assert len({sample_key(name) for name in [*STRANGE_IDS, "a%2Eb", "a.b", "a/b"]}) == len(STRANGE_IDS) + 3
    write_store(tmp_path, [make_clip("a.b/c é")])
    with tarfile.open(tmp_path / "shards/train-000000.tar") as tar:
        assert tar.getnames() == ["a%2Eb%2Fc%20%C3%A9.json", "a%2Eb%2Fc%20%C3%A9.video.npy"]


def test_a_tar_says_nothing_about_when_and_by_whom_it_was_written(tmp_path):
    write_store(tmp_path, make_clips(2))
    with tarfile.open(tmp_path / "shards/train-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in tar} == {(0, "", "", 0, 0)}


def test_nothing_of_a_shard_is_there_before_it_is_committed(tmp_path):
    clips = make_clips(1)
    spec = make_spec(clips)
    store = create_store(str(tmp_path), spec)
    with pytest.raises(KeyboardInterrupt), ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        writer.add(clips[0], pack(clips[0], make_sample(0)))
        assert store.committed() == set()
        raise KeyboardInterrupt
    assert list(files_of(tmp_path)) == ["store.json"]


@pytest.mark.parametrize("lost", ["index", "shards", "failures"])
def test_a_shard_that_lost_a_part_does_not_count_and_is_swept(tmp_path, lost):
    clips = make_clips(8)
    store = write_store(tmp_path, clips)
    whole = files_of(tmp_path)
    next((tmp_path / lost).glob("train-000001.*")).unlink()
    (tmp_path / "shards/train-000001.tar.0123.tmp").write_bytes(b"half")
    (tmp_path / "index/train-000001.parquet.0123.tmp").write_bytes(b"half")
    (tmp_path / "store.json.0123.tmp").write_bytes(b"half")
    assert sweep_litter(store) == 5
    assert store.committed() == {"train-000000"}
    assert not [name for name in files_of(tmp_path) if "000001" in name or name.endswith(".tmp")]
    write_shard(tmp_path, "train-000001", list(enumerate(clips))[4:], store.spec)
    assert files_of(tmp_path) == whole
    assert sweep_litter(store) == 0


@pytest.mark.parametrize("folder", ["index", "shards", "failures"])
def test_a_shard_that_a_power_cut_emptied_a_part_of_is_swept(tmp_path, folder):
    store = write_store(tmp_path, make_clips(8))
    (part,) = (tmp_path / folder).glob("train-000001.*")
    part.write_bytes(b"" if folder == "shards" else part.read_bytes()[:-9])
    assert sweep_litter(store) == 3
    assert store.committed() == {"train-000000"} and store.counts() == (4, 0)


def test_every_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = {}, os.fsync

    def spy(file):
        fsync(file)
        number = os.fstat(file).st_ino
        synced[number] = [path.suffix for path in tmp_path.rglob("*") if path.stat().st_ino == number]

    monkeypatch.setattr(os, "fsync", spy)
    write_store(tmp_path, make_clips(1))
    assert synced == {path.stat().st_ino: [".tmp"] for path in tmp_path.rglob("*") if path.is_file()}
    assert len(synced) == 4


def test_a_shard_of_which_every_clip_failed_is_committed_too(tmp_path):
    clips = make_clips(2)
    spec = make_spec(clips)
    store = create_store(str(tmp_path), spec)
    with ShardWriter(str(tmp_path), "train-000000", spec, LABELS) as writer:
        for clip in clips:
            writer.fail(clip, Failure("open", "MediaError", "gone"))
        writer.commit()
    assert store.committed() == {"train-000000"} and store.counts() == (0, 2)
    assert sweep_litter(store) == 0
    store.require_complete()
    assert store.index("train").num_rows == 0
    failure = store.failures().to_pylist()[0]
    assert failure == {
        "clip_id": "clip/0.v1", "split": "train", "uri": "clips/x.mp4", "stage": "open", "error": "MediaError",
        "message": "gone", "attempts": 1,
    }  # fmt: skip


def test_the_failures_part_is_written_even_when_it_is_empty(tmp_path):
    write_store(tmp_path, make_clips(1))
    assert pq.read_metadata(tmp_path / "failures/train-000000.parquet").num_rows == 0


def test_a_store_with_another_spec_is_refused_by_what_differs(tmp_path):
    clips = make_clips(4, 1)
    write_store(tmp_path, clips)
    audio = {**FEATURES, "audio": Feature((9,), "float16", 50.0, {"name": "log_mel", "mels": 9})}
    for changes, named in [
        (
            {"features": audio},
            ["features.decode.audio.shape: [9] != [8]", "features.decode.audio.encoder.mels: 9 != 8"],
        ),
        ({"shard_rows": 5}, ["shard_rows: 5 != 4"]),
        ({"corpus": "other"}, ["corpus: other != digest"]),
        ({"features": {"video": FEATURES["video"]}}, ["features.decode.audio.dtype: None != float16"]),
    ]:
        for open_it in (find_store, create_store):
            with pytest.raises(StoreError) as error:
                open_it(str(tmp_path), make_spec(clips, **{"shard_rows": 4, **changes}))
            assert all(text in str(error.value) for text in named) and "\n" not in str(error.value)


def test_the_same_spec_finds_its_store_again(tmp_path):
    clips = make_clips(4, 1)
    spec = make_spec(clips)
    assert find_store(str(tmp_path), spec) is None
    assert create_store(str(tmp_path), spec).spec == create_store(str(tmp_path), spec).spec
    assert find_store(str(tmp_path), spec).spec.fingerprint == spec.fingerprint


def test_a_folder_with_somebody_elses_shards_is_left_alone(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/mine.tar").write_bytes(b"precious")
    with pytest.raises(StoreError, match=r"holds files but no store .*mine\.tar.*new or empty"):
        create_store(str(tmp_path), make_spec(make_clips(1)))
    assert files_of(tmp_path) == {"shards/mine.tar": b"precious"}


def test_a_store_of_another_schema_version_is_refused(tmp_path):
    store = write_store(tmp_path, make_clips(1))
    (tmp_path / "store.json").write_text(json.dumps({**store.spec.to_dict(), "schema_version": 0}))
    with pytest.raises(StoreError, match="schema version 0 is not 2: extract"):
        Store(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 2}', "[]"])
def test_a_damaged_spec_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(StoreError, match=r"store\.json is damaged .*extract"):
        Store(str(tmp_path))
