"""An index of many parts: each is read once on a host, and only those of the split that is asked for."""

import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storefiles import make_clips, write_store

import features.store.index as parts
from features.store import Store

ASKED = (None, ["label_label", "clip_id", "nbytes"], ["shard", "split"])


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return write_store(tmp_path / "store", make_clips(29, 3, 5))


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(parts, "MANY", 2)


def part(store, name):
    return Path(store.uri, "index", f"{name}.parquet")


def spoil(path):
    """Other bytes, of which neither size nor time tell."""
    about = path.stat()
    path.write_bytes(bytes(about.st_size))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("split", [None, "train", "test"])
@pytest.mark.parametrize("rows", [1, 10, 1 << 18])
def test_few_parts_and_many_give_the_same_rows(store, split, rows, monkeypatch):
    monkeypatch.setattr(parts, "ROWS", rows)
    one_by_one = [store.part("index", name) for name in store.spec.shards() if split in (None, name.split("-")[0])]
    few = [store.index(split, columns) for columns in ASKED]
    monkeypatch.setattr(parts, "MANY", 2)
    expected = pa.concat_tables(sorted(one_by_one, key=lambda table: table["shard"][0].as_py()))
    for columns, found in zip(ASKED, few, strict=True):
        assert found.equals(store.index(split, columns))
        assert found.equals(expected.select(columns or expected.column_names))


def test_many_parts_are_read_once_until_one_changes(store, many, tmp_path):
    asked = ["clip_id", "offset", "tokens_video"]
    before, counts = store.index("val", asked), store.counts()
    content = part(store, "val-000000").read_bytes()
    spoil(part(store, "val-000000"))
    assert Store(store.uri).index("val", asked) == before and store.counts() == counts
    part(store, "val-000000").write_bytes(content)  # at another time
    spoil(part(store, "test-000000"))
    with pytest.raises(pa.ArrowInvalid, match=r"index/test-000000\.parquet"):
        store.index("val", asked)
    assert not list(tmp_path.glob("clcr-index-*/*.tmp"))


def test_of_a_store_one_copy_is_kept_and_of_others_those_used_last(store, many, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "COPIES", 2)
    for second in range(5):
        os.utime(part(store, "val-000000"), (second, second))
        store.index("val", ["clip_id"])
    (kept,) = tmp_path.glob("clcr-index-*/*.arrow")
    for second, name in enumerate(("a", "b")):
        other = kept.with_name(f"{name * 16}.0.arrow")
        other.write_bytes(kept.read_bytes())
        os.utime(other, (second, second))
    os.utime(part(store, "val-000000"), (9, 9))
    store.index("val", ["clip_id"])
    assert {path.name[0] for path in tmp_path.glob("clcr-index-*/*.arrow")} == {kept.name[0], "b"}


def test_a_copy_that_is_cut_off_is_made_again_and_a_folder_of_anybodys_is_not_trusted(store, many, tmp_path):
    expected = store.index("val", ["clip_id"])
    (kept,) = tmp_path.glob("clcr-index-*/*.arrow")
    half = kept.read_bytes()[:100]

    def put(content):
        kept.unlink(missing_ok=True)  # what has mapped it keeps it
        kept.write_bytes(content)

    put(half)
    for _ in range(2):
        assert store.index("val", ["clip_id"]) == expected
    kept.parent.chmod(0o777)
    put(b"planted")
    assert store.index("val", ["clip_id"]) == expected


def test_a_disk_without_room_keeps_nothing(store, many, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "store" / "store.json"))  # no folder
    assert store.index("val", ["clip_id"])["clip_id"].to_pylist() == ["clip/29.v1", "clip/30.v1", "clip/31.v1"]


def test_of_a_split_only_its_own_parts_are_read(store):
    expected = store.index("train")
    spoil(part(store, "val-000000"))
    assert store.index("train") == expected
    with pytest.raises(pa.ArrowInvalid, match=r"index/val-000000\.parquet"):
        store.index()


def test_a_column_that_a_part_lacks_is_missing_there(store):
    path = part(store, "train-000003")
    pq.write_table(pq.read_table(path).drop_columns(["label_mood"]), path)
    moods = store.index("train", ["label_mood"])["label_mood"].to_pylist()
    assert moods[12:16] == [None] * 4 and moods[11] == 1.1


def test_a_split_without_parts_has_no_rows_and_every_column(store):
    part(store, "val-000000").unlink()
    assert store.index("val", ["nbytes", "clip_id"]).schema == store.index("train", ["nbytes", "clip_id"]).schema
    assert not len(store.index("val"))
