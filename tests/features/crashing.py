"""An encoder that does to its process what broken media do to decoders; the clip's id says what."""

import itertools
import os

import numpy as np
from storefiles import make_sample

from features.errors import MediaError


def encode(clip, media, spec):
    if clip.clip_id == "aborts":
        os.abort()
    if clip.clip_id == "spins":
        any(itertools.repeat(False))  # never ends, keeps the interpreter's lock, answers no signal
    if clip.clip_id == "eats":
        eaten = []
        while True:
            eaten.append(np.empty(10_000_000))
    if clip.clip_id == "aborts once" and not os.path.exists(clip.video):
        open(clip.video, "w").close()
        os.abort()
    if clip.clip_id == "raises":
        raise KeyError("first line\nsecond line")
    if clip.clip_id == "refused":
        raise MediaError("video", "no key frame")
    return make_sample(int(clip.clip_id) if clip.clip_id.isdigit() else 0)
