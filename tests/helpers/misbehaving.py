"""What broken media make of a decoder's process, on demand."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from features.corpus.manifest import Clip
from features.decode.specs import EncoderSpec
from features.store.samples import Sample


def misbehave(how: str) -> None:
    """abort the process; never end, with the interpreter's lock held; or eat memory."""
    if how == "aborts":
        os.abort()
    if how == "spins":
        any(itertools.repeat(False))  # answers no signal
    if how == "eats":
        eaten = []
        while True:
            eaten.append(np.empty(10_000_000))


@dataclass(frozen=True)
class Misbehaving:
    """The real encoder, but for the victims: how by clip_id."""

    victims: Mapping[str, str]

    def __call__(self, clip: Clip, media: Mapping[str, str], spec: EncoderSpec) -> Sample:
        from features.decode.clip import encode_clip  # only the child has the decoders

        misbehave(self.victims.get(clip.clip_id, ""))
        return encode_clip(clip, media, spec)
