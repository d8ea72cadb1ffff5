"""Decoding in a child process that may die, so that no clip can hurt another.

Any decoder can abort, hang with the interpreter's lock held, or eat all memory; only another process survives that.
Each encoder owns one child. A clip that crashes it twice, outlasts the timeout or asks for more memory than allowed
becomes a `Failure`, and a fresh child goes on.
"""

import contextlib
import multiprocessing
import platform
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from types import ModuleType

import psutil

from features.corpus.manifest import Clip
from features.decode.specs import EncoderSpec
from features.errors import FeaturesError, MediaError, one_line
from features.store.samples import PackedSample, Sample, pack
from features.store.shards import Failure

Encode = Callable[[Clip, Mapping[str, str], EncoderSpec], Sample]
CRASH, TIMEOUT, MEMORY = "Crash", "Timeout", "Memory"  # classes of failures
LONGEST_WAIT = 2e6  # seconds that a pipe can be waited for at once
GRACE = 1.0  # seconds: beyond the timeout until a child that nobody stopped stops itself; from its last word to its end


class IsolatedEncoder:
    """Encodes clips one by one in a killable child process.

    timeout: seconds that one clip may take. memory_gb: GB that one clip may take; enforced on Linux. encode_clip: what
    the child runs; none stands for features.decode.clip's, which only the child then loads.
    """

    def __init__(
        self, spec: EncoderSpec, timeout: float, memory_gb: float = 4.0, encode_clip: Encode | None = None
    ) -> None:
        self.spec, self.timeout, self.memory_gb, self.encode_clip = spec, timeout, memory_gb, encode_clip
        # A fork server imports the decoders once; a child after a crash then starts in milliseconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["features.decode.isolation", "features.decode.clip", "webdataset"])
        self._child: multiprocessing.Process | None = None
        self._connection: Connection | None = None

    def encode(self, clips: Iterable[tuple[Clip, Mapping[str, str]]]) -> Iterator[tuple[Clip, PackedSample | Failure]]:
        """Each clip with its packed sample or failure, in order. clips: pairs of clip and resolved media URIs."""
        for clip, media in clips:
            outcome = self._encode(clip, media)
            if isinstance(outcome, Failure) and outcome.error == CRASH:  # the machine's fault, perhaps: once more
                outcome = self._encode(clip, media)
                outcome = replace(outcome, attempts=2) if isinstance(outcome, Failure) else outcome
            yield clip, outcome

    def _encode(self, clip: Clip, media: Mapping[str, str]) -> PackedSample | Failure:
        if self._child is None or not self._child.is_alive():
            self._start()
        try:
            self._connection.send((clip, media, self.timeout))
            if self._connection.poll(min(self.timeout, LONGEST_WAIT)):
                outcome = self._connection.recv()
                if isinstance(outcome, Failure) and outcome.error == MEMORY:
                    self.close()  # what it holds by now, it may hold for ever
                return outcome
        except (EOFError, OSError):  # the child's end of the pipe is gone
            self._child.join(GRACE)
            self._child.kill()  # it may hang in its exit
            self._child.join()
            return Failure("decode", CRASH, f"the decoder's process died with exit code {self._child.exitcode}")
        self.close()
        return Failure("decode", TIMEOUT, f"took longer than {self.timeout:g} s and was stopped")

    def _start(self) -> None:
        """A child that has imported the decoders and loaded what networks there are: no clip's time pays for that."""
        self.close()
        # A pipe and nothing else: the semaphores of a multiprocessing queue outlive a worker that Ray kills.
        self._connection, theirs = self._context.Pipe()
        work = (theirs, self.spec, self.encode_clip, self.memory_gb)
        self._child = self._context.Process(target=_serve, args=work, daemon=True)
        # A child is told to run the program that made it again, as a module; a worker of Ray is large, and of no use.
        program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._child.start()
        finally:
            sys.modules["__main__"] = program
        theirs.close()
        try:
            problem = self._connection.recv()
        except EOFError:
            problem = "the decoding process died at its start; what it printed says why"
        if problem:
            raise FeaturesError(f"on {platform.node()}: {problem}")

    def close(self) -> None:
        """Stop the child."""
        if self._child is not None:
            self._connection.close()
            self._child.kill()
            self._child.join()
            self._child = None


def _serve(connection: Connection, spec: EncoderSpec, encode: Encode | None, memory_gb: float) -> None:
    """The child's whole life: one clip in, one sample or failure out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A decoder that spins would outlive a job that was killed; no handler, for it may hold the interpreter's lock.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        import torch

        from features.decode.clip import encode_clip, prepare

        torch.set_num_threads(1)
        if encode is None:
            encode = encode_clip
            prepare(spec)
    except FeaturesError as error:
        return connection.send(str(error))
    except (ImportError, OSError, RuntimeError) as error:  # torchaudio beside another build of torch, for one
        return connection.send(f"the decoders do not load: {one_line(error)}; make setup installs them")
    if hasattr(used := psutil.Process().memory_info(), "data"):  # Linux: every private page that can be written
        limit = used.data + int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send("")  # ready
        while True:
            clip, media, timeout = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
            outcome = _attempt(encode, clip, media, spec, memory_gb)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(outcome)


def _attempt(
    encode: Encode, clip: Clip, media: Mapping[str, str], spec: EncoderSpec, memory_gb: float
) -> PackedSample | Failure:
    try:
        return pack(clip, encode(clip, media, spec))
    except Exception as error:  # a decoder may raise anything; the job's rule is that a bad clip costs that clip
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            return Failure("decode", MEMORY, f"asked for more than {memory_gb:g} GB of memory")
        if isinstance(error, MediaError):
            return Failure(error.stage, type(error).__name__, str(error))
        return Failure("decode", type(error).__name__, str(error).splitlines()[0] if str(error) else "")
