"""The contract of every model: what may and may not change a prediction, that it learns, that it survives a disk."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import clcr
from clcr.batches import Features, collate
from clcr.errors import ConfigError
from clcr.registry import MODELS
from clcr.tasks import task_loss

WHOLE_CLIPS = ["mm_orient"]  # no task per bin
FUSION = list(MODELS)
EVERY = [*MODELS, "video", "audio"]
WHEN = clcr.TaskSpec("when", "events", ("background", "a", "b"), 5.0)


def largest_difference(first, second):
    return max((first.logits[t] - second.logits[t]).abs().max().item() for t in first.logits)


def fitted(make, name, batch, steps=5, **options):
    """A model with the batch's statistics, a few steps of training, and what it keeps of the training split."""
    model = make.model(name, **options)
    model.fit_statistics([batch])
    make.train(model, batch, steps=steps)
    model.prepare_evaluation(lambda clips: [make.batch(4, seed=7, features=options.get("features", make.features))])
    return model.eval()


def with_events(make, clips, features=None):
    """A batch of clips of four bins, and its three tasks."""
    features = features or make.features
    samples, tasks = make.samples(clips, features=features), {**make.tasks, "when": WHEN}
    for sample in samples:
        sample["targets"]["when"] = np.array([0, 1, 2, 1], np.int16)
    return collate(samples, features, tasks), tasks


