"""Old files keep their meaning: what each version of the code wrote is read by today's, and says the same."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clcr
from clcr.registry import MODELS, build_saved
from clcr.versions import RENAMED
from features.decode.audio import encode_audio
from features.decode.specs import AudioSpec
from features.store import Store
from features.store.verify import verify
from pipelines.common.cli import flatten, option_types, parse
from pipelines.evaluate import EvaluateConfig
from pipelines.explain import ExplainConfig
from pipelines.export import ExportConfig
from pipelines.extract import ExtractConfig
from pipelines.predict import PredictConfig
from pipelines.serve import ServeConfig
from pipelines.train import TrainConfig
from pipelines.training.learner import Recipe
from pipelines.training.trained import open_model
from tuning.ablate import AblateConfig
from tuning.compare import CompareConfig
from tuning.options import SweepConfig

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from write import FEATURES, TASKS, answers, learn  # noqa: E402

VERSIONS = sorted(path for path in GOLDEN.glob("v*") if path.is_dir())
JOBS = {
    "pipelines/extract.py": ExtractConfig,
    "pipelines/train.py": TrainConfig,
    "pipelines/predict.py": PredictConfig,
    "pipelines/explain.py": ExplainConfig,
    "pipelines/evaluate.py": EvaluateConfig,
    "pipelines/serve.py": ServeConfig,
    "pipelines/export.py": ExportConfig,
    "tuning/sweep.py": SweepConfig,
    "tuning/compare.py": CompareConfig,
    "tuning/ablate.py": AblateConfig,
}
every_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
every_model = pytest.mark.parametrize("architecture", [*MODELS, "video"])


@every_version
@every_model
def test_an_old_model_answers_as_it_did(version, architecture):
    folder = version / "models" / architecture
    said = json.loads((folder / "answers.json").read_text())["logits"]
    for task, logits in answers(clcr.load(folder)).items():
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(said[task]), rtol=1e-4, atol=1e-5)


@every_version
@every_model
def test_an_old_recipe_is_learned_as_it_was(version, architecture):
    """Twenty losses on one thread, to a thousandth: kernels of another CPU round otherwise, and training amplifies."""
    folder = version / "models" / architecture
    wanted = json.loads((folder / "answers.json").read_text())["losses"]
    torch.manual_seed(3)
    model = build_saved(folder)
    assert dict(model.tasks) == TASKS and dict(model.features).items() <= FEATURES.items()
    losses = learn(model)
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)


@every_version
def test_an_old_store_is_read_whole_and_keeps_its_fingerprint(version):
    store = Store(str(version / "store"))
    written = json.loads((version / "store" / "store.json").read_text())
    assert store.spec.fingerprint == written["fingerprint"]
    assert store.counts() == (4, 0)
    problems = []
    verify(store, problems.append)
    assert not problems
    index = store.index("test").to_pylist()
    sample = store.read(index[0]["shard"], index[0]["offset"], index[0]["nbytes"])
    assert sample["video"].shape == (5, 8, 8, 3) and sample["audio"].shape == (20, 8)


@every_version
def test_an_old_run_is_opened_and_its_options_mean_what_they_meant(version):
    trained = open_model("--model", str(version / "run"))
    assert trained.learned.fingerprint == Store(str(version / "store")).spec.fingerprint
    config = parse(TrainConfig, ["--config", str(version / "run" / "config.yaml")])
    assert flatten(config.recipe.network) == flatten(trained.model.config)


@every_version
def test_an_old_sweeps_recipe_is_what_it_was(version):
    recipe = parse(Recipe, ["--config", str(version / "best.yaml")])
    trained = open_model("--model", str(version / "run"))
    assert flatten(recipe.network) == flatten(trained.model.config) | {"budget.start": (0.68, 0.68, 0.68)}


@every_version
def test_sound_becomes_the_same_log_mel(version):
    encoded = encode_audio(str(version / "media" / "tone.wav"), AudioSpec())
    np.testing.assert_allclose(
        encoded.values.astype(np.float32), np.load(version / "log_mel.npy").astype(np.float32), atol=0.02
    )


@every_version
@pytest.mark.parametrize("job", JOBS)
def test_no_option_ever_goes_away(version, job):
    known = {name.replace("_", "-") for name, _ in option_types(JOBS[job])}
    known |= {old for old, new in RENAMED.items() if new in known}
    assert set(json.loads((version / "options.json").read_text())[job]) <= known


def test_an_option_of_an_old_name_is_the_one_of_today():
    for old in (["--model.depth", "2"], ["--model.depth=2"], ["--mult.depth", "2"]):
        assert parse(Recipe, old).network.mult.depth == 2
