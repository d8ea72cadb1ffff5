"""Events: one prediction per bin, from the tokens that cover the bin and from no padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import clcr
from clcr import registry
from clcr.batches import Features, collate
from clcr.errors import ConfigError
from clcr.hierarchy import Tokens
from clcr.metrics import Predictions, concatenate, task_metrics
from clcr.tasks import task_loss
from clcr.windows import Windows

WORD = clcr.TaskSpec("word", "classification", ("a", "b", "c"))
WHEN = clcr.TaskSpec("when", "events", ("background", "a", "b"), 5.0)
TASKS = {"word": WORD, "when": WHEN}
MODELS = [*(name for name in registry.MODELS if name != "mm_orient"), "video", "audio"]


@pytest.fixture
def samples(make):
    """Clips of 1.2 s to 2 s with a class for every bin of 0.2 s."""
    rng, samples = np.random.default_rng(0), make.samples(6)
    for sample in samples:
        bins = int(len(sample["features"]["video"]) / 12.5 * WHEN.rate + 0.5)
        sample["targets"]["when"] = rng.integers(0, 3, bins).astype(np.int16)
    return samples


def build(make, name="clcr", features=None, tasks=TASKS, **options):
    return clcr.build(name, make.config(**options), features or make.features, tasks)


def test_targets_of_bins_are_padded_with_missing_ones(make, samples):
    samples[1]["targets"] = {"when": np.full(3, -1, np.int16)}
    samples[2]["targets"] = {}
    target = collate(samples, make.features, TASKS).targets["when"]
    longest = max(len(sample["targets"].get("when", ())) for sample in samples)
    assert target.shape == (6, longest) and target.dtype == torch.int64
    for row, sample in zip(target, samples, strict=True):
        known = sample["targets"].get("when", [])
        assert row.tolist() == [*map(int, known), *[-1] * (longest - len(known))]
    empty = collate([{"clip_id": "", "features": {}, "targets": {}}] * 2, make.features, TASKS)
    assert empty.targets["when"].tolist() == [[-1], [-1]] and empty.bins["when"].tolist() == [0, 0]


def test_the_loss_is_the_sum_over_known_bins():
    logits, target = torch.randn(2, 3, 3, requires_grad=True), torch.tensor([[0, 2, -1], [1, -1, -1]])
    total, count = task_loss(WHEN, logits, target)
    expected = -sum(logits.log_softmax(-1)[at] for at in [(0, 0, 0), (0, 1, 2), (1, 0, 1)])
    total.backward()
    assert torch.allclose(total, expected) and count == 3
    assert not logits.grad[0, 2].any() and not logits.grad[1, 1:].any() and logits.grad[0, 0].any()


def test_only_events_have_bins():
    with pytest.raises(ConfigError, match="only events have bins"):
        clcr.TaskSpec("when", "events", ("a", "b"))
    with pytest.raises(ConfigError, match="only events have bins"):
        clcr.TaskSpec("word", "classification", ("a", "b"), 5.0)


def windows(*counts):
    tasks = {"clip": WORD, "bins": replace(WHEN, rate=1.0)}
    targets = {"clip": torch.zeros(2), "bins": torch.zeros(2, max(counts))}
    batch = clcr.Batch({}, {}, targets, ["x", "y"], bins={"bins": torch.tensor(counts)})
    return Windows.of(tasks, batch)


def test_a_token_belongs_to_the_bins_that_it_covers_by_how_much_of_them_it_covers():
    edges = torch.tensor([0.0, 0.75, 1.5, 2.0], dtype=torch.float64)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    tokens = Tokens(torch.zeros(2, 3, 4), valid, torch.stack([edges[:-1], edges[1:]], dim=1))
    first, second = windows(3, 2).shares(tokens)
    assert first.tolist() == [[1, 1, 1], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 0]]
    assert second.tolist() == [[1, 1, 0], [0.75, 0.25, 0], [0, 0.5, 0], [0, 0, 0]]
    assert not windows(3, 1).shares(tokens)[1, 2:].any()  # bins beyond the clip's own are nobody's
    assert windows(3, 2).task.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("rate", [12.5, 24.0, 29.97, 30.0])
def test_rounding_never_gives_a_bin_a_token_that_only_touches_it(rate):
    """After an hour at one bin per token, each bin has its token and no neighbour's."""
    count = int(3600 * rate)
    task = {"bins": replace(WHEN, rate=rate)}
    batch = clcr.Batch({}, {}, {"bins": torch.zeros(1, count)}, ["x"], {"bins": torch.tensor([count])})
    edges = torch.arange(count + 1, dtype=torch.float64)[-50:] * (1 / rate)
    tokens = Tokens(torch.zeros(1, 49, 4), torch.ones(1, 49) > 0, torch.stack([edges[:-1], edges[1:]], dim=1))
    shares = Windows.of(task, batch).shares(tokens)[0, -49:]
    assert torch.equal(shares > 0, torch.eye(49) > 0)


