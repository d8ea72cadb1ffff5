"""Small trainings without Ray: in this process, or in several that train together."""

import atexit
import os
from contextlib import suppress
from functools import cache

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clcr.config import CLCRConfig, ModelConfig
from clcr.training import OptimConfig
from infra.head import free_ports
from pipelines.training.learner import Recipe


def recipe(architecture="clcr", epochs=3, **optim):
    return Recipe(
        architecture=architecture,
        optim=OptimConfig(epochs=epochs, batch_size=8, **optim),
        network=CLCRConfig(model=ModelConfig(width=16, heads=2, dropout=0.1)),
    )


def run(learner):
    return [epoch.metrics for epoch in learner.fit()]


def losses(history):
    return [{k: v for k, v in m.items() if not k.startswith("perf/")} for m in history]


def on_workers(world, outcome, uri):
    """What outcome(uri, rank, world) gives in each of several processes that train together."""
    connection = _forking()
    connection.send((world, outcome, uri))
    results, error = connection.recv()
    assert not error, error
    return results


def on_two_workers(outcome, uri):
    """`on_workers`, two of them."""
    return on_workers(2, outcome, uri)


@cache
def _forking():
    """The way to a process that has imported everything once, and forks the workers of every training from itself."""
    ours, theirs = mp.Pipe()
    mp.get_context("spawn").Process(target=_fork, args=(theirs,)).start()
    theirs.close()
    atexit.register(ours.close)  # by which that process ends
    return ours


def _fork(connection):
    import torch._dynamo  # noqa: F401  # an optimizer's first step does, in each worker

    context = mp.get_context("fork")
    with suppress(EOFError):
        while True:
            world, *rest = connection.recv()
            try:
                with context.Manager() as manager:
                    results = manager.dict()
                    mp.start_processes(_worker, (world, free_ports(1)[0], results, *rest), world, start_method="fork")
                    connection.send(([results[rank] for rank in range(world)], ""))
            except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
                connection.send((None, str(error)))


def _worker(rank, world, port, results, outcome, uri):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    results[rank] = outcome(uri, rank, world)
    dist.destroy_process_group()
