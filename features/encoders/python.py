"""`python:package.module:factory`: an encoder of the user's own, a class of the contract or what makes one."""

import hashlib
import importlib
import inspect
import os
import sys

from features.encoders.contract import Asked, Encoder
from features.errors import FeaturesError, one_line


def make(asked: Asked) -> Encoder:
    """What the factory gives. Raises FeaturesError where it is not there, fails, or makes something else."""
    _, module, factory = [*asked.name.split(":"), "", ""][:3]
    if not (module and factory):
        raise FeaturesError(f"{asked.option}: write python:package.module:factory")
    if (here := os.getcwd()) not in sys.path:  # Python looks next to the script, and Ray's workers where the job looks
        sys.path.append(here)
    try:
        encoder = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # whatever a stranger's code raises
        raise FeaturesError(f"{asked.option} does not load: {one_line(error)}") from error
    if not isinstance(encoder, Encoder):
        raise FeaturesError(f"{asked.option} makes a {type(encoder).__name__}, not a features.encoders.Encoder")
    if not encoder.identity:
        with open(inspect.getfile(type(encoder)), "rb") as file:
            encoder.identity = {"source": hashlib.file_digest(file, "sha256").hexdigest()}
    return encoder
