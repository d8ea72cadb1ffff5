#!/usr/bin/env python
"""Serve: a trained model answers clips over HTTP, on Ray Serve.

    SERVE_TOKEN=secret pipelines/serve.py --model RUN --port 8000
    curl --data-binary @clip.mp4 -H 'Authorization: Bearer secret' 'http://127.0.0.1:8000/predict?name=clip.mp4'

http://127.0.0.1:8000/ is a page to try a clip in, /docs says how to call it, /health whether it answers. The server
runs until it is stopped (Ctrl-C, SIGTERM). Needs the extra [serve].
"""

import asyncio
import importlib.util
import ipaddress
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from features.errors import one_line
from infra.doctor import ray_access, require
from pipelines.answering.clips import ClipAnswerer
from pipelines.common.cli import main, require_at_least
from pipelines.common.cluster import count_slots, own_cluster, start_ray
from pipelines.common.errors import JobError
from pipelines.training.trained import TrainedModel, open_model

TOKEN = "SERVE_TOKEN"  # a variable and no option: options stand in every list of processes
ATTEMPTS = 4  # replicas that one request may cost


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
    batch: int = 8
    """requests that may share a forward pass, those that arrive while one runs; 1 = each passes alone, so that its
    answer has the same bits whatever comes at the same time (else they agree to 1e-5)"""
    weights: str = ""
    """for a model on ResNet-18's vectors: the weights file that its store was made with"""

    def __post_init__(self) -> None:
        least = {"port": 1, "replicas": 1, "gpus_per_replica": 0, "max_mb": 1e-3, "timeout": 0.1, "memory_gb": 0.1}
        require_at_least(self, {**least, "queue": 1, "batch": 1})
        if not os.environ.get(TOKEN) and not is_loopback(self.host):
            raise JobError(f"--host {self.host} is reached by other machines: set {TOKEN} to what requests must send")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve_model(config: ServeConfig) -> None:
    """The job: check the model and the port, start the replicas, answer until it is stopped."""
    if importlib.util.find_spec("grpc_reflection") is None:
        raise JobError("pipelines/serve.py needs Ray Serve: pip install 'clcr-pipeline[serve]'")
    trained, places = open_model("--model", config.model), dict.fromkeys(("video", "audio", "image"), config.weights)
    ClipAnswerer(trained, places=places)  # what its store holds can be made of new clips
    require(ray_access())
    with listen(config) as listener:
        start_ray()
        with running_replicas(config, trained, places) as replicas:
            answer_requests(config, trained, replicas, listener)


def answer_requests(config: ServeConfig, trained: TrainedModel, replicas: Any, listener: socket.socket) -> None:
    """Answer HTTP by the replicas until the job is stopped; requests under way are then answered first."""
    import uvicorn

    from pipelines.answering.service import Limits, make_app

    limits = Limits(
        max_mb=config.max_mb,
        timeout=config.timeout,
        token=os.environ.get(TOKEN, ""),
        at_once=config.replicas * ongoing(shared_by(config, trained)),
        queue=config.queue,
        patience=config.timeout * (2 + config.queue / config.replicas),  # of a request at the end of the queue
    )
    app = make_app(trained, retry_dead(replicas, limits.patience), limits)
    seconds = math.ceil(config.timeout) + 5
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=seconds))
    print(f"serving {config.model} at http://{config.host}:{config.port}: /, /docs, /health, /predict", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # the server stops by it; until here it just ends the job
    server.run(sockets=[listener])


def listen(config: ServeConfig) -> socket.socket:
    """The socket to answer on. Raises JobError where the address is taken, or none of this machine's."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise JobError(f"--host {config.host} --port {config.port}: {one_line(error)}") from error


def shared_by(config: ServeConfig, trained: TrainedModel) -> int:
    """How many requests may share a forward pass."""
    if config.batch > 1 and trained.model.config.mm_orient.reference == "batch":
        print("each request passes the model alone: this one compares the clips of a batch with each other", flush=True)
        return 1
    return config.batch


def ongoing(batch: int) -> int:
    """Requests that a replica has at a time: one decodes, others arrive, others pass the model."""
    return 3 + batch


@contextmanager
def running_replicas(config: ServeConfig, trained: TrainedModel, places: Mapping[str, str]) -> Iterator[Any]:
    """Serve's handle to the replicas, once all are there; they end with the block, and no other job's do.

    Raises JobError where the cluster has no room for them.
    """
    from ray import serve

    from pipelines.answering.replica import Replica

    need = {"CPU": 1, "GPU": config.gpus_per_replica}
    if count_slots(need) < config.replicas:
        raise JobError(f"--replicas {config.replicas}: the cluster has room for {count_slots(need)}")
    device, batch = "cuda" if config.gpus_per_replica else "cpu", shared_by(config, trained)
    name = f"clips-{uuid4().hex[:8]}"  # Serve would take one of the same name for a new version of it
    deployment: Any = serve.deployment(Replica)  # mypy does not see what the decorators of a class return
    service = deployment.options(
        name=name,
        num_replicas=config.replicas,
        max_ongoing_requests=ongoing(batch),
        health_check_period_s=5,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
    )
    serve.start(proxy_location="Disabled")  # this job answers HTTP itself: so it can ask again where a replica died
    bound = service.bind(trained, config.timeout, config.memory_gb, places, device, batch)
    try:
        yield serve.run(bound, name=name, route_prefix=None)
    finally:
        if own_cluster():
            serve.shutdown()
        else:
            serve.delete(name)


def retry_dead(replicas: Any, patience: float) -> Callable[..., Awaitable[Any]]:
    """Gives a request to a replica, and to another one where it dies.

    patience: seconds until it gives up. The function that it returns takes a method's name and its arguments, and
    raises HTTPException 503 where no replica answers.
    """
    from fastapi import HTTPException
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RayServeException

    from pipelines.answering.service import RETRY_AFTER

    async def ask(method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(patience):
                for _ in range(ATTEMPTS):
                    with suppress(RayActorError):
                        return await getattr(replicas, method).remote(*arguments)
                raise HTTPException(503, f"{ATTEMPTS} replicas died while they had this request", RETRY_AFTER)
        except TimeoutError:
            raise HTTPException(503, f"no answer within {patience:g} s", RETRY_AFTER) from None
        except RayServeException as error:
            raise HTTPException(503, one_line(error), RETRY_AFTER) from error

    return ask


if __name__ == "__main__":
    main(serve_model, ServeConfig, "A trained model answers clips over HTTP.")
