"""What one worker learns, two and four learn: the same losses at every step, from each clip once per epoch."""

import io
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import storefiles
import torch
import torch.distributed as dist
from learners import losses, on_workers, recipe, run

from clcr.config import CLCRConfig, ModelConfig, StemConfig
from clcr.errors import DivergedError
from features.store.samples import Sample
from pipelines.training.learner import Learner
from pipelines.training.loading import LoaderConfig

pytestmark = pytest.mark.slow
STEPS, EPOCHS = 50, 13  # of 29 clips in batches of 9: the last batch has two, fewer than there are workers


def noise(number):
    """Frames and sound of independent random numbers; every third clip has no sound."""
    rng, tokens = np.random.default_rng(number), 3 + number % 4
    values = {"video": rng.integers(0, 256, (tokens, 4, 4, 3), dtype=np.uint8)}
    if number % 3:
        values["audio"] = rng.normal(size=(tokens * 4, 8)).astype(np.float16)
    return Sample(values, 0.08 * tokens)


@pytest.fixture(scope="module")
def noise_store(tmp_path_factory):
    """29 + 3 + 5 clips with two tasks, some without a label, some without sound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storefiles, "make_sample", noise)
        return storefiles.write_store(tmp_path_factory.mktemp("noise") / "store", storefiles.make_clips(29, 3, 5))


def without_chance(epochs=EPOCHS):
    """Nothing that draws random numbers by worker: no dropout, no shift of frames."""
    network, given = (
        CLCRConfig(ModelConfig(width=16, heads=2, levels=2, dropout=0.0), StemConfig(shift=0.0)),
        recipe(epochs=epochs),
    )
    return replace(given, optim=replace(given.optim, batch_size=9), network=network)


def curve(uri, rank, world):
    """Losses over all workers of each of 50 steps, and the clips that each epoch saw."""
    learner, steps, clips = Learner(uri, without_chance(), rank, world), [], []
    if torch.get_default_dtype() == torch.float64:
        learner.trainer.model.double()
    for epoch in range(EPOCHS):
        seen = []
        for batch in learner.train.batches(epoch):
            steps.append(learner.trainer.mean_over_workers(learner.trainer.train_step(batch)))
            seen += filter(None, batch.clip_ids)
        everyone = [None] * world
        dist.all_gather_object(everyone, seen)
        clips.append(Counter(clip for share in everyone for clip in share))
    return steps[:STEPS], clips


def curves(uri, rank, world):
    """`curve` in single and then in double precision."""
    single = curve(uri, rank, world)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # the model's own casts too; this process ends here
    return single, curve(uri, rank, world)


def test_losses_of_fifty_steps_agree_on_one_two_and_four_workers_and_every_clip_is_seen_once(noise_store):
    everything = dict.fromkeys(noise_store.index("train")["clip_id"].to_pylist(), 1)
    results = {world: on_workers(world, curves, noise_store.uri) for world in (1, 2, 4)}
    (alone, _), (exactly_alone, _) = results[1][0]
    assert {"train/loss_intra", "train/loss_inter_mix", "train/loss_label", "train/loss_mood"} <= set(alone[0])
    for workers in results.values():
        for single, double in workers:
            assert all(epoch == everything for _, clips in (single, double) for epoch in clips)
            for steps, expected, error in ((single[0], alone, 1e-5), (double[0], exactly_alone, 1e-10)):
                assert len(steps) == STEPS
                worst = [
                    max(abs(mine[name] - one[name]) for name in one) for mine, one in zip(steps, expected, strict=True)
                ]
                assert max(worst) < error, worst


def with_poison(uri, rank, world):
    """An infinite label in the third step, in the hands of one worker; what the workers say of it."""
    learner = Learner(uri, without_chance(), rank, world)
    batches = list(learner.train.batches(0))
    if rank == 1:
        batches[2].targets["mood"][0] = float("inf")
    with pytest.raises(DivergedError) as stop:
        learner.trainer.train_epoch(batches)
    return str(stop.value), batches[2].clip_ids[0]


def test_a_loss_that_is_not_finite_stops_every_worker_with_the_name_of_the_clip_that_made_it_so(noise_store):
    (message, _), (same, guilty) = on_workers(2, with_poison, noise_store.uri)
    assert message == same and message.startswith(f"step 2: the loss is inf on clips {guilty}: check")


def by_windows(window):
    """One epoch, read by windows of so many shards, in which a checkpoint after two steps of four lies."""
    return replace(without_chance(epochs=1), loader=LoaderConfig(cache_gb=0.0, processes=0, window=window))


def interrupted(uri, rank, world, window):
    """The state in mid-epoch, after two steps of four, as rank 0 would save it."""
    learner, saved = Learner(uri, by_windows(window), rank, world), io.BytesIO()

    def after_step(_):
        if learner.trainer.step == 2:
            torch.save(learner.trainer.state_dict(), saved)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        list(learner.fit(after_step))
    return saved.getvalue()


@pytest.mark.parametrize("window", [0, 3])
def test_a_run_that_stops_on_two_workers_goes_on_with_one_and_sees_the_rest_of_the_epoch_once(noise_store, window):
    state, _ = on_workers(2, partial(interrupted, window=window), noise_store.uri)
    whole = losses(run(Learner(noise_store.uri, by_windows(window))))
    resumed = Learner(noise_store.uri, by_windows(window))
    resumed.trainer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    assert (resumed.trainer.next_epoch, resumed.trainer.done) == (0, 2)
    assert resumed.trainer.sums["samples"] == 18
    rest = [clip for batch in resumed.train.batches(0, 2) for clip in batch.clip_ids]
    first = [clip for batch in list(resumed.train.batches(0))[:2] for clip in batch.clip_ids]
    assert sorted(first + rest) == sorted(noise_store.index("train")["clip_id"].to_pylist())
    for mine, one in zip(losses(run(resumed)), whole, strict=True):
        assert mine == {name: pytest.approx(value, abs=1e-3) for name, value in one.items()}
