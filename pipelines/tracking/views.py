"""Addresses of MLflow's pages that open as people need them: the training view, with scores, best first.

MLflow 3.17 opens in its GenAI mode, where no run is to be seen; every address that a job prints names the mode for
model training, and a tag of the experiment says what it is for. What a table shows (columns, order, filter) is a state
that its *Share* button keeps in a tag of the experiment, under a key which an address names; a job writes such states
too.
"""

import json
import shlex
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from mlflow.tracking import MlflowClient

from infra.head import program

KIND = ("mlflow.experimentKind", "custom_model_development")  # against "genai_development"
MODE = "workflowType=machine_learning"  # of an address; a browser's own is GenAI until somebody switches
SHARED = "mlflow.sharedViewState."
SCORE = "best/score"
RUNS = "runs"  # the key of the view of all runs of an experiment
COLUMNS = ("params.`model`", "params.`seed`", "tags.`tasks`", "tags.`store`")


def open_as_training(client: MlflowClient, experiment_id: str) -> None:
    """Let MLflow open an experiment with its runs, best first; leaves a view alone that is there."""
    tags = client.get_experiment(experiment_id).tags
    for key, value in (KIND, (SHARED + RUNS, view(COLUMNS))):
        if tags.get(key) != value:
            client.set_experiment_tag(experiment_id, key, value)


def view(columns: Sequence[str], metrics: Sequence[str] = (SCORE, "best/test_score"), filter: str = "") -> str:
    """The state of a table of runs: columns as MLflow names them, metrics first, sorted by the first of these."""
    state: dict[str, Any] = {
        "searchFilter": filter,
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "selectedColumns": [*(f"metrics.`{name}`" for name in metrics), *columns],
        "viewMaximized": True,
    }
    return json.dumps(state)


def runs_page(uri: str, experiment_id: str, key: str = RUNS) -> str:
    """Where MLflow shows the runs of an experiment, in the view of that key."""
    return page(uri, runs_path(experiment_id, key))


def runs_path(experiment_id: str, key: str = RUNS) -> str:
    """The path of that page, in the mode for model training."""
    return f"/#/experiments/{experiment_id}/runs?{MODE}&viewStateShareKey={key}"


def comparison_path(run_ids: Sequence[str], experiment_id: str) -> str:
    """The path of MLflow's comparison of some runs."""
    runs, experiments = quote(json.dumps(list(run_ids))), quote(json.dumps([experiment_id]))
    return f"/#/compare-runs?runs={runs}&experiments={experiments}&{MODE}"


def page(uri: str, path: str) -> str:
    """A page of a tracking server: its address, or of an embedded file the command that serves it, and on a line of its
    own the address."""
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}{path}"
    command = shlex.join([program("mlflow"), "ui", "--backend-store-uri", uri])
    return f"{command}\n  then open  http://127.0.0.1:5000{path}"