def test_a_bin_of_a_minute_holds_tokens_of_a_hundredth_of_a_second():
    edges = torch.arange(6001, dtype=torch.float64) * 0.01
    tokens = Tokens(torch.zeros(1, 6000, 4), torch.ones(1, 6000) > 0, torch.stack([edges[:-1], edges[1:]], dim=1))
    batch = clcr.Batch({}, {}, {"bins": torch.zeros(1, 1)}, ["x"], {"bins": torch.tensor([1])})
    shares = Windows.of({"bins": replace(WHEN, rate=1 / 60)}, batch).shares(tokens)
    assert torch.allclose(shares, torch.tensor(1 / 6000), rtol=1e-4)


@torch.no_grad()
def test_every_level_of_every_modality_covers_every_bin_of_a_clip(make, samples):
    model, batch = build(make), collate(samples, make.features, TASKS)
    for level in model.encoder(batch):
        for tokens in level.values():
            shares = Windows.of(TASKS, batch).shares(tokens)[:, 1:]
            assert torch.equal((shares > 0).any(-1)[batch.targets["when"] != -1].unique(), torch.tensor([True]))
            assert (shares.sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_padding_and_neighbours_never_change_a_bins_logits(make, samples, name, pooling):
    batch = collate(samples, make.features, TASKS)
    model = build(make, name, pooling=pooling)
    train(model, batch, 5)
    together = model.eval()(batch)
    assert together.logits["when"].shape == (*batch.targets["when"].shape, 3)
    assert together.logits["word"].shape == (6, 3)
    for i, sample in enumerate(samples):
        alone = model(collate([sample], make.features, TASKS)).logits
        bins = len(sample["targets"]["when"])
        assert (alone["when"][0] - together.logits["when"][i, :bins]).abs().max() <= 1e-5
        assert (alone["word"][0] - together.logits["word"][i]).abs().max() <= 1e-5
    longer = replace(batch, targets={**batch.targets, "when": torch.full((6, 40), -1)})
    bins = batch.targets["when"].shape[1]
    assert (model(longer).logits["when"][:, :bins] - together.logits["when"]).abs().max() <= 1e-5


@torch.enable_grad()
def train(model, batch, steps, lr=3e-3):
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=lr)
    for _ in range(steps):
        loss = total_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def total_loss(model, batch):
    out = model(batch)
    parts = [task_loss(task, out.logits[name], batch.targets[name]) for name, task in model.tasks.items()]
    return sum(total / count.clamp(min=1) for total, count in parts) + sum(out.losses.values())


@pytest.mark.parametrize("name", ["clcr", "concat"])
@torch.no_grad()
def test_a_modality_takes_no_part_in_bins_that_it_has_no_token_in(make, samples, name):
    """Sound of 0.6 s under a longer video: what it says reaches the bins up to there, and no later one."""
    for sample in samples:
        sample["features"]["audio"] = sample["features"]["audio"][:30]
    batch = collate(samples, make.features, TASKS)
    model = build(make, name, exchange="none")
    train(model, batch, 3)
    before = model.eval()(batch)
    sound = batch.features["audio"]
    other = Features(torch.randn_like(sound.values.float()).half(), sound.valid)
    after = model(replace(batch, features={**batch.features, "audio": other}))
    moved = (before.logits["when"] - after.logits["when"]).abs().amax(dim=(0, 2))
    # A level's token ends where its last frame's pair or quadruple does, at most 0.08 s later.
    assert (moved[:3] > 1e-4).all() and not moved[4:].any() and after.logits["when"].isfinite().all()
    silent = model(replace(batch, present={**batch.present, "audio": torch.zeros(6) > 0}))
    assert torch.allclose(silent.logits["when"][:, 4:], before.logits["when"][:, 4:], atol=1e-6)


@torch.no_grad()
def test_a_modality_without_time_speaks_in_every_bin(make, samples):
    features = {**make.features, "image": clcr.FeatureSpec((8,), 0.0, "float32")}
    for sample in samples:
        sample["features"]["image"] = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    batch = collate(samples, features, TASKS)
    for name in ("clcr", "concat"):
        model = build(make, name, features)
        train(model, batch, 3)
        before = model.eval()(batch).logits["when"]
        image = Features(batch.features["image"].values + 1, batch.features["image"].valid)
        after = model(replace(batch, features={**batch.features, "image": image})).logits["when"]
        assert torch.equal((before - after).abs().amax(dim=2) > 1e-6, batch.targets["when"] != -1)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["clcr", "concat", "audio"])
