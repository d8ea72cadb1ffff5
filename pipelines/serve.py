#!/usr/bin/env python
"""Serve: a trained model answers clips over HTTP, on Ray Serve.

    SERVE_TOKEN=secret pipelines/serve.py --model RUN --port 8000
    curl --data-binary @clip.mp4 -H 'Authorization: Bearer secret' 'http://127.0.0.1:8000/predict?name=clip.mp4'

http://127.0.0.1:8000/ is a page to try a clip in, /docs says how to call it, /health whether it answers. The server
runs until it is stopped (Ctrl-C, SIGTERM). Needs the extra [serve].
"""

import importlib.util
import ipaddress
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from infra.doctor import ray_access, require
from pipelines.answering.clips import ClipAnswerer
from pipelines.common.cli import main, require_at_least
from pipelines.common.cluster import count_slots, start_ray
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model

TOKEN = "SERVE_TOKEN"  # a variable and no option: options stand in every list of processes


@dataclass(frozen=True)
class ServeConfig:
    """Options of the serve job. The token that requests must send is the environment variable SERVE_TOKEN."""

    model: str
    """--out of a finished pipelines/train.py, its folder `model`, or (with MLFLOW_TRACKING_URI set)
    models:/NAME/VERSION or models:/NAME@ALIAS"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines reach needs SERVE_TOKEN"""
    port: int = 8000
    """port to listen on"""
    replicas: int = 1
    """processes that answer, each with a decoding process of its own"""
    gpus_per_replica: float = 0.0
    """GPUs of each replica; a fraction shares one"""
    max_mb: float = 50.0
    """MB that a posted clip may have"""
    timeout: float = 30.0
    """seconds that decoding one clip may take"""
    memory_gb: float = 2.0
    """GB of memory that decoding one clip may take"""
    queue: int = 64
    """requests that may wait; further ones are refused at once, with status 503"""
    weights: str = ""
    """for a model on ResNet-18's vectors: the weights file that its store was made with"""

    def __post_init__(self) -> None:
        least = {"port": 1, "replicas": 1, "gpus_per_replica": 0, "max_mb": 1e-3, "timeout": 0.1, "memory_gb": 0.1}
        require_at_least(self, {**least, "queue": 1})
        if not os.environ.get(TOKEN) and not is_loopback(self.host):
            raise JobError(f"--host {self.host} is reached by other machines: set {TOKEN} to what requests must send")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve_model(config: ServeConfig) -> None:
    """The job: check the model, start the replicas, say where they listen, wait to be stopped."""
    if importlib.util.find_spec("grpc_reflection") is None:
        raise JobError("pipelines/serve.py needs Ray Serve: pip install 'clcr-pipeline[serve]'")
    trained, places = open_model("--model", config.model), {"video": config.weights, "image": config.weights}
    ClipAnswerer(trained, places=places)  # what its store holds can be made of new clips
    require(ray_access())
    for what in ("READY_CHECK_TIMEOUT_S", "HEALTH_CHECK_TIMEOUT_S"):  # a busy machine is slow, and still there
        os.environ.setdefault(f"RAY_SERVE_PROXY_{what}", "60")
    start_ray()
    from ray import serve

    from pipelines.answering.service import Limits, Service

    need = {"CPU": 1, "GPU": config.gpus_per_replica}
    if count_slots(need) < config.replicas:
        raise JobError(f"--replicas {config.replicas}: the cluster has room for {count_slots(need)}")
    limits = Limits(config.max_mb, config.timeout, config.memory_gb, os.environ.get(TOKEN, ""))
    patience = config.timeout * (2 + config.queue / config.replicas)  # seconds, of a request at the end of the queue
    serve.start(http_options={"host": config.host, "port": config.port, "request_timeout_s": patience})
    deployment: Any = Service  # mypy does not see what the decorators of a class return
    service = deployment.options(
        num_replicas=config.replicas,
        max_ongoing_requests=4,  # one decodes, others arrive and pass the model
        max_queued_requests=config.queue,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
    )
    device = "cuda" if config.gpus_per_replica else "cpu"
    serve.run(service.bind(trained, limits, places, device), name="clips", route_prefix="/")
    print(f"serving {config.model} at http://{config.host}:{config.port}: /, /docs, /health, /predict", flush=True)
    stopped = threading.Event()  # until here SIGTERM just ends the job, and Ray with it
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        stopped.wait()
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main(serve_model, ServeConfig, "A trained model answers clips over HTTP.")
