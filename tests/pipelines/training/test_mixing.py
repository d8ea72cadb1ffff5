"""Training on several stores: each has its share of every epoch, a function of (seed, epoch), on any workers."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import recipe, run
from storefiles import make_clips, write_mixture, write_store, write_yaml

import clcr
from features.store import open_store
from pipelines.common.errors import JobError
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.predict import clips_by_shard, predict_shard
from pipelines.training.inputs import check
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig, SplitLoader, feature_specs, task_specs
from pipelines.training.order import mixed, shares

SEVERAL = (LoaderConfig(), LoaderConfig(cache_gb=0, window=3, processes=0), LoaderConfig(buckets=2))


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def mixture(uri):
    return open_store(uri)


def loader(store, config=SEVERAL[0], world=1, rank=0, split="train"):
    return SplitLoader(
        store, split, feature_specs(store), task_specs(store), config, batch_size=8, seed=3, rank=rank, world=world
    )


def ids(batches):
    return [batch.clip_ids for batch in batches]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=5),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 5),
)
def test_every_store_has_its_share_and_each_of_its_clips_comes_equally_often(stores, shard_rows, whole, seed):
    sizes, weights = zip(*stores, strict=True)
    store = np.repeat(np.arange(len(sizes)), sizes)
    shards = np.unique(
        np.concatenate([n * 100 + np.arange(size) // shard_rows for n, size in enumerate(sizes)]), return_inverse=True
    )[1]
    rows, of_shard = mixed(store, weights, shards, np.random.default_rng(seed), whole)
    counts = [int((store[rows] == n).sum()) for n in range(len(sizes))]
    assert counts == shares(len(store), weights) and sum(counts) == len(store)
    assert all(abs(c - len(store) * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True))
    times = np.bincount(rows, minlength=len(store))
    for number, count in enumerate(counts):
        mine = times[store == number]
        assert mine.max() - mine.min() <= 1 and mine.min() == count // len(mine)
    shard_of = dict(zip(of_shard.tolist(), shards[rows].tolist(), strict=True))
    assert (np.array([shard_of[n] for n in of_shard]) == shards[rows]).all(), "one shard by one number"
    assert all(len(set(rows[of_shard == n])) == (of_shard == n).sum() for n in shard_of), "and each clip once in it"


@pytest.mark.parametrize("config", SEVERAL)
def test_an_epoch_has_its_shares_and_is_a_function_of_seed_and_epoch(mixture, config):
    first, second = ids(loader(mixture, config).batches(0)), ids(loader(mixture, config).batches(1))
    for epoch in (first, second):
        clips = Counter(clip for batch in epoch for clip in batch)
        assert sum(count for clip, count in clips.items() if clip.startswith("few")) == 12  # a third of 37
        assert len(epoch) == 5 and sum(clips.values()) == 37
    assert first != second and first == ids(loader(mixture, config).batches(0))
    assert sorted(ids(loader(mixture, config, split="val").batches(0))[0]) == sorted(
        mixture.index("val")["clip_id"].to_pylist()
    )


@pytest.mark.parametrize("config", SEVERAL)
@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_the_batches_that_one_would_see_and_resume_in_mid_epoch(mixture, config, world):
    def sorted_batches(batches):
        return [
            sorted(zip(b.clip_ids, b.features["video"].values.sum((1, 2, 3, 4)).tolist(), strict=True)) for b in batches
        ]

    alone = sorted_batches(loader(mixture, config).batches(2))
    parts = [sorted_batches(loader(mixture, config, world, rank).batches(2, first=1)) for rank in range(world)]
    together = [sorted(row for part in batch for row in part if row[0]) for batch in zip(*parts, strict=True)]
    assert together == alone[1:]


def test_without_weights_an_epoch_has_every_clip_once_and_may_be_balanced(mixture, uri, tmp_path):
    plain = open_store(write_yaml(tmp_path / "plain.yaml", {store.uri: None for store in mixture.stores.values()}))
    for config in SEVERAL[:2]:
        clips = [clip for batch in ids(loader(plain, config).batches(0)) for clip in batch]
        assert sorted(clips) == sorted(plain.index("train")["clip_id"].to_pylist())
    loader(plain, LoaderConfig(balance="label"))
    with pytest.raises(JobError, match=r"--loader.balance and the weights of .*mix.yaml: .*leave one out"):
        check(uri, replace(recipe(), loader=LoaderConfig(balance="label")))


def test_clips_of_a_store_without_a_task_are_masked_in_its_loss(mixture):
    batch = next(batch for batch in loader(mixture).batches(0) if any(c.startswith("few") for c in batch.clip_ids))
    few = torch.tensor([clip.startswith("few") for clip in batch.clip_ids])
    assert (batch.targets["label"][few] == -1).all() and (~batch.targets["mood"][few].isnan()).any()


def test_a_model_of_a_mixture_is_evaluated_by_store_and_predicts_every_clip(mixture, uri, tmp_path):
    learner = Learner(uri, recipe("concat", epochs=1))
    (history,) = run(learner)
    assert np.isfinite(history["train/loss_label"]) and np.isfinite(history["val/score"])
    clcr.save(learner.trainer.model, tmp_path / "model", learner.store.spec.to_dict())
    options = {"slices": ("store",), "robust_clips": 3, "pictures": 0, "track": False, "noise": (1.0,)}
    evaluate(EvaluateConfig((str(tmp_path / "model"),), uri, str(tmp_path / "report"), **options))
    (found,) = json.loads((tmp_path / "report" / "metrics.json").read_text())["models"].values()
    assert {store: part["n"] for store, part in found["tasks"]["mood"]["slices"]["store"].items()} == {
        "whole": 4,
        "few": 2,
    }
    assert found["tasks"]["label"]["n"] == 4
    shards = clips_by_shard(mixture, "")
    answers = pa.concat_tables([predict_shard(learner.trainer.model, mixture, shard, 8) for shard in shards])
    assert sorted(answers["clip_id"].to_pylist()) == sorted(mixture.index()["clip_id"].to_pylist())


def test_a_run_says_what_each_store_gives_to_an_epoch(uri):
    said = "\n".join(check(uri, recipe()).lines())
    assert "store whole: 25 clips of an epoch, from 29 training clips" in said
    assert "store few: 12 clips of an epoch, from 8 training clips" in said
    assert "task label (classification, 2 classes): missing in" in said


def test_a_weighted_store_without_training_clips_is_refused(mixture, tmp_path):
    write_store(tmp_path / "untrained", make_clips(0, 2, 2))
    listed = {mixture.stores["whole"].uri: 1, "untrained": 1}
    with pytest.raises(JobError, match="store untrained has no training clip to make up its weight: leave it out"):
        check(write_yaml(tmp_path / "mix.yaml", listed), recipe())
    listed = dict.fromkeys(listed)
    check(write_yaml(tmp_path / "mix.yaml", listed), recipe())
