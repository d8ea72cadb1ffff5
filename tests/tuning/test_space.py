from dataclasses import replace

import pytest
from optuna.distributions import CategoricalDistribution

from clcr.config import BudgetConfig, CLCRConfig, LossConfig, ModelConfig
from clcr.training import OptimConfig
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.space import apply, defaults, holds, space

SHARED = {"lr", "weight_decay", "model.dropout", "model.width"}


def test_the_defaults_are_a_point_of_the_space_and_give_the_recipe_back():
    recipe = Recipe(network=CLCRConfig(budget=BudgetConfig(start=(0.5, 0.6, 0.7))))
    point = defaults(recipe)
    assert point.keys() == space(recipe).keys()
    assert all(holds(d, point[name]) for name, d in space(recipe).items())
    assert apply(recipe, point) == recipe


def test_a_point_changes_budgets_per_level_loss_weights_and_size():
    point = defaults(Recipe()) | {"budget.start.1": 0.3, "loss.mix": 0.5, "lr": 1e-3, "model.width": 64}
    changed = apply(Recipe(), point)
    assert changed.network.budget.start == (0.68, 0.3, 0.68)
    assert changed.network.loss.mix == 0.5 and changed.optim.lr == 1e-3 and changed.network.model.width == 64


def test_budgets_stay_in_the_order_of_their_levels_whatever_the_order_of_the_point():
    point = {"budget.start.2": 0.3, "budget.start.0": 0.1}
    assert apply(Recipe(), point).network.budget.start == (0.1, 0.68, 0.3)


def test_a_baseline_is_searched_over_what_it_shares_with_clcr_and_what_is_its_own():
    assert set(space(replace(Recipe(), architecture="concat"))) == SHARED
    assert set(space(replace(Recipe(), architecture="mult"))) == SHARED | {"mult.depth"}
    assert {"budget.start.0", "budget.start.2", "budget.scale", "loss.lambda_inter", "loss.pr"} <= set(space(Recipe()))


def test_what_the_recipe_switches_off_is_not_searched():
    assert not any(
        n.startswith("budget") for n in space(Recipe(network=CLCRConfig(model=ModelConfig(exchange="dense"))))
    )
    off = space(Recipe(network=CLCRConfig(loss=LossConfig(lambda_inter=0.0))))
    assert "loss.lambda_intra" in off and not {"loss.lambda_inter", "loss.pr", "loss.sp", "loss.mix"} & set(off)
    assert "loss.sp" not in space(Recipe(network=CLCRConfig(loss=LossConfig(sp=0.0))))


def test_the_space_grows_to_hold_the_recipes_own_value():
    wide = space(Recipe(optim=OptimConfig(lr=0.05)))["lr"]
    assert (wide.low, wide.high, wide.log) == (5e-4, 0.05, True)


@pytest.mark.parametrize(("width", "heads", "expected"), [(128, 4, (64, 128, 256)), (16, 8, (16, 32))])
def test_widths_are_half_as_given_and_double_where_the_heads_divide_them(width, heads, expected):
    recipe = Recipe(network=CLCRConfig(model=ModelConfig(width=width, heads=heads)))
    assert space(recipe)["model.width"] == CategoricalDistribution(expected)
    for choice in expected:
        apply(recipe, {"model.width": choice})


def test_a_search_can_be_narrowed_to_options_or_groups():
    assert set(space(Recipe(), ("budget", "lr"))) == {n for n in space(Recipe()) if n.startswith("budget.")} | {"lr"}
    assert set(defaults(Recipe(), ("budget.start.1", "weight-decay"))) == {"budget.start.1", "weight_decay"}
    with pytest.raises(JobError, match=r"--search loss\.pe: clcr has"):
        space(Recipe(), ("loss.pe",))
