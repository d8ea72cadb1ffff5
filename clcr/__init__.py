"""CLCR: cross-level semantic collaborative representation for multimodal learning, in plain PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from clcr.batches import Batch, Features, FeatureSpec
from clcr.config import CLCRConfig
from clcr.model import CLCR
from clcr.registry import build, load, save
from clcr.tasks import TaskSpec

try:
    __version__ = version("clcr-pipeline")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["CLCR", "Batch", "CLCRConfig", "FeatureSpec", "Features", "TaskSpec", "build", "load", "save"]
