"""Small trainings without Ray: in this process, or in several that train together."""

import os

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


def _worker(rank, world, port, outcome, uri, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.set_num_threads(1)
    results[rank] = outcome(uri, rank, world)
    dist.destroy_process_group()


def _parent(_, world, *args):
    """Imports everything once, and then forks the workers, which have it."""
    mp.start_processes(_worker, args=(world, *args), nprocs=world, start_method="fork")


def on_workers(world, outcome, uri):
    """What outcome(uri, rank, world) gives in each of several processes that train together."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_parent, args=(world, free_ports(1)[0], outcome, uri, results))
        return [results[rank] for rank in range(world)]


def on_two_workers(outcome, uri):
    """`on_workers`, two of them."""
    return on_workers(2, outcome, uri)
