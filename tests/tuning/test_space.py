from dataclasses import replace

from clcr.config import BudgetConfig
from pipelines.train import Recipe
from tuning.space import apply, defaults, space


def test_the_defaults_are_a_point_of_the_space_and_give_the_recipe_back():
    recipe = Recipe(budget=BudgetConfig(start=(0.5, 0.6, 0.7)))
    point = defaults(recipe)
    assert point.keys() == space(recipe).keys()
    assert all(space(recipe)[name]._contains(value) for name, value in point.items())
    assert apply(recipe, point) == recipe


def test_a_point_changes_budgets_per_level_and_loss_weights():
    point = defaults(Recipe()) | {"budget.start.1": 0.3, "loss.lambda_intra": 0.5, "lr": 1e-3}
    changed = apply(Recipe(), point)
    assert changed.budget.start == (0.68, 0.3, 0.68)
    assert changed.loss.lambda_intra == 0.5 and changed.optim.lr == 1e-3


def test_a_baseline_is_searched_over_what_it_shares_with_clcr():
    assert set(space(replace(Recipe(), architecture="concat"))) == {"lr", "weight_decay", "model.dropout"}
    assert {"budget.start.0", "budget.start.2", "budget.scale", "loss.lambda_inter"} <= set(space(Recipe()))
