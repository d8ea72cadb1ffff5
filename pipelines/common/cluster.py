"""The Ray that a job runs on: the cluster that it was submitted to, or one of its own on this machine."""

import json
import logging
import math
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from features.errors import one_line
from pipelines.common.cli import submitted, take_signals
from pipelines.common.compat import cluster_refuses
from pipelines.common.errors import JobError

# A node ends itself when its agent takes 15 s to start (Ray's issue 65983), which happens on a busy machine with cold
# files; the second time they are warm. What the first one started ends with our process.
# Called with what starts one: retry_start(ray.init, address="local").
retry_start = Retrying(
    retry=retry_if_exception_message(match=".*node timed out during startup"),
    stop=stop_after_attempt(3),
    reraise=True,
)


# Of a driver's environment: what MLflow and the artifacts' and stores' object storage need to let a worker in.
FORWARDED = ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_APPLICATION_CREDENTIALS", "DATABRICKS_")
_started_own = False


def start_ray(dashboard: bool = False, **options: Any) -> None:
    """Join the cluster that runs this job, or start a Ray of our own on this machine; options: those of `ray.init`.

    dashboard: whether a Ray of our own has one, which takes seconds to start. Workers of a cluster that is joined get
    the driver's MLFLOW_* variables and credentials: it was started without.
    """
    global _started_own
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # a job prints its own progress
    if ray.is_initialized():
        return
    if not sys.stdout.isatty():  # in a file or a pipe, colours are noise
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # A bare ray.init() can join some other cluster that happens to be alive on this machine.
    address = options.pop("address", None) or os.environ.get("RAY_ADDRESS") or ("auto" if submitted() else "local")
    if address != "local":
        _require_answer(address)
        options = {"runtime_env": {"env_vars": forwarded_variables(address)}} | options
    if address == "local":
        options.setdefault("include_dashboard", dashboard)
    if address == "local" and "_temp_dir" not in options and (folder := short_ray_folder()):
        options["_temp_dir"] = folder
    started = {"address": address, "log_to_driver": True, "logging_level": "warning"} | options
    try:
        retry_start(ray.init, **started)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == "local":
            raise
        raise JobError(f"the Ray cluster at {address} cannot be joined: {one_line(error)}") from error
    _started_own = address == "local"
    take_signals()


def own_cluster() -> bool:
    """Whether the Ray that runs is this job's own, and ends with it."""
    return _started_own


def forwarded_variables(address: str) -> dict[str, str]:
    """Variables that workers of a joined cluster get of this process; those that came with the job they have."""
    has = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {}).get("env_vars", {})
    found = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    if ":" in address:  # of several clusters on one machine Ray's own helpers would ask any
        found.setdefault("RAY_ADDRESS", address)
    return {name: value for name, value in found.items() if name not in has}


def short_ray_folder() -> str | None:
    """A folder for Ray's files where TMPDIR or RAY_TMPDIR is too long for the sockets in it; None where it is not."""
    from infra.doctor import SHORT_FOLDER, ray_folder

    if (check := ray_folder()).ok:
        return None
    print(f"note: {check.found}; Ray's files go to {SHORT_FOLDER}", flush=True)
    return SHORT_FOLDER


def count_slots(need: Mapping[str, float]) -> int:
    """How many processes with these resources (CPU, GPU; 0 = none) the cluster's nodes hold, each on one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(math.floor(node.get(name, 0) / n + 1e-6) for name, n in need.items() if n) for node in nodes)


def processes_for(parts: int, concurrency: int, gpus_each: float) -> tuple[int, float]:
    """How many processes answer so many parts (concurrency: 0 = all room), and GPUs of each: 0 where there are none.

    Raises JobError where no node has room for one.
    """
    import ray

    gpus = gpus_each if ray.cluster_resources().get("GPU", 0) else 0
    if not (most := count_slots({"CPU": 1, "GPU": gpus})):
        raise JobError(f"--gpus-per-process {gpus:g}: no node has room for such a process")
    return min(concurrency or most, most, parts), gpus


def cpus_for(processes: int, need: Mapping[str, float]) -> int:
    """The most CPUs that each of so many processes can have on top of its other needs; 1 where there is no room."""
    import ray

    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return next((n for n in range(largest, 1, -1) if count_slots({**need, "CPU": n}) >= processes), 1)


def _require_answer(address: str) -> None:
    """Raise JobError, within seconds, where no cluster can be at an address; Ray would wait for one in silence."""
    what = f"RAY_ADDRESS={address}"
    if address.startswith("http"):
        raise JobError(f"{what} takes `ray job submit`s; to start the job from here give host:port")
    if address.startswith("ray://"):
        raise JobError(f"{what}: jobs do not run through Ray Client; give the head's host:port, or use ray job submit")
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise JobError(f"{what}: give the head's host:port, such as {host or address}:6379")
    advice = "start it, or unset RAY_ADDRESS and the job starts a Ray of its own here"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise JobError(f"no Ray cluster answers at {what} ({error}): {advice}") from None
    _require_gcs(host, port, what)


def _require_gcs(host: str, port: str, what: str) -> None:
    """Raise JobError where what listens is no Ray, or wants a token that is not here."""
    if problem := cluster_refuses(f"{host}:{port}"):
        raise JobError(f"the Ray cluster at {what} refuses this job: {problem}")
