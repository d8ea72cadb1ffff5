"""The Ray that a job runs on: the cluster that it was submitted to, or one of its own on this machine."""

import logging
import math
import os
import socket
from collections.abc import Mapping
from typing import Any

from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from pipelines.common.cli import JobError, submitted

# A node ends itself when its agent takes 15 s to start (Ray's issue 65983), which happens on a busy machine with cold
# files; the second time they are warm. What the first one started ends with our process.
# Called with what starts one: retry_start(ray.init, address="local").
retry_start = Retrying(
    retry=retry_if_exception_message(match=".*node timed out during startup"),
    stop=stop_after_attempt(3),
    reraise=True,
)


def start_ray(**options: Any) -> None:
    """Join the cluster that runs this job, or start a Ray of our own on this machine; options: those of `ray.init`."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # a job prints its own progress
    if ray.is_initialized():
        return
    # A bare ray.init() can join some other cluster that happens to be alive on this machine.
    address = options.pop("address", None) or os.environ.get("RAY_ADDRESS") or ("auto" if submitted() else "local")
    _require_answer(address)
    retry_start(ray.init, **{"address": address, "log_to_driver": True, "logging_level": "warning"} | options)


def room(need: Mapping[str, float]) -> int:
    """How many processes with these resources (CPU, GPU; 0 = none) the cluster's nodes hold, each on one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(math.floor(node.get(name, 0) / n + 1e-6) for name, n in need.items() if n) for node in nodes)


def cpus_for(processes: int, need: Mapping[str, float]) -> int:
    """The most CPUs that each of so many processes can have beside the rest of its need; 1 where there is no room."""
    import ray

    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return next((n for n in range(largest, 1, -1) if room({**need, "CPU": n}) >= processes), 1)


def _require_answer(address: str) -> None:
    """Raise JobError where no cluster is at host:port; Ray would wait for one in silence."""
    if address.startswith("http"):
        raise JobError(f"RAY_ADDRESS={address} takes `ray job submit`s; to start the job from here give host:port")
    if "://" in address or ":" not in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        advice = "start it, or unset RAY_ADDRESS and the job starts a Ray of its own here"
        raise JobError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): {advice}") from None
