"""Networks in actors that all decoding processes share: on GPUs, else one on each host's CPU; many clips at a time."""

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from features.decode.specs import EncoderSpec
from features.encoders import Asked
from features.errors import FeaturesError, MediaError
from pipelines.common.errors import JobError

PATIENCE = 60  # seconds for a network to start, or to answer, before something else is tried
TRIES = 5
CPU_BATCH = 16  # windows at once on a CPU, where more are no faster, and filling a batch up costs


class NetworkActor:
    """The encoders of some modalities on one device. Clips that wait while it computes go through together, next.

    threads: of torch's on a CPU; 0 leaves them as they are.
    """

    def __init__(self, networks: Mapping[str, Asked], threads: int = 0) -> None:
        import torch

        from features.encoders.registry import find_encoder
        from features.encoders.running import Runner

        torch.backends.cudnn.allow_tf32 = False  # as exact as on a CPU; decoding, not this, sets the pace
        torch.set_num_threads(threads or torch.get_num_threads())
        self.device = "cuda" if torch.cuda.is_available() and not threads else "cpu"
        self.runners = {}
        for modality, asked in networks.items():
            encoder = find_encoder(asked)
            batch = encoder.batch if self.device == "cuda" else min(encoder.batch, CPU_BATCH)
            self.runners[modality] = Runner(encoder, self.device, batch)
        self.waiting: list[tuple[str, np.ndarray, asyncio.Future[np.ndarray]]] = []
        self.lock = asyncio.Lock()

    async def ready(self) -> str:
        """The kind of device that the networks are on, once they are loaded."""
        return self.device

    async def embed(self, modality: str, values: np.ndarray) -> np.ndarray:
        """What was decoded of a clip to its tokens, (T, *shape) float16; which clips come with it changes no bit.

        On a GPU the last bits are not a CPU's.
        """
        tokens = asyncio.get_running_loop().create_future()
        self.waiting.append((modality, values, tokens))
        async with self.lock:
            if not tokens.done():  # else those before took it along
                await self._embed_waiting(modality)
        return tokens.result()

    async def _embed_waiting(self, modality: str) -> None:
        taken = [entry for entry in self.waiting if entry[0] == modality]
        self.waiting = [entry for entry in self.waiting if entry[0] != modality]
        clips = [values for _, values, _ in taken]
        try:
            embedded: Sequence[np.ndarray | Exception]
            embedded = await asyncio.to_thread(self.runners[modality].many, clips)
        except Exception as error:
            embedded = [error] if len(clips) == 1 else [await self._alone(modality, clip) for clip in clips]
        for (_, _, future), outcome in zip(taken, embedded, strict=True):
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    async def _alone(self, modality: str, clip: np.ndarray) -> np.ndarray | Exception:
        """A clip after another one that went with it failed: whose fault it was shows now."""
        try:
            return (await asyncio.to_thread(self.runners[modality].many, [clip]))[0]
        except Exception as error:
            return error


@dataclass(frozen=True)
class SharedNetworks:
    """Actors that share the work. what: for messages; nodes: where each was started, to ask the nearest one first."""

    actors: list[ray.actor.ActorHandle[Any]]
    modalities: tuple[str, ...]
    what: str
    nodes: tuple[str, ...] = ()

    def __call__(self, modality: str, values: np.ndarray) -> Callable[[], np.ndarray]:
        """Hand a clip to one of them; what this returns waits for its tokens.

        Both raise FeaturesError; what the network raises on the clip itself is a MediaError of its modality.
        """
        with _one_line(self.what, FeaturesError):
            shared, turns = ray.put(values), cycle(self._order())
            actor = next(turns)
            asked = [actor.embed.remote(modality, shared)]

        def wait() -> np.ndarray:
            nonlocal actor
            with _one_line(self.what, FeaturesError):
                while not (ready := ray.wait(asked, timeout=PATIENCE)[0]):
                    if ray.wait([actor.ready.remote()], timeout=PATIENCE)[0]:
                        continue  # it is at work, and to be asked again would only make its queue longer
                    if len(asked) == TRIES:  # that host may be lost for good
                        raise FeaturesError(f"{self.what}: no answer for {TRIES * PATIENCE} s")
                    actor = next(turns)
                    asked.append(actor.embed.remote(modality, shared))
                try:
                    return ray.get(ready[0])
                except RayTaskError as error:
                    cause = str(error).strip().splitlines()[-1]
                    raise MediaError(modality, f"{self.what}: {cause}") from error

        return wait

    def _order(self) -> list[ray.actor.ActorHandle[Any]]:
        order = random.sample(range(len(self.actors)), len(self.actors))
        if self.nodes:
            here = ray.get_runtime_context().get_node_id()
            order.sort(key=lambda number: self.nodes[number] != here)
        return [self.actors[number] for number in order]


