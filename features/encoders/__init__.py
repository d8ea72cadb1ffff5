"""Frozen networks that make tokens of frames, sound, images and texts: one contract, one file per kind."""

from features.encoders.contract import Asked, Encoder
from features.encoders.registry import find_encoder

__all__ = ["Asked", "Encoder", "find_encoder"]
