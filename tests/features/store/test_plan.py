"""The plan: every row of the manifest in exactly one shard, in the manifest's order."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mediafiles import write_manifest

from features.corpus.manifest import read_corpus
from features.errors import StoreError
from features.store import Store, StoreSpec
from features.store.plan import planned_rows, write_plan
from features.store.shards import create_store, sweep_litter
from features.store.spec import default_shard_rows

SPLITS = ("train", "val", "test")


def planned(folder, splits, shard_rows, batch_rows=65_536):
    """A store with its plan, and the manifest's rows."""
    rows = [{"clip_id": f"{n}", "video": f"{n}.mp4", "split": s, "label": n % 3} for n, s in enumerate(splits)]
    corpus = read_corpus(str(write_manifest(folder / "corpus.csv", rows)))
    counts = {split: splits.count(split) for split in SPLITS}
    store = create_store(str(folder / f"store-{shard_rows}-{len(rows)}"), StoreSpec({}, (), counts, shard_rows, "x"))
    write_plan(store, corpus)
    return store, corpus


@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.sampled_from(SPLITS), min_size=1, max_size=40), shard_rows=st.integers(1, 7))
def test_shards_hold_the_rows_of_their_split_in_the_manifests_order(tmp_path_factory, splits, shard_rows):
    store, corpus = planned(tmp_path_factory.mktemp("plan"), splits, shard_rows)
    manifest = pa.Table.from_batches(corpus.batches())
    for split in SPLITS:
        names = [name for name in store.spec.shards() if name.startswith(split)]
        batches = [planned_rows(store, name) for name in names]
        assert [len(batch) for batch in batches] == [store.spec.rows_of(name) for name in names]
        wanted = manifest.filter(pa.compute.equal(manifest["split"], split))
        assert pa.Table.from_batches(batches, schema=manifest.schema).equals(wanted.cast(manifest.schema))


def test_a_plan_is_written_once_and_whole(tmp_path):
    store, corpus = planned(tmp_path, ["train", "val", "test"] * 4, 2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / store.uri / "plan").iterdir()}
    write_plan(store, corpus)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / store.uri / "plan").iterdir()} == files
    (tmp_path / store.uri / "plan" / "val.arrow.0.tmp").touch()
    assert sweep_litter(Store(store.uri)) == 1


def test_a_manifest_that_changed_since_it_was_checked_is_refused(tmp_path):
    _, corpus = planned(tmp_path, ["train", "val", "test"], 2)
    store = create_store(str(tmp_path / "other"), StoreSpec({}, (), {"train": 2, "val": 1, "test": 1}, 2, "x"))
    with pytest.raises(StoreError, match="changed while it was read"):
        write_plan(store, corpus)
    assert not list((tmp_path / "other" / "plan").glob("train*"))


def test_corpora_of_millions_get_larger_shards_and_others_those_of_64_clips():
    assert [default_shard_rows(clips) for clips in (1, 800, 1_280_000)] == [64, 64, 64]
    assert default_shard_rows(1_280_001) == 65 and default_shard_rows(10_000_000) == 500
