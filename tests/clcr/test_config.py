"""Options: wrong ones are refused in one line that names the flag."""

import dataclasses
import json

import pytest

import clcr
from clcr.config import BudgetConfig, LossConfig, ModelConfig, MulTConfig, StemConfig
from clcr.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: ModelConfig(levels=6), "--model.levels 6"),
        (lambda: ModelConfig(heads=0), "--model.heads 0"),
        (lambda: ModelConfig(untimed="near"), "--model.untimed near"),
        (lambda: MulTConfig(depth=0), "--mult.depth 0"),
        (lambda: ModelConfig(shared_width=100, private_width=100), "--model.shared-width 100"),
        (lambda: ModelConfig(pooling="max"), "--model.pooling max"),
        (lambda: ModelConfig(hierarchy="flat"), "--model.hierarchy flat"),
        (lambda: ModelConfig(exchange="full"), "--model.exchange full"),
        (lambda: ModelConfig(aggregation="max"), "--model.aggregation max"),
        (lambda: BudgetConfig(kind="free"), "--budget.kind free"),
        (lambda: LossConfig(mix=-1), "--loss.mix -1"),
        (lambda: ModelConfig(dropout=1.0), "--model.dropout 1.0"),
        (lambda: StemConfig(video="vit"), "--stem.video vit"),
        (lambda: StemConfig(layers="all"), "--stem.layers all"),
        (lambda: BudgetConfig(start=(1.0,)), "--budget.start"),
        (lambda: BudgetConfig(gamma=0), "--budget.gamma 0"),
        (lambda: LossConfig(lambda_intra=-1), "--loss.lambda-intra -1"),
        (lambda: LossConfig(correlation="mi"), "--loss.correlation mi"),
        (lambda: clcr.CLCRConfig(budget=BudgetConfig(start=(0.5, 0.6))), "--model.levels 3"),
        (lambda: clcr.CLCRConfig.from_dict({"model": {"thickness": 3}}), "--model.thickness"),
        (lambda: clcr.CLCRConfig.from_dict({"models": {}}), "--models"),
    ],
)
def test_a_wrong_option_is_named(make, flag):
    with pytest.raises(ConfigError) as error:
        make()
    assert flag in str(error.value) and "\n" not in str(error.value)


def test_a_config_survives_json():
    config = clcr.CLCRConfig(ModelConfig(width=64, levels=2), budget=BudgetConfig(start=(0.5, 0.7)))
    assert clcr.CLCRConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_heads_divide_what_is_exchanged_and_bind_no_model_that_exchanges_nothing(make):
    with pytest.raises(ConfigError, match=r"--model.heads 4: must divide the exchange's 18 dimensions"):
        make.model(width=36, heads=4)
    for name, options in (("clcr", {"space": "lifted"}), ("clcr", {"exchange": "none"}), ("concat", {})):
        make.model(name, width=36, heads=4, **options)
