"""One worker of Ray Train: its place among the others and its device, as a learner."""

import ray.train
import ray.train.torch

from features.corpus.manifest import SPLITS
from pipelines.training.hostcache import open_on_host
from pipelines.training.learner import Learner, Recipe


def worker_learner(uri: str, recipe: Recipe, splits: tuple[str, ...] = SPLITS) -> Learner:
    """What this worker of Ray Train learns of a store, on the device that it has."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    return Learner(open_on_host(uri), recipe, rank, world, ray.train.torch.get_device(), splits)
