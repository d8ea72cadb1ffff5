"""Frames to vectors on GPUs: actors that take what frames every decoding process has ready, many clips at a time."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from features.decode.specs import VideoSpec
from features.errors import FeaturesError
from pipelines.common.errors import JobError

PATIENCE = 60  # seconds for an encoder to start, or to answer, before something else is tried
TRIES = 5


class FrameEncoder:
    """ResNet-18 on one device. Clips that wait while it computes go through it together, next."""

    def __init__(self, weights: str) -> None:
        import torch

        from features.decode.image import load_resnet18

        torch.backends.cudnn.allow_tf32 = False  # as exact as on a CPU; decoding, not this, sets the pace
        self.net = load_resnet18(weights).to("cuda" if torch.cuda.is_available() else "cpu")
        self.waiting: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        self.device = asyncio.Lock()

    async def ready(self) -> str:
        """The kind of device that the network is on, once it is loaded."""
        return next(self.net.parameters()).device.type

    async def embed(self, frames: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 to (T, 512) float16; which clips come with it changes no bit.

        On a GPU the last bits are not a CPU's.
        """
        vectors = asyncio.get_running_loop().create_future()
        self.waiting.append((frames, vectors))
        async with self.device:
            if not vectors.done():  # else those before took it along
                await self._embed_waiting()
        return vectors.result()

    async def _embed_waiting(self) -> None:
        from features.decode.image import embed_clips

        clips, vectors = zip(*self.waiting, strict=True)
        self.waiting.clear()
        try:
            embedded: Sequence[np.ndarray | Exception] = await asyncio.to_thread(embed_clips, clips, self.net)
        except Exception as error:
            embedded = [error] * len(clips)  # to each who waits
        for future, outcome in zip(vectors, embedded, strict=True):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


@dataclass(frozen=True)
class OnGpus:
    """Encoders that share the work."""

    encoders: list[ray.actor.ActorHandle[Any]]

    def __call__(self, frames: np.ndarray) -> Callable[[], np.ndarray]:
        """Hand frames to one of them; what this returns waits for their vectors. Both raise FeaturesError."""
        with _one_line("ResNet-18 on a GPU", FeaturesError):
            held, turns = ray.put(frames), cycle(random.sample(self.encoders, len(self.encoders)))
            asked = [next(turns).embed.remote(held)]

        def wait() -> np.ndarray:
            with _one_line("ResNet-18 on a GPU", FeaturesError):
                while not (ready := ray.wait(asked, timeout=PATIENCE)[0]):  # that host may be lost for good
                    if len(asked) == TRIES:
                        raise FeaturesError(f"ResNet-18 on a GPU: no answer for {TRIES * PATIENCE} s")
                    asked.append(next(turns).embed.remote(held))
                return ray.get(ready[0])

        return wait


@contextmanager
def encoders_on_gpus(spec: VideoSpec | None, gpus: int, workers: int) -> Iterator[OnGpus | None]:
    """An encoder on each of so many GPUs, for so many workers; None where frames need no network, or no GPU is.

    gpus: -1 takes those that are free, one for a worker at most. Raises JobError where the cluster has fewer, or an
    encoder does not start.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpus > there:
        raise JobError(f"--gpus {gpus}: the cluster has {there}; 0 runs ResNet-18 in the decoding processes")
    count = min(there, workers) if gpus < 0 else gpus
    if spec is None or spec.encoder != "resnet18" or not count:
        yield None
        return
    # One that dies starts anew, and its callers never know.
    actor: Any = ray.remote(num_cpus=0, num_gpus=1, max_restarts=-1, max_task_retries=-1)(FrameEncoder)
    encoders = [actor.remote(spec.weights) for _ in range(count)]
    try:
        started = _started(encoders, all_of_them=gpus > 0)
        print(f"ResNet-18 on {len(started)} GPUs" if started else "ResNet-18 in the decoding processes", flush=True)
        yield OnGpus(started) if started else None
    finally:
        _kill(encoders)  # Ray Data's plan still refers to them, and would keep the GPUs


def _started(encoders: list[ray.actor.ActorHandle[Any]], all_of_them: bool) -> list[ray.actor.ActorHandle[Any]]:
    """Those that run: all, however long that takes, or those that get a GPU soon that torch can use."""
    devices: dict[Any, ray.actor.ActorHandle[Any]] = {encoder.ready.remote(): encoder for encoder in encoders}
    soon, late = ray.wait(list(devices), num_returns=len(devices), timeout=PATIENCE)
    if late and all_of_them:
        print(f"waiting for {len(late)} GPUs, which others seem to hold", flush=True)
        soon, late = list(devices), []
    with _one_line("ResNet-18 does not start on a GPU", JobError):
        found = dict(zip(soon, ray.get(soon), strict=True))
    if "cpu" in found.values():
        print("Ray has a GPU where torch sees none: look at that host's driver", flush=True)
    _kill([devices[ref] for ref in late])
    return [devices[ref] for ref, device in found.items() if all_of_them or device != "cpu"]


def _kill(encoders: list[ray.actor.ActorHandle[Any]]) -> None:
    for encoder in encoders:
        ray.kill(encoder)


@contextmanager
def _one_line(what: str, kind: type[Exception]) -> Iterator[None]:
    """Ray's errors, which hold a whole traceback, as one of this kind with the cause alone."""
    try:
        yield
    except RayError as error:
        raise kind(f"{what}: {str(error).strip().splitlines()[-1]}") from error
