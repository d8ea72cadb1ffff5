"""What a sweep optimises: the score, the share of exchanged tokens, or any metric that a trial logs.

Every objective is a number of the epoch whose weights a trial keeps (the best by `val/score`), so all of them describe
the same model. `score` and `participation` are short for the two that CLCR is usually searched for.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pipelines.common.errors import JobError

# MLflow's comparison opens with the metric whose name sorts first, so the score of a trial's best checkpoint has it.
SCORE = "best/score"  # on the validation split
COST = "best/tokens_exchanged"  # share of tokens that this checkpoint exchanges, mean over levels and modalities
GROUPS = ("val/", "diag/", "perf/")  # metrics that may be optimised, by the first part of their names
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {"max": "maximize", "min": "minimize"}


class Objective(NamedTuple):
    """One objective: its metric as a trial reports it, and whether more of it is better."""

    metric: str
    direction: Literal["maximize", "minimize"]

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1

    @property
    def logged(self) -> str:
        """The name of the epoch's metric that it is taken from; "" for the two with a meaning of their own."""
        return "" if self.metric in (SCORE, COST) else self.metric.removeprefix("best/")


BY_SCORE = Objective(SCORE, "maximize")
KNOWN = {"score": BY_SCORE, "val/score:max": BY_SCORE, "participation": Objective(COST, "minimize")}


def read_objectives(texts: Collection[str]) -> list[Objective]:
    """Objectives as `--objectives` names them: score, participation, METRIC:max or METRIC:min.

    Raises JobError for one that is none of these, and for none or the same metric twice.
    """
    objectives = []
    for text in texts:
        metric, _, direction = text.rpartition(":")
        if text in KNOWN:
            objectives.append(KNOWN[text])
        elif metric.startswith(GROUPS) and direction in DIRECTIONS:
            objectives.append(Objective(f"best/{metric}", DIRECTIONS[direction]))
        else:
            raise JobError(
                f"--objectives {text}: choose score, participation, or a metric with its direction, such as "
                "val/score:max, diag/participation/audio:min or perf/epoch_s:min"
            )
    if not objectives or len({objective.metric for objective in objectives}) < len(objectives):
        raise JobError(f"--objectives {','.join(texts)}: name one or more metrics, each once")
    return objectives


def kept(objectives: Iterable[Objective], metrics: Mapping[str, float]) -> dict[str, float]:
    """What an epoch whose weights are kept says of the objectives that are metrics of it.

    Raises JobError for a metric that a trial does not have, naming those that it has.
    """
    values: dict[str, float] = {}
    for objective in objectives:
        if (name := objective.logged) and name not in metrics:
            known = [metric for metric in metrics if metric.startswith(name.partition("/")[0] + "/")]
            raise JobError(f"--objectives {name}: this model reports {', '.join(sorted(known)) or 'no such metric'}")
        if name:
            values[objective.metric] = metrics[name]
    return values


def shown(value: Any) -> str:
    """A searched value or a metric for a table."""
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
