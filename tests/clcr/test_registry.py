"""Building models by name, and the folder a trained model lives in."""

import subprocess
import sys

import pytest
import torch

import clcr
from clcr.errors import ClcrError, ConfigError
from clcr.registry import MODELS


def test_statistics_come_from_training_data_and_change_the_model(make):
    batch, model = make.batch(), make.model().eval()
    before = model(batch).logits["word"]
    model.fit_statistics([batch])
    assert not torch.allclose(model(batch).logits["word"], before)


def test_an_unknown_model_is_named_beside_those_there_are(make):
    with pytest.raises(ConfigError, match=f"'clrc'.*{', '.join(MODELS)}, video, audio"):
        make.model("clrc")


def test_clcr_needs_two_modalities(make):
    with pytest.raises(ConfigError, match="two or more"):
        make.model("clcr", features={"audio": make.features["audio"]})


def test_a_folder_without_a_model_is_a_one_line_error(tmp_path):
    with pytest.raises(ClcrError, match=r"no config\.json and no weights\.safetensors"):
        clcr.load(tmp_path)


def test_importing_clcr_needs_no_cluster_no_tracker_and_no_decoder():
    code = (
        "import clcr, sys; print([m for m in ('ray', 'mlflow', 'decord', 'features', 'pipelines') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
