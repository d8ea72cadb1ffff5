"""Frames to vectors on GPUs: actors that take what frames every decoding process has ready, many clips at a time."""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import ray
from ray.exceptions import RayError

from features.errors import FeaturesError, one_line
from features.specs import VideoSpec
from pipelines.cli import JobError

PATIENCE = 30  # seconds after which a job says what it waits for


class FrameEncoder:
    """ResNet-18 on one device. Clips that wait while it computes go through it together, next."""

    def __init__(self, weights: str) -> None:
        import torch

        from features.image import load_resnet18

        torch.backends.cudnn.allow_tf32 = False  # as exact as on a CPU; decoding, not this, sets the pace
        self.net = load_resnet18(weights).to("cuda" if torch.cuda.is_available() else "cpu")
        self.waiting: list[tuple[np.ndarray, asyncio.Future]] = []
        self.device = asyncio.Lock()

    async def ready(self) -> None:
        """Return once the network is loaded."""

    async def embed(self, frames: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 to (T, 512) float16; which clips come with it changes no bit."""
        vectors = asyncio.get_running_loop().create_future()
        self.waiting.append((frames, vectors))
        async with self.device:
            if not vectors.done():  # else those before took it along
                await self._embed_waiting()
        return vectors.result()

    async def _embed_waiting(self) -> None:
        from features.image import embed_clips

        clips, vectors = zip(*self.waiting, strict=True)
        self.waiting.clear()
        try:
            embedded = await asyncio.to_thread(embed_clips, clips, self.net)
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

    encoders: list[ray.actor.ActorHandle]

    def __call__(self, frames: np.ndarray) -> Callable[[], np.ndarray]:
        """Hand frames to one of them; what this returns waits for their vectors, or raises FeaturesError."""
        vectors = random.choice(self.encoders).embed.remote(frames)

        def wait() -> np.ndarray:
            try:
                return ray.get(vectors)
            except RayError as error:
                raise FeaturesError(f"ResNet-18 on a GPU: {one_line(error)}") from error

        return wait


@contextmanager
def encoders_on_gpus(spec: VideoSpec | None, gpus: int) -> Iterator[OnGpus | None]:
    """An encoder on each of so many GPUs (-1: all of the cluster's); None where frames need no network, or no GPU is.

    Raises JobError where the cluster has fewer, or an encoder does not start.
    """
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpus > there:
        raise JobError(f"--gpus {gpus}: the cluster has {there}; 0 runs ResNet-18 in the decoding processes")
    count = there if gpus < 0 else gpus
    if spec is None or spec.encoder != "resnet18" or not count:
        yield None
        return
    print(f"ResNet-18 on {count} of {there} GPUs", flush=True)
    # One that dies starts anew, and its callers never know.
    actor = ray.remote(num_cpus=0, num_gpus=1, max_restarts=-1, max_task_retries=-1)(FrameEncoder)
    encoders = [actor.remote(spec.weights) for _ in range(count)]
    try:
        _wait_for(encoders)
        yield OnGpus(encoders)
    finally:
        for encoder in encoders:  # Ray Data's plan still refers to them, and would keep the GPUs
            ray.kill(encoder)


def _wait_for(encoders: list[ray.actor.ActorHandle]) -> None:
    ready = [encoder.ready.remote() for encoder in encoders]
    if ray.wait(ready, num_returns=len(ready), timeout=PATIENCE)[1]:
        print("waiting for GPUs: others hold them", flush=True)
    try:
        ray.get(ready)
    except RayError as error:
        raise JobError(f"ResNet-18 does not start on a GPU: {one_line(error)}") from error
