"""What --help of the jobs that use a model says: every option, in words."""

import re

import pytest

from pipelines.common.cli import option_types, parse
from pipelines.evaluate import EvaluateConfig
from pipelines.export import ExportConfig
from pipelines.predict import PredictConfig
from pipelines.serve import ServeConfig


@pytest.mark.parametrize("config", [EvaluateConfig, ServeConfig, ExportConfig, PredictConfig])
def test_help_names_and_explains_every_option(config, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config, ["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name, _ in option_types(config):
        option = re.search(rf"--{name.replace('_', '-')}[ ,]", said)
        assert option, name
        assert len(said[option.start() :].split("\n│ --")[0]) > 60, name