def test_missing_modalities_and_bins_beyond_every_token_give_no_nan(make, samples, name, mode):
    del samples[0]["features"]["audio"]
    del samples[1]["features"]["video"]
    samples[2]["features"] = {}
    samples[3]["targets"]["when"] = np.ones(40, np.int16)  # 8 s of labels, 2 s of tokens
    batch = collate(samples, make.features, TASKS)
    model = build(make, name)
    getattr(model, mode)()
    loss = total_loss(model, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    out = model(batch)
    assert all(x.isfinite().all() for x in out.logits.values())
    if name == "clcr":
        assert out.beta[0].tolist() == pytest.approx([1.0, 0.0]) and out.eta[0, 1] == 0
        assert torch.allclose(out.task_omega["when"][[0, 1, 3]].sum(1), torch.ones(3))
        assert all(v.shape == (6,) for v in model.diagnostics(out, batch).values())


def test_weights_of_levels_and_modalities_are_per_bin(make, samples):
    """What is reported is their mean over the clip's own bins, whatever the batch's longest; sound may outlast them."""
    for sample in samples:
        sample["features"]["audio"] = np.tile(sample["features"]["audio"], (2, 1))
    batch = collate(samples, make.features, TASKS)
    model = build(make)
    train(model, batch, 20)
    out = model.eval()(batch)
    longer = model(replace(batch, targets={**batch.targets, "when": torch.full((6, 60), -1)}))
    for name in ("omega", "beta", "eta"):
        assert torch.allclose(getattr(out, name), getattr(longer, name), atol=1e-6)
    seen = {}
    model.inter.register_forward_hook(lambda module, given, result: seen.update(result=result))
    model(batch)
    assert seen["result"].omega.shape == (6, 1 + batch.targets["when"].shape[1], 3)
    assert seen["result"].beta[0, 1:].std(dim=0).min() > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_learn_the_bins_of_a_batch_by_heart(make, samples, name):
    batch = collate(samples, make.features, TASKS)
    free = {"loss": {"lambda_intra": 0.0, "lambda_inter": 0.0}}
    free["misa"] = {"similarity": 0.0, "difference": 0.0, "reconstruction": 0.0}
    model = build(make, name, tasks={"when": WHEN}, **free)
    first = total_loss(model, batch).item()
    assert train(model, batch, 80, lr=2e-3 if name in ("misa", "mult") else 5e-3) < 0.25 * first
    assert all(p.grad is not None for p in model.parameters())


def test_a_saved_model_of_events_comes_back(make, samples, tmp_path):
    model, batch = build(make).eval(), collate(samples, make.features, TASKS)
    clcr.save(model, tmp_path, {})
    again = clcr.load(tmp_path)
    assert again.tasks["when"] == WHEN
    assert torch.equal(again(batch).logits["when"], model(batch).logits["when"])


def part(*lengths, seed=0):
    rng = torch.Generator().manual_seed(seed)
    bins = max(lengths)
    targets = torch.randint(0, 3, (len(lengths), bins), generator=rng)
    for row, length in zip(targets, lengths, strict=True):
        row[length:] = -1
    ids = [f"clip{seed}-{n}" if length else "" for n, length in enumerate(lengths)]
    return {"when": Predictions(ids, torch.randn(len(lengths), bins, 3, generator=rng), targets)}


def test_parts_of_different_numbers_of_bins_are_joined_and_no_padding_is_measured():
    parts = [part(4, 2), part(7, 5, 0, seed=1), part(1, seed=2)]
    joined = concatenate(parts)["when"]
    assert joined.clip_ids == ["clip0-0", "clip0-1", "clip1-0", "clip1-1", "clip2-0"]
    assert joined.logits.shape == (5, 7, 3) and joined.targets.shape == (5, 7)
    guess = torch.cat([p["when"].logits.argmax(-1)[p["when"].targets != -1] for p in parts])
    truth = torch.cat([p["when"].targets[p["when"].targets != -1] for p in parts])
    found = task_metrics(WHEN, joined)
    assert found["n"] == len(truth) == 19
    assert found["accuracy"] == pytest.approx((guess == truth).float().mean().item())
    again = concatenate([concatenate(parts[:2]), parts[2]])["when"]
    assert torch.equal(again.logits, joined.logits) and torch.equal(again.targets, joined.targets)
