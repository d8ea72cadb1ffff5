"""A space that the user writes: what it draws, what it refuses and where, and which searches it allows."""

import re
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import create_study

from clcr.config import CLCRConfig, ModelConfig
from pipelines.common.errors import JobError
from pipelines.training.learner import Recipe
from tuning.dry_run import first_points
from tuning.options import SweepConfig
from tuning.samplers import sampler
from tuning.space import apply, holds, values_of
from tuning.space_file import keep_space, read_space
from tuning.study import draw

SPACE = """
budget.scale: {low: 1, high: 8, when: {model.exchange: budgeted}}
lr: {low: 1e-4, high: 1e-2, log: true}
model.exchange: {choices: [budgeted, dense, none]}
model.levels: {low: 2, high: 4}
budget.start.3: {low: 0.2, high: 0.9, step: 0.1, when: {model.levels: {low: 4}, model.exchange: [budgeted]}}
budget.start: {choices: ["0.4", "0.9"], when: {model.levels: [2, 3]}}
stem.motion: {choices: [null, true, false]}
model: {choices: [clcr, concat]}
"""


def written(folder, text, **options):
    (folder / "space.yaml").write_text(text)
    return SweepConfig(store="s", out="o", space=str(folder / "space.yaml"), **options)


def test_an_entry_becomes_the_distribution_that_the_options_type_asks_for(tmp_path):
    space = written(tmp_path, SPACE).searched
    assert space["lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert space["model.levels"] == IntDistribution(2, 4)
    assert space["stem.motion"] == CategoricalDistribution([None, True, False])
    assert space["budget.start"] == CategoricalDistribution(["0.4", "0.9"])
    order = list(space)
    assert order.index("model.exchange") < order.index("budget.scale")
    assert order.index("model.levels") < order.index("budget.start.3")


def test_the_space_that_the_readme_shows_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "tuning/README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert list(written(tmp_path, block).searched.when) == ["budget.scale", "budget.start.3"]


def test_whatever_is_drawn_obeys_the_conditions_and_makes_a_recipe(tmp_path):
    space, study = written(tmp_path, SPACE).searched, create_study()
    study.sampler = sampler("random", space, 0, 0)
    seen = set()
    for _ in range(60):
        point = draw(study.ask(), space)
        budgeted, levels = point["model.exchange"] == "budgeted", point["model.levels"]
        assert ("budget.scale" in point) == budgeted
        assert ("budget.start.3" in point) == (budgeted and levels == 4)
        assert ("budget.start" in point) == (levels < 4)
        assert all(holds(space[name], value) for name, value in point.items())
        recipe = apply(Recipe(), point)
        values = values_of(recipe)
        assert recipe.architecture == point["model"] and recipe.network.model.levels == levels
        assert {name: values[name] for name in point if name != "budget.start"} == {
            name: value for name, value in point.items() if name != "budget.start"
        }
        if "budget.start" in point:
            assert recipe.network.budget.start == (float(point["budget.start"]),)
        seen.add(tuple(point))
    assert len(seen) > 3, "several shapes of points are drawn"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: {low: 1, high: 0.1}", r"line 1: lr: low 1.0 is more than high 0.1"),
        ("lr: {low: 0, high: 1, log: true}", "line 1: lr: low 0.0: must be more than 0"),
        ("\nwidth: {choices: [8]}", "line 2: width: no option of the recipe; did you mean model.width"),
        ("workers: {low: 1, high: 2}", "line 1: workers: no option of the recipe"),
        ("epochs: {low: 1, high: 2}", "line 1: epochs: must be the same for all trials"),
        ("model.exchange: {choices: [dens]}", "model.exchange: cannot be 'dens'"),
        ("model.exchange: {low: 1, high: 2}", "model.exchange: is no number: give choices"),
        ("model.width: {low: 8.5, high: 16}", "model.width: cannot be 8.5"),
        ("model.null_key: {choices: [1]}", "model.null_key: cannot be 1"),
        ("lr: {low: 1, high: 2, step: 0.1, log: true}", "log and step: give one of them"),
        ("lr: {low: 1, high: 2, choices: [1]}", "choices and high: give one of them"),
        ("lr: {low: 1}", "lr: high is missing"),
        ("lr: {lo: 1, high: 2}", "unknown key lo"),
        ("lr: 0.1", "lr: give low and high, or choices"),
        ("lr: {low: 1, high: 2}\nlr: {low: 1, high: 2}", "line 2: lr: named a second time"),
        ("lr: {low: 1, high: 2, when: {seed: 1}}", "line 1: lr: when: seed is not searched"),
        ("seed: {low: 0, high: 3}\nlr: {low: 1, high: 2, when: {seed: 5}}", "line 2: lr: when: seed is never 5"),
        ("seed: {low: 0, high: 3}\nlr: {low: 1, high: 2, when: {seed: {low: 4}}}", "line 2: lr: when: seed is never"),
        (
            "seed: {low: 0, high: 3, when: {warmup: 0.5}}\nwarmup: {choices: [0.5], when: {seed: 1}}",
            "conditions in a circle: ",
        ),
        ("budget.start.a: {low: 0.1, high: 0.2}", "name a level, such as budget.start.0"),
        ("- lr", "expected lines such as"),
        ("lr: {", "not YAML"),
    ],
)
def test_what_is_no_space_is_refused_with_its_line_and_option(text, message, tmp_path):
    with pytest.raises(JobError, match=message) as refused:
        written(tmp_path, text)
    assert str(tmp_path / "space.yaml") in str(refused.value) and "\n" not in str(refused.value)


