"""A store gives back what was written, by our reader and by anybody's."""

import hashlib
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from storefiles import make_clips, make_sample, write_store

import features.store.reader
from features.errors import StoreError
from features.store import Store

FOREIGN_READER = """
import glob, json, sys
import pyarrow.dataset as ds
import webdataset as wds

root = sys.argv[1]
index = ds.dataset(root + "/index").to_table().to_pylist()
samples = list(wds.WebDataset(sorted(glob.glob(root + "/shards/*.tar")), shardshuffle=False).decode())
print(json.dumps({
    "ids": [[row["clip_id"] for row in index], [s["json"]["clip_id"] for s in samples]],
    "split": [row["split"] for row in index],
    "label": [row["label_label"] for row in index],
    "video": [s["video.npy"].tolist() for s in samples],
    "audio": [s["audio.npy"].tolist() if "audio.npy" in s else None for s in samples],
    "failures": ds.dataset(root + "/failures").count_rows(),
    "ours": "features" in sys.modules,
}))
"""


def test_every_sample_is_reached_by_its_place_in_the_index(store):
    index = store.index()
    assert index.num_rows == store.spec.rows == 37
    for row in index.to_pylist():
        sample = store.read(row["shard"], row["offset"], row["nbytes"])
        number = int(row["clip_id"].split("/")[1].split(".")[0])
        written = make_sample(number)
        assert sample.keys() == {"json", *written.features}
        for name, values in written.features.items():
            assert sample[name].dtype == values.dtype and np.array_equal(sample[name], values)
            assert row[f"tokens_{name}"] == len(values)
        assert row["duration"] == sample["json"]["duration"] == written.duration
        assert sample["json"]["labels"] == {"label": row["label_label"], "mood": row["label_mood"]}


def test_samples_are_a_splits_clips_in_the_indexs_order(store):
    samples = list(store.samples("val"))
    assert [sample["clip_id"] for sample in samples] == store.index("val", ["clip_id"])["clip_id"].to_pylist()
    for sample, number in zip(samples, (29, 30, 31), strict=True):
        written = make_sample(number)
        assert sample["features"].keys() == written.features.keys() and sample["duration"] == written.duration
        for name, values in written.features.items():
            assert np.array_equal(sample["features"][name], values)
    assert samples[1]["labels"] == {"label": "a", "mood": 3.0}
    assert len(list(store.samples())) == store.spec.rows


def test_samples_are_read_one_by_one_and_another_clips_bytes_are_refused(store, monkeypatch):
    opened = Store(store.uri)
    samples = opened.samples("train")
    other = opened.read(*(opened.index("val").to_pylist()[0][name] for name in ("shard", "offset", "nbytes")))
    next(samples)
    monkeypatch.setattr(opened, "read", lambda *place: other)
    with pytest.raises(StoreError, match="extracted again"):
        next(samples)


def test_the_index_is_ordered_by_shard_and_offset_and_filters_by_split(store):
    places = [(row["split"], row["shard"], row["offset"]) for row in store.index().to_pylist()]
    assert places == sorted(places)
    assert {split: store.index(split).num_rows for split in ("train", "val", "test")} == store.spec.splits
    assert store.index("val", ["clip_id"]).to_pydict() == {"clip_id": [f"clip/{n}.v1" for n in (29, 30, 31)]}


def test_the_index_holds_the_checksum_of_each_samples_members(store):
    for row in store.index("val").to_pylist():
        with tarfile.open(f"{store.path}/shards/{row['shard']}.tar") as tar:
            members = [m for m in tar if row["offset"] <= m.offset < row["offset"] + row["nbytes"]]
            payload = b"".join(tar.extractfile(m).read() for m in members)
        assert row["sha256"] == hashlib.sha256(payload).hexdigest()


def test_webdataset_and_pyarrow_read_a_store_without_this_project(store, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", FOREIGN_READER, store.path], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    ids = store.index()["clip_id"].to_pylist()
    numbers = [int(name.split("/")[1].split(".")[0]) for name in ids]
    assert read["ids"] == [ids, ids] and not read["ours"] and read["failures"] == 0
    assert read["split"] == store.index()["split"].to_pylist()
    assert read["label"] == [clip.label for clip in map(_Row, numbers)]
    for number, video, audio in zip(numbers, read["video"], read["audio"], strict=True):
        written = make_sample(number).features
        assert video == written["video"].tolist()
        assert audio == (written["audio"].tolist() if "audio" in written else None)


class _Row:
    """What storefiles says about a clip's label."""

    def __init__(self, number):
        self.label = None if number % 5 == 4 else "ab"[number % 2]


def test_a_spec_goes_through_json_unchanged(store):
    plain = json.loads(json.dumps(store.spec.to_dict()))
    again = type(store.spec).from_dict(plain)
    assert again == store.spec and again.fingerprint == plain["fingerprint"]
    assert list(again.shards())[:2] == ["train-000000", "train-000001"] and len(list(again.shards())) == 8 + 1 + 2


def test_a_store_goes_to_another_process_with_its_files_closed(store):
    row = store.index("val").to_pylist()[0]
    store.read(row["shard"], row["offset"], row["nbytes"])
    again = pickle.loads(pickle.dumps(store))
    assert again.read(row["shard"], row["offset"], row["nbytes"])["json"]["clip_id"] == row["clip_id"]


def test_a_reader_of_many_shards_keeps_few_files_open(store, monkeypatch):
    monkeypatch.setattr(features.store.reader, "OPEN_SHARDS", 3)
    reader = Store(store.uri)
    for row in [*store.index().to_pylist(), *store.index().to_pylist()]:
        sample = reader.read(row["shard"], row["offset"], row["nbytes"])
        assert sample["json"]["clip_id"] == row["clip_id"] and len(reader._shards) <= 3


def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(StoreError, match=r"no feature store at .*pipelines/extract\.py"):
        Store(str(tmp_path / "nowhere"))
    store = write_store(tmp_path, make_clips(8))
    store.require_complete()
    next((tmp_path / "index").glob("*000001*")).unlink()
    with pytest.raises(StoreError, match=r"incomplete: 4 indexed \+ 0 failed of 8 rows; run"):
        store.require_complete()
    next((tmp_path / "index").glob("*")).unlink()
    with pytest.raises(StoreError, match="no index parts yet"):
        store.index()


def test_a_store_without_folds_says_so(store):
    with pytest.raises(StoreError, match="has no cross-validation: 37 clips have no fold"):
        store.index("train", fold=0)
