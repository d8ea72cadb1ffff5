"""A search space that the user writes: `--space space.yaml`, one entry for each option that is searched.

    lr:              {low: 1e-4, high: 1e-2, log: true}
    model.levels:    {low: 2, high: 4}                       # step: 2 for every other one
    model.exchange:  {choices: [budgeted, dense, none]}
    budget.scale:    {low: 1, high: 8, when: {model.exchange: budgeted}}

`when` names other searched options and what they must be: a value, a list of values, or {low: ..., high: ...}. An
option whose condition does not hold is not drawn, and has the value that the recipe gives it.
"""

import types
import typing
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from clcr.versions import RENAMED
from features.files import read_text, write_text
from pipelines.common.errors import JobError
from pipelines.common.hints import hint
from tuning.space import BUDGET_START, OPTION_TYPES, Distribution, Space, convert, holds

# What all trials of a sweep share: their scores could not be compared, nor their epochs.
SHARED = ("epochs", "tasks", "score", "loader.fold")
NAME = "space.yaml"  # the copy in a sweep's folder
NUMBER, CHOICE = {"low", "high", "log", "step"}, {"choices"}


def read_space(path: str) -> Space:
    """The space of a file. Raises JobError naming file, line and option for what is no space of train's options."""
    entries = {}
    for name, entry, line in _entries(path):
        try:
            name = _known(name)
            entries[name] = (_distribution(name, entry), dict(entry.get("when") or {}), line)
        except (JobError, ValueError, TypeError) as error:
            raise JobError(f"--space {path}, line {line}: {name}: {error}") from None
    whens = {}
    for name, (_, when, line) in entries.items():
        try:
            whens[name] = {other: _condition(other, wanted, entries) for other, wanted in when.items()}
        except (JobError, ValueError, TypeError) as error:
            raise JobError(f"--space {path}, line {line}: {name}: {error}") from None
    try:
        order = [*TopologicalSorter(whens).static_order()]
    except CycleError as error:
        raise JobError(f"--space {path}: conditions in a circle: {' needs '.join(error.args[1])}") from None
    return Space({name: entries[name][0] for name in order}, {name: when for name, when in whens.items() if when})


def keep_space(out: str, path: str, fresh: bool) -> None:
    """Copy the file of --space into the sweep's folder; a later start must give the same space.

    path: "" for none. Raises JobError, naming the first option that differs.
    """
    asked = Path(path).read_text() if path else ""
    if fresh:
        return write_text(out, NAME, asked) if path else None
    before, now = (yaml.safe_load(text or "{}") for text in (read_text(out, NAME), asked))
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise JobError(f"--space {path or 'none'}: {out} was begun with another one ({changed[0]} differs)")


def _entries(path: str) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """Option, entry and line number of everything that a file names."""
    try:
        text = Path(path).read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"--space {path}: {getattr(error, 'strerror', error)}; give a YAML file of options") from None
    except yaml.YAMLError as error:
        raise JobError(f"--space {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise JobError(f"--space {path}: expected lines such as `lr: {{low: 1e-4, high: 1e-2, log: true}}`")
    seen = set()
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        entry = yaml.safe_load(yaml.serialize(value))
        if name in seen:
            raise JobError(f"--space {path}, line {line}: {name}: named a second time")
        if not isinstance(entry, dict):
            raise JobError(f"--space {path}, line {line}: {name}: give low and high, or choices")
        seen.add(name)
        yield name, entry, line


def _todays(name: str) -> str:
    """An option of two names, or of an old one, by the name that files have."""
    name = name.replace("-", "_")
    return "model" if name == "architecture" else RENAMED.get(name, name)


def _known(name: str) -> str:
    """An option's name as recipes have it. Raises JobError for one that train does not have."""
    name = _todays(name)
    if name.startswith(f"{BUDGET_START}."):
        if not name.removeprefix(f"{BUDGET_START}.").isdigit():
            raise JobError(f"name a level, such as {BUDGET_START}.0")
        return name
    if name not in OPTION_TYPES:
        raise JobError(f"no option of the recipe{hint(name, OPTION_TYPES)}")
    if name in SHARED:
        raise JobError(f"must be the same for all trials, or they could not be compared: give --{name}")
    return name


def _distribution(name: str, entry: Mapping[str, Any]) -> Distribution:
    """What an entry says. Raises JobError, or ValueError of Optuna's, for what cannot be drawn from."""
    if unknown := sorted(map(str, entry.keys() - NUMBER - CHOICE - {"when"})):
        raise JobError(f"unknown key {unknown[0]}: give low and high (log, step), or choices, and when")
    if not isinstance(entry.get("when") or {}, Mapping):
        raise JobError("when: give searched options and their values, such as {model.exchange: budgeted}")
    if "choices" in entry:
        if also := sorted(entry.keys() & NUMBER):
            raise JobError(f"choices and {also[0]}: give one of them")
        if not isinstance(entry["choices"], list) or not entry["choices"]:
            raise JobError("choices: give a list of values")
        return CategoricalDistribution(list(dict.fromkeys(convert(name, value) for value in entry["choices"])))
    if missing := [key for key in ("low", "high") if entry.get(key) is None]:
        raise JobError(f"{missing[0]} is missing: give low and high, or choices")
    kind = _number(name)
    if kind is None:
        raise JobError("is no number: give choices")
    low, high, log = convert(name, entry["low"]), convert(name, entry["high"]), entry.get("log", False)
    if not isinstance(log, bool):
        raise JobError(f"log is true or false, not {log!r}")
    if low > high:
        raise JobError(f"low {low} is more than high {high}")
    if log and low <= 0:
        raise JobError(f"low {low}: must be more than 0 on a logarithmic scale")
    step = None if entry.get("step") is None else convert(name, entry["step"])
    if step is not None and (log or step <= 0):
        raise JobError("log and step: give one of them" if log else f"step {step}: must be more than 0")
    if kind is int:
        return IntDistribution(low, high - (high - low) % (step or 1), log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


def _number(name: str) -> type | None:
    """int or float where an option is one (or none), else None."""
    kind = OPTION_TYPES.get(name, float)  # budget.start.K
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [inner for inner in typing.get_args(kind) if inner is not type(None)]
    return kind if kind in (int, float) else None


def _condition(other: str, wanted: Any, entries: Mapping[str, tuple[Distribution, Any, int]]) -> Distribution:
    """The values of another searched option under which one is drawn. Raises JobError where it never has them."""
    other = _todays(other)
    if other not in entries:
        raise JobError(f"when: {other} is not searched, so nothing depends on it")
    drawn = entries[other][0]
    if isinstance(wanted, Mapping):
        if wanted.keys() - {"low", "high"} or not wanted or isinstance(drawn, CategoricalDistribution):
            raise JobError(f"when: {other}: give a value, a list of values, or of a number low and high")
        low, high = float(wanted.get("low", drawn.low)), float(wanted.get("high", drawn.high))
        if low > high or high < drawn.low or low > drawn.high:
            raise JobError(f"when: {other} is never from {low:g} to {high:g}, it is searched from {drawn.low:g}")
        return FloatDistribution(low, high)
    values = wanted if isinstance(wanted, list) else [wanted]
    try:
        values = [convert(other, value) for value in values]
    except JobError as error:
        raise JobError(f"when: {other} {error}") from None
    if never := [value for value in values if not holds(drawn, value)]:
        raise JobError(f"when: {other} is never {never[0]}")
    return CategoricalDistribution(values)
