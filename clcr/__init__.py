"""CLCR: cross-level semantic collaborative representation for multimodal learning, in plain PyTorch.

What is named here is loaded when it is first used: who reads only how options are called needs no PyTorch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOMES = {
    "batches": ("Batch", "FeatureSpec", "Features"),
    "config": ("CLCRConfig",),
    "model": ("CLCR",),
    "registry": ("build", "load", "save"),
    "tasks": ("TaskSpec",),
}


def __getattr__(name: str) -> Any:
    """A name of __all__ from its file, or a file of this package."""
    for home, names in _HOMES.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(f"clcr.{home}"), name))
    if not name.startswith("_"):
        try:
            return import_module(f"clcr.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"clcr.{name}":
                raise
    raise AttributeError(f"module 'clcr' has no attribute {name!r}")