NUMBERS = "lr: {low: 1e-4, high: 1e-2, log: true}\nwarmup: {low: 0, high: 0.5}\n"
CONDITION = "seed: {low: 0, high: 1}\nlr: {low: 1e-4, high: 1e-2, when: {seed: 1}}\n"
THREE = ("score", "participation", "perf/epoch_s:min")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (CONDITION, {"sampler": "gp"}, "--sampler gp: cannot search lr, which has a condition"),
        (CONDITION, {"sampler": "cmaes"}, "--sampler cmaes: cannot search lr"),
        (
            NUMBERS,
            {"sampler": "cmaes", "objectives": THREE},
            "--sampler cmaes: has one objective, --objectives names 3",
        ),
        (NUMBERS + "seed: {choices: [0, 1]}", {"sampler": "cmaes"}, "--sampler cmaes: .* seed has choices"),
        ("lr: {low: 1e-4, high: 1}", {"sampler": "cmaes"}, "--sampler cmaes: searches two options or more"),
        (NUMBERS, {"sampler": "grid"}, "--sampler grid: lr needs choices, or a step"),
        (NUMBERS, {"scheduler": "asha", "objectives": THREE}, "--scheduler asha: .* --objectives names 3; take none"),
        (NUMBERS, {"search": ("lr",)}, "--search lr: --space .* names what is searched"),
        ("mult.depth: {low: 2, high: 4}", {}, "mult.depth: clcr does not read it"),
        ("budget.gamma: {low: 1, high: 2}", {"recipe": Recipe(architecture="concat")}, "concat does not read it"),
        (NUMBERS, {"sampler": "nsga2", "warm_start": ("o",)}, "--sampler nsga2 learns nothing of it; take tpe or gp"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_by_name(text, options, message, tmp_path):
    with pytest.raises(JobError, match=message):
        written(tmp_path, text, **options)


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "nsga2", "random"])
def test_every_sampler_searches_and_the_same_seed_gives_the_same_points(name, tmp_path):
    space = written(tmp_path, NUMBERS, sampler=name).searched

    def points(seed):
        study = create_study(direction="maximize", sampler=sampler(name, space, seed, trials=8))
        found = []
        for _ in range(8):
            trial = study.ask()
            found.append(draw(trial, space))
            study.tell(trial, -abs(found[-1]["warmup"] - 0.2))
        return found

    first = points(0)
    assert first == points(0) != points(1)
    assert len({point["lr"] for point in first}) >= 6


def test_a_grid_is_every_point_once_whatever_its_conditions_and_then_ends(tmp_path):
    text = """
model.exchange: {choices: [budgeted, dense]}
budget.scale: {low: 1, high: 2, step: 0.5, when: {model.exchange: budgeted}}
model.levels: {low: 2, high: 3}
"""
    config = written(tmp_path, text, sampler="grid", trials=20)
    assert config.limit == (3 + 1) * 2 and written(tmp_path, text, sampler="grid", trials=5).limit == 5
    study = create_study(direction="maximize", sampler=sampler("grid", config.searched, 0, config.limit))
    drawn = []
    for _ in range(config.limit):
        trial = study.ask()
        drawn.append(draw(trial, config.searched))
        study.tell(trial, 0.0)
    assert {tuple(sorted(p.items())) for p in drawn} == {tuple(sorted(p.items())) for p in config.searched.points()}


def test_the_recipe_as_given_is_tried_first_where_the_space_holds_it(tmp_path):
    inside = written(tmp_path, SPACE)
    given = {"model.exchange": "budgeted", "model.levels": 3, "budget.scale": 1.0, "model": "clcr", "stem.motion": None}
    (tmp_path / "other.yaml").write_text(NUMBERS)
    assert written(tmp_path, SPACE).first_points == [], "budget.start 0.68 is none of the choices"
    inside = written(tmp_path, SPACE.replace('"0.4"', '"0.68"'), recipe=Recipe(CLCRConfig(model=ModelConfig(levels=3))))
    (point,) = inside.first_points
    assert point.items() >= given.items() and apply(inside.recipe, point) == inside.recipe
    assert written(tmp_path, "lr: {low: 0.1, high: 1}").first_points == []


def test_a_dry_run_prints_the_space_and_the_points_that_the_sweep_then_tries(tmp_path):
    config = written(tmp_path, SPACE, sampler="nsga2", objectives=THREE, trials=9)
    points = list(first_points(config))
    study = create_study(directions=["maximize", "minimize", "minimize"])
    study.sampler = sampler("nsga2", config.searched, 0, 9)
    assert len(points) == 5 and points == [draw(study.ask(), config.searched) for _ in range(5)]


def test_a_sweep_is_resumed_with_the_space_that_it_was_begun_with(tmp_path):
    written(tmp_path, NUMBERS)
    path, out = str(tmp_path / "space.yaml"), str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    keep_space(out, path, fresh=True)
    (tmp_path / "space.yaml").write_text("# a remark\n" + NUMBERS)
    keep_space(out, path, fresh=False)
    assert read_space(f"{out}/space.yaml") == read_space(path)
    (tmp_path / "space.yaml").write_text(NUMBERS.replace("0.5", "0.4"))
    with pytest.raises(JobError, match=r"was begun with another one \(warmup differs\)"):
        keep_space(out, path, fresh=False)
    with pytest.raises(JobError, match=r"--space none: .* \(lr differs\)"):
        keep_space(out, "", fresh=False)
