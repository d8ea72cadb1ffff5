"""Where a training starts: weights of another model by name and shape, and parts that stay as they are."""

import re
from dataclasses import replace

import pytest
import torch
from learners import recipe, run

import clcr
from clcr.class_loss import ClassLossConfig
from clcr.config import CLCRConfig, ModelConfig
from clcr.errors import ConfigError
from pipelines.common.errors import JobError
from pipelines.training.learner import Learner, Recipe, build_model
from pipelines.training.loading import LoaderConfig, feature_specs, task_specs
from pipelines.training.start import freeze, initialise, sources_of, take_weights


@pytest.fixture(scope="module")
def saved(store, tmp_path_factory):
    """The folder of a model of two tasks, and the model."""
    folder = tmp_path_factory.mktemp("saved")
    model = Learner(store.uri, recipe(epochs=1)).trainer.model
    clcr.save(model, folder / "model", store.spec.to_dict())
    return str(folder), model


def test_a_model_of_the_same_kind_begins_with_all_weights_and_one_of_fewer_tasks_with_what_fits(saved, store):
    folder, model = saved
    same = Learner(store.uri, replace(recipe(epochs=1), init=folder, seed=5)).trainer.model
    assert all((a == b).all() for a, b in zip(same.parameters(), model.parameters(), strict=True))
    fewer = Learner(store.uri, replace(recipe(epochs=1), tasks=("mood",), seed=5)).trainer.model
    taken = initialise(fewer, folder)
    assert set(taken) <= {name for name, _ in model.named_parameters()} and len(taken) > 10
    assert all((dict(fewer.named_parameters())[n] == dict(model.named_parameters())[n]).all() for n in taken)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parts_stay_bit_for_bit_and_the_others_learn(store, optimizer):
    fresh = Learner(store.uri, recipe(epochs=1)).trainer.model
    part = next(iter(fresh.named_parameters()))[0].partition(".")[0]
    learner = Learner(store.uri, replace(recipe(epochs=1, optimizer=optimizer), freeze=(part,)))
    before = {name: value.detach().clone() for name, value in learner.trainer.model.named_parameters()}
    run(learner)
    moved = {name for name, value in learner.trainer.model.named_parameters() if (value != before[name]).any()}
    assert moved and not any(name.startswith(f"{part}.") for name in moved)


def test_a_parts_first_step_is_its_factor_of_the_others(store):
    """SGD without clipping: a step is proportional to the rate, and both runs' first gradients are the same."""

    def moved(*scales):
        optim = {"optimizer": "sgd", "grad_clip": 0.0, "weight_decay": 0.0, "warmup": 0.0}
        learner = Learner(store.uri, recipe("concat", epochs=1, lr_scale=scales, **optim))
        before = {name: value.detach().clone() for name, value in learner.trainer.model.named_parameters()}
        torch.manual_seed(0)
        learner.trainer.train_step(next(iter(learner.train.batches(0))))
        return {name: value.detach() - before[name] for name, value in learner.trainer.model.named_parameters()}

    plain, scaled = moved(), moved("encoder=.125")
    assert any(name.startswith("encoder.") and step.any() for name, step in plain.items())
    for name, step in plain.items():
        factor = 0.125 if name.startswith("encoder.") else 1.0
        assert torch.allclose(scaled[name], factor * step, rtol=1e-4, atol=1e-7), name


def test_the_unit_of_a_number_is_the_labels_own_and_an_encoder_goes_to_its_modality(saved, store):
    folder, _ = saved
    for modalities in (("video", "audio"), ("audio", "video")):
        torch.manual_seed(7)
        features = {name: feature_specs(store)[name] for name in modalities}
        model = clcr.build("clcr", recipe(epochs=1).network, features, task_specs(store))
        model.units.center.fill_(5.0)
        initialise(model, folder)
        assert (model.units.center == 5).all()
        source = clcr.load(f"{folder}/model")
        for name in modalities:
            pair = (m.encoder.encoders[m.encoder.modalities.index(name)].state_dict() for m in (model, source))
            mine, theirs = pair
            assert mine and all((mine[key] == theirs[key]).all() for key in mine)


def random_model(architecture, modalities, store):
    """A model whose every weight is random, those that start at zero too."""
    features = {name: feature_specs(store)[name] for name in modalities}
    model = clcr.build(architecture, recipe(epochs=1).network, features, task_specs(store))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def equal(part, other):
    mine, theirs = part.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all((mine[key] == theirs[key]).all() for key in mine)


