"""An encoder that does to its process what broken media do to decoders; the clip's id says what."""

import os
import signal
import time

from storefiles import make_sample

from features.errors import MediaError
from tests.helpers.misbehaving import misbehave


def encode(clip, media, spec):
    misbehave(clip.clip_id)
    if clip.clip_id == "aborts once" and not os.path.exists(clip.video):
        open(clip.video, "w").close()
        os.abort()
    if clip.clip_id == "hangs up":
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.closerange(3, 256)
        time.sleep(600)
    if clip.clip_id == "raises":
        raise KeyError("first line\nsecond line")
    if clip.clip_id == "refused":
        raise MediaError("video", "no key frame")
    return make_sample(int(clip.clip_id) if clip.clip_id.isdigit() else 0)