@contextmanager
def shared_networks(spec: EncoderSpec, gpus: int, workers: int) -> Iterator[SharedNetworks | None]:
    """The networks of a spec on each of so many GPUs, for so many workers; where none is, on the CPU of each host.

    None where there is no network, or ResNet-18 alone and no GPU: there it runs where frames are decoded. gpus: -1
    takes those that are free, one for a worker at most. Raises JobError where the cluster has fewer, or a network does
    not start.
    """
    networks = spec.networks()
    what = " and ".join(sorted({asked.name for asked in networks.values()}))
    there = int(ray.cluster_resources().get("GPU", 0))
    if gpus > there:
        raise JobError(f"--gpus {gpus}: the cluster has {there}; 0 runs networks on CPUs")
    if not networks:
        yield None
        return
    actors: list[ray.actor.ActorHandle[Any]] = []
    try:
        shared = _on_gpus(networks, what, min(there, workers) if gpus < 0 else gpus, gpus > 0, actors)
        on_cpus = {modality: asked for modality, asked in networks.items() if asked.name != "resnet18"}
        if shared is None and on_cpus:
            shared = _on_cpus(on_cpus, what, actors)
        print(shared.what if shared else f"{what} in the decoding processes", flush=True)
        yield shared
    finally:
        _kill(actors)  # Ray Data's plan still refers to them, and would keep the GPUs


def _on_gpus(
    networks: Mapping[str, Asked], what: str, count: int, all_of_them: bool, actors: list[ray.actor.ActorHandle[Any]]
) -> SharedNetworks | None:
    # One that dies starts anew, and its callers never know.
    actor: Any = ray.remote(num_cpus=0, num_gpus=1, max_restarts=-1, max_task_retries=-1)(NetworkActor)
    asked = [actor.remote(networks) for _ in range(count)]
    actors += asked
    started = _started(asked, what, all_of_them) if asked else []
    return SharedNetworks(started, tuple(networks), f"{what} on {len(started)} GPUs") if started else None


def _on_cpus(networks: Mapping[str, Asked], what: str, actors: list[ray.actor.ActorHandle[Any]]) -> SharedNetworks:
    hosts = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    own: list[ray.actor.ActorHandle[Any]] = []
    for host in hosts:
        place = NodeAffinitySchedulingStrategy(host["NodeID"], soft=True)
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(NetworkActor)
        actor = actor.options(scheduling_strategy=place)
        own.append(actor.remote(networks, threads=int(host["Resources"]["CPU"])))
    actors += own
    with _one_line(f"{what} does not start", JobError):
        ray.get([actor.ready.remote() for actor in own])
    nodes = tuple(host["NodeID"] for host in hosts)
    return SharedNetworks(own, tuple(networks), f"{what} on the CPUs of {len(hosts)} hosts", nodes)


def _started(
    encoders: list[ray.actor.ActorHandle[Any]], what: str, all_of_them: bool
) -> list[ray.actor.ActorHandle[Any]]:
    """Those that run: all, however long that takes, or those that get a GPU soon that torch can use."""
    devices: dict[Any, ray.actor.ActorHandle[Any]] = {encoder.ready.remote(): encoder for encoder in encoders}
    soon, late = ray.wait(list(devices), num_returns=len(devices), timeout=PATIENCE)
    if late and all_of_them:
        print(f"waiting for {len(late)} GPUs, which others seem to hold", flush=True)
        soon, late = list(devices), []
    with _one_line(f"{what} does not start on a GPU", JobError):
        found = dict(zip(soon, ray.get(soon), strict=True))
    if "cpu" in found.values():
        print("Ray has a GPU where torch sees none: look at that host's driver", flush=True)
    lost = [devices[ref] for ref in [*late, *soon] if not (all_of_them or found.get(ref, "cpu") != "cpu")]
    _kill(lost)
    return [encoder for encoder in encoders if encoder not in lost]


def _kill(encoders: Sequence[ray.actor.ActorHandle[Any]]) -> None:
    for encoder in encoders:
        ray.kill(encoder)


@contextmanager
def _one_line(what: str, kind: type[Exception]) -> Iterator[None]:
    """Ray's errors, which hold a whole traceback, as one of this kind with the cause alone."""
    try:
        yield
    except RayError as error:
        raise kind(f"{what}: {str(error).strip().splitlines()[-1]}") from error
