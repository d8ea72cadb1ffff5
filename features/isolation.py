"""Decoding in a child process that may die, so that no clip can hurt another.

Any decoder can abort, hang with the interpreter's lock held, or leak; only another process survives that. Each encoder
owns one child. A clip that crashes it or outlasts the timeout becomes a `Failure`, and a fresh child goes on.
"""

import ctypes
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout

from pebble import ProcessExpired, ProcessPool

from features.corpus import Clip
from features.encode import EncoderSpec, Sample, encode_clip
from features.errors import MediaError
from features.shards import Failure

LOOKAHEAD = 4  # clips queued in the child, so that it decodes while the parent writes; bounds the parent's memory
PR_SET_PDEATHSIG = 1


class IsolatedEncoder:
    """Encodes clips one by one in a killable child process.

    timeout: seconds that one clip may take.
    """

    def __init__(self, spec: EncoderSpec, timeout: float) -> None:
        self.spec, self.timeout = spec, timeout
        # A fork server imports the decoders once; a child after a crash then starts in milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["features.encode"])
        self.pool = ProcessPool(max_workers=1, initializer=_die_with_parent, context=context)

    def encode(self, clips: Iterable[tuple[Clip, Mapping[str, str]]]) -> Iterator[tuple[Clip, Sample | Failure]]:
        """Each clip with its sample or failure, in order. clips: pairs of clip and resolved media URIs."""
        waiting: deque = deque()
        for clip, media in clips:
            waiting.append((clip, self.pool.schedule(encode_clip, (clip, media, self.spec), timeout=self.timeout)))
            if len(waiting) > LOOKAHEAD:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _finish(self, clip: Clip, future: object) -> tuple[Clip, Sample | Failure]:
        try:
            return clip, future.result()
        except MediaError as error:
            return clip, Failure(error.stage, type(error).__name__, str(error))
        except FutureTimeout:
            return clip, Failure("decode", "Timeout", f"took longer than {self.timeout:g} s and was stopped")
        except ProcessExpired as error:
            return clip, Failure("decode", "Crash", f"the decoder's process died with exit code {error.exitcode}")
        except Exception as error:  # a decoder may raise anything; the job's rule is that a bad clip costs that clip
            return clip, Failure("decode", type(error).__name__, str(error).splitlines()[0] if str(error) else "")

    def close(self) -> None:
        """Stop the child."""
        self.pool.stop()
        self.pool.join()


def _die_with_parent() -> None:
    """Without this a child that spins in a decoder would outlive a killed job. Linux only; elsewhere it may."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
