"""CLCR: cross-level semantic collaborative representation for multimodal learning, in plain PyTorch."""

from clcr.batches import Batch, Features, FeatureSpec
from clcr.config import CLCRConfig
from clcr.model import CLCR
from clcr.registry import build, load, save
from clcr.tasks import TaskSpec

__all__ = ["CLCR", "Batch", "CLCRConfig", "FeatureSpec", "Features", "TaskSpec", "build", "load", "save"]