def test_each_modality_begins_with_the_model_of_its_own(store, tmp_path):
    alone = {name: random_model(name, [name], store) for name in ("video", "audio")}
    for name, model in alone.items():
        clcr.save(model, tmp_path / name / "model", store.spec.to_dict())
    for order in (("video", "audio"), ("audio", "video")):
        both = ", ".join(str(tmp_path / name) for name in order)
        model = Learner(store.uri, replace(recipe("concat", epochs=1), init=both, seed=5)).trainer.model
        fresh = Learner(store.uri, replace(recipe("concat", epochs=1), seed=5)).trainer.model
        for place, name in enumerate(model.encoder.modalities):
            assert equal(model.encoder.encoders[place], alone[name].encoder.encoders[0])
            assert equal(model.pooling[place], alone[name].pooling[0])
        assert equal(model.heads, fresh.heads)  # they read both


@pytest.mark.parametrize("architecture", ["late", "ogm_ge", "misa", "film", "clcr"])
def test_of_a_model_of_modalities_in_another_order_no_part_goes_to_the_wrong_one(architecture, store):
    source = random_model(architecture, ["video", "audio"], store)
    model = random_model(architecture, ["audio", "video"], store)
    before = {name: value.clone() for name, value in model.named_parameters()}
    taken = take_weights(model, source, "it")
    assert taken and all(re.search(r"encoders|pooling", name) for name in taken)
    assert equal(model.encoder.encoders[0], source.encoder.encoders[1])
    left = [name for name, _ in model.named_parameters() if name not in taken]
    assert all((dict(model.named_parameters())[name] == before[name]).all() for name in left)


def test_a_layer_begins_with_its_own_layer(store):
    """A model of one modality reads the deepest layer alone, and clcr early, middle and late ones."""
    source, model = layered_models(store, rate=0.0)
    shallow = {name: value.clone() for name, value in model.encoder.encoders[0].levels[0].state_dict().items()}
    assert take_weights(model, source, "it")
    mine, theirs = model.encoder.encoders[0], source.encoder.encoders[0]
    assert equal(mine.levels[2], theirs.levels[0]) and equal(mine.stem.project[2], theirs.stem.project[0])
    assert all((mine.levels[0].state_dict()[name] == value).all() for name, value in shallow.items())


def test_layers_that_enter_stages_begin_with_the_same_stages(store):
    source, model = layered_models(store, rate=5.0)
    assert take_weights(model, source, "it")
    mine, theirs = model.encoder.encoders[0], source.encoder.encoders[0]
    assert equal(mine.stem, theirs.stem) and equal(mine.stages, theirs.stages)
    assert equal(mine.levels["2"], theirs.levels["2"])


def layered_models(store, rate):
    """A model of a text of six layers alone, and one of that and a sound."""
    features = {name: clcr.FeatureSpec((6, 8), rate, "float16") for name in ("text", "sound")}
    network, tasks = recipe(epochs=1).network, task_specs(store)
    return (
        clcr.build("text", network, {"text": features["text"]}, tasks),
        clcr.build("clcr", network, features, tasks),
    )


def test_what_cannot_be_begun_is_named(saved, store, tmp_path):
    folder, model = saved
    with pytest.raises(JobError, match=r"--freeze encoders: this model has \w+, "):
        freeze(model, ("encoders",))
    with pytest.raises(JobError, match="nothing is left to learn"):
        freeze(torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1)}), ("a",))
    with pytest.raises(JobError, match=f"--init {folder}: none of its weights fits"):
        initialise(torch.nn.Linear(1, 1), folder)
    wider = replace(recipe("concat", epochs=1), network=CLCRConfig(model=ModelConfig(width=32, heads=2)), init=folder)
    with pytest.raises(JobError, match=r"none of its weights fits this model; both need the same --model\.width"):
        Learner(store.uri, wider)
    (tmp_path / "a,b").mkdir()
    assert sources_of(str(tmp_path / "a,b")) == [str(tmp_path / "a,b")]
    with pytest.raises(ConfigError, match=r"--lr-scale encoders: this model has \w+, "):
        build_model(store, recipe(lr_scale=("encoders=.1",)))
    with pytest.raises(JobError, match=r"--ema 1\.0: must be below 1"):
        Recipe(ema=1.0)
    with pytest.raises(JobError, match="each makes up for rare classes; leave one out"):
        Recipe(loader=LoaderConfig(balance="label"), classes=ClassLossConfig(weights="balanced"))
    assert all(part.startswith("/") for part in Recipe(init="some/where,else").init.split(","))
    assert Recipe(init="models:/a/1,x").init.startswith("models:/a/1,/")