def test_statistics_do_not_depend_on_how_clips_are_batched(make):
    batch = make.batch(20)
    whole, single = make.model("clcr"), make.model("clcr")
    whole.fit_statistics([batch])
    single.fit_statistics(batch.split(1))
    for (name, found), expected in zip(single.named_buffers(), whole.buffers(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6), name
    stem = whole.encoder.encoders[0].stem
    assert stem.pixels.count == 0.0 and (stem.mean != 127.5).any()


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_padding_order_and_neighbours_never_change_a_clips_logits(make, name):
    batch, samples = make.batch(), make.samples()
    model = fitted(make, name, batch)
    together = model(batch)
    reordered = model(collate(samples[::-1], make.features, make.tasks))
    for task in make.tasks:
        assert (reordered.logits[task].flip(0) - together.logits[task]).abs().max() <= 1e-5
    for i, sample in enumerate(samples):
        alone = model(collate([sample], make.features, make.tasks))
        for task in make.tasks:
            assert (alone.logits[task][0] - together.logits[task][i]).abs().max() <= 1e-5
    longer = replace(batch, features={m: padded(f) for m, f in batch.features.items()})
    assert largest_difference(model(longer), together) <= 1e-5


def padded(features, extra=13):
    values, valid = features.values, features.valid
    tail = torch.full((len(values), extra, *values.shape[2:]), 7, dtype=values.dtype)
    return Features(torch.cat([values, tail], dim=1), torch.cat([valid, torch.zeros(len(valid), extra) > 0], dim=1))


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_modality_that_a_model_reads_counts(make, name):
    batch = make.batch()
    model = fitted(make, name, batch, steps=40)
    expected = model(batch)
    for modality in model.features:
        features = batch.features[modality]
        other = Features(features.values.flip(0), features.valid.flip(0))
        changed = model(replace(batch, features={**batch.features, modality: other}))
        assert largest_difference(changed, expected) > 1e-3, modality


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", EVERY)
def test_missing_modalities_give_no_nan(make, name, mode):
    samples = make.samples(8)
    del samples[0]["features"]["audio"]
    del samples[1]["features"]["video"]
    samples[2]["features"] = {}
    batch = collate(samples, make.features, make.tasks)
    model = make.model(name)
    model.fit_statistics([batch])
    model.prepare_evaluation(lambda clips: [batch])
    getattr(model, mode)()
    loss = make.loss(model, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(x.isfinite().all() for x in model(batch).logits.values())


@pytest.mark.parametrize("name", FUSION)
@torch.no_grad()
def test_what_stands_in_for_a_missing_modality_is_never_read(make, name):
    batch = make.batch(3)
    model = fitted(make, name, batch)
    absent = {**batch.present, "audio": torch.tensor([False, True, True])}
    other = {**batch.features, "audio": Features(batch.features["audio"].values + 3, batch.features["audio"].valid)}
    first = model(replace(batch, present=absent))
    second = model(replace(batch, present=absent, features=other))
    assert all(torch.equal(first.logits[t][0], second.logits[t][0]) for t in make.tasks)


@pytest.mark.parametrize("name", [*FUSION, "text"])
def test_three_modalities_one_of_them_language_train_every_parameter(make, name):
    """DistributedDataParallel waits for the gradient of every parameter."""
    batch = make.batch(features=make.three)
    model = make.model(name, features=make.three)
    make.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_every_model_can_learn_a_batch_by_heart(make, name):
    batch = make.batch(6)
    free = {"loss": {"lambda_intra": 0.0, "lambda_inter": 0.0}, "misa": dict.fromkeys(MISA, 0.0)}
    model = make.model(name, width=32, stem={"shift": 0.0}, **free)  # frames that move are another batch each time
    first = make.loss(model, batch).item()
    last = make.loss(make.train(model, batch, steps=60, lr=5e-3), batch).item()
    assert last < 0.2 * first


MISA = ("similarity", "difference", "reconstruction")


@pytest.mark.parametrize("name", [name for name in FUSION if name != "mult"])  # which has one level, and no stages
def test_every_model_reads_all_layers_of_a_network(make, name):
    """The first layer of a sound counts for models that read the deepest level too."""
    sound = clcr.FeatureSpec((3, 8), 25.0, "float16")
    features = {"video": make.features["video"], "audio": sound}
    samples = make.samples(6, features=features)
    batch = collate(samples, features, make.tasks)
    model = make.model(name, features=features, stem={"shift": 0.0})
    model.fit_statistics([batch])
    make.train(model, batch, steps=1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    muted = replace(batch, features=batch.features | {"audio": without_layer(batch.features["audio"], 0)})
    assert largest_difference(model(batch), model(muted)) > 1e-6


def without_layer(features, layer):
    values = features.values.clone()
    values[:, :, layer] = 0
    return replace(features, values=values)


@pytest.mark.parametrize("name", FUSION)
@torch.no_grad()
def test_bfloat16_autocast_changes_a_prediction_little(make, name):
    batch = make.batch()
    model = fitted(make, name, batch)
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    scale = max(logits.abs().max().item() for logits in expected.logits.values())
    assert 0 < largest_difference(out, expected) <= 0.05 * scale


@pytest.mark.parametrize("name", FUSION)
@torch.no_grad()
def test_a_number_has_more_digits_than_bfloat16(make, name):
    with torch.autocast("cpu", torch.bfloat16):
        mood = make.model(name).eval()(make.batch()).logits["mood"]  # in the model's own unit
    assert not torch.equal(mood, mood.bfloat16().double())


@pytest.mark.parametrize("name", FUSION)
def test_a_model_compiles_as_one_graph(make, name):
    """With a task per clip, one per number, and one per bin where the model can; CLCR with words, which lack times."""
    torch._dynamo.reset()  # a module's call is one piece of code, of which few recompilations are allowed
    features = make.three if name == "clcr" else make.features
    batch, tasks = with_events(make, 6, features)
    tasks = make.tasks if name in WHOLE_CLIPS else tasks
    model = clcr.build(name, make.config(levels=2, stem={"shift": 0.0}), features, tasks)  # no augmentation
    expected = model(batch)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    assert largest_difference(out, expected) <= 1e-5
    assert all(torch.allclose(out.losses[k], expected.losses[k], atol=1e-5) for k in expected.losses)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_saved_model_gives_identical_logits(make, name, tmp_path):
    batch = make.batch()
    model = fitted(make, name, batch, steps=2, levels=2)
    clcr.save(model, tmp_path / "model", {"fingerprint": "abc"})
    again = clcr.load(tmp_path / "model")
    first, second = model(batch), again(batch)
    assert all(torch.equal(first.logits[t], second.logits[t]) for t in make.tasks)
    assert json.loads((tmp_path / "model" / "store.json").read_text()) == {"fingerprint": "abc"}
    clcr.save(again, tmp_path / "copy", {})
    weights = [(tmp_path / folder / "weights.safetensors").read_bytes() for folder in ("model", "copy")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", EVERY)
def test_events_are_predicted_per_bin_or_refused_in_one_line(make, name):
    batch, tasks = with_events(make, 3)
    if name in WHOLE_CLIPS:
        with pytest.raises(ConfigError, match="when per bin"):
            clcr.build(name, make.config(), make.features, tasks)
        return
    model = clcr.build(name, make.config(), make.features, tasks)
    out = model(batch)
    assert out.logits["when"].shape == (3, 4, 3) and out.logits["word"].shape == (3, 3)
    (task_loss(WHEN, out.logits["when"], batch.targets["when"])[0] + sum(out.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FUSION)
def test_a_model_that_fuses_needs_two_modalities(make, name):
    alone = {"audio": make.features["audio"]}
    if name in ("concat", "late"):  # of one modality, these are that modality's model
        make.model(name, features=alone)
        return
    with pytest.raises(ConfigError, match="two or more"):
        make.model(name, features=alone)


def test_a_weight_of_an_unknown_task_is_refused(make):
    with pytest.raises(ConfigError, match=r"--loss.task-weights: no task named colour; there are word, mood"):
        make.model("concat", loss={"task_weights": ("colour=2",)})
