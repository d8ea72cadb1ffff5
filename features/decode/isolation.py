"""Decoding in a process of its own, so that no clip can hurt another.

Any decoder can abort, hang with the interpreter's lock held, or eat all memory; only another process survives that.
Each encoder owns one child. A clip that crashes it twice, outlasts the timeout or asks for more memory than allowed
becomes a `Failure`, and a fresh child takes the next clip. What becomes of a clip does not depend on the clips that its
child decoded before: a crash, or a lack of memory in a used child, is tried again in a fresh one.
"""

import contextlib
import errno
import multiprocessing
import platform
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType

import psutil

from features.corpus.manifest import Clip
from features.decode.sockets import socket_folder
from features.decode.specs import EncoderSpec
from features.errors import FeaturesError, MediaError, one_line
from features.store.samples import PackedSample, Sample, pack
from features.store.shards import Failure

Encode = Callable[[Clip, Mapping[str, str], EncoderSpec], Sample]
CRASH, TIMEOUT, MEMORY = "Crash", "Timeout", "Memory"  # classes of failures
NO_MEMORY = r"(can't|[Cc]annot) allocate memory|not enough memory|bad_alloc"
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
        preloaded = ["features.decode.sockets", "features.decode.isolation", "features.decode.clip", "webdataset"]
        self._context.set_forkserver_preload(preloaded)
        self._child: BaseProcess | None = None
        self._connection: Connection | None = None
        self._used = False  # the child has decoded a clip

    def encode(self, clips: Iterable[tuple[Clip, Mapping[str, str]]]) -> Iterator[tuple[Clip, PackedSample | Failure]]:
        """Each clip with its packed sample or failure, in order. clips: pairs of clip and resolved media URIs."""
        for clip, media in clips:
            used = self._used
            outcome = self._encode(clip, media)
            if _is(outcome, MEMORY) and used:  # what its child held of other clips left it less
                outcome = self._encode(clip, media)
            if _is(outcome, CRASH):  # the machine's fault, perhaps: once more
                outcome = self._encode(clip, media)
                outcome = replace(outcome, attempts=2) if isinstance(outcome, Failure) else outcome
            yield clip, outcome

    def _encode(self, clip: Clip, media: Mapping[str, str]) -> PackedSample | Failure:
        self.start()
        assert self._child is not None and self._connection is not None
        self._used = True
        try:
            self._connection.send((clip, media, self.timeout))
            if self._connection.poll(min(self.timeout, LONGEST_WAIT)):
                outcome = self._connection.recv()
                if _is(outcome, MEMORY):
                    self.close()  # what it holds by now, it may hold for ever
                return outcome
        except (EOFError, OSError):  # the child's end of the pipe is gone
            self._child.join(GRACE)
            self._child.kill()  # it may hang in its exit
            self._child.join()
            return Failure("decode", CRASH, f"the decoder's process died with exit code {self._child.exitcode}")
        self.close()
        return Failure("decode", TIMEOUT, f"took longer than {self.timeout:g} s and was stopped")

    def start(self) -> None:
        """Start the child now, rather than at the first clip. Raises FeaturesError where it does not."""
        if self._child is None or not self._child.is_alive():
            self._start()

    def _start(self) -> None:
        """A child that has imported the decoders and loaded what networks there are: no clip's time pays for that."""
        self.close()
        try:
            # A pipe and nothing else: the semaphores of a multiprocessing queue outlive a worker that Ray kills.
            self._connection, theirs = self._context.Pipe()
        except OSError as error:
            raise FeaturesError(f"on {platform.node()}: no decoding process starts: {_advice(error)}") from error
        work = (theirs, self.spec, self.encode_clip, self.memory_gb)
        child = self._context.Process(target=_serve, args=work, daemon=True)
        # A child is told to run the program that made it again, as a module; a worker of Ray is large, and of no use.
        program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            with socket_folder():
                child.start()
        except OSError as error:
            self._connection.close()
            raise FeaturesError(f"on {platform.node()}: no decoding process starts: {_advice(error)}") from error
        finally:
            sys.modules["__main__"] = program
            theirs.close()
        self._child, self._used = child, False
        try:
            problem = self._connection.recv()
        except EOFError:
            problem = "the decoding process died at its start; what it printed says why"
        if problem:
            raise FeaturesError(f"on {platform.node()}: {problem}")

    def close(self) -> None:
        """Stop the child."""
        if self._child is not None:
            assert self._connection is not None
            self._connection.close()
            self._child.kill()
            self._child.join()
            self._child = None


def _is(outcome: PackedSample | Failure, error: str) -> bool:
    return isinstance(outcome, Failure) and outcome.error == error


def _advice(error: OSError) -> str:
    """What a person can do about a child that does not start."""
    advice = {
        errno.ENOSPC: "the disk of the temporary folder is full: free some of it, or set TMPDIR",
        errno.EACCES: "the temporary folder may not be written: set TMPDIR",
        errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
        errno.EAGAIN: "too many processes: raise the limit (ulimit -u)",
        errno.ENOMEM: "the machine is out of memory: lower --concurrency",
    }
    return (
        f"{one_line(error)}; {advice.get(error.errno or 0, 'check TMPDIR, and the limits of this machine (ulimit -a)')}"
    )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory is behind an error; torch and decord say so in words alone."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            return True
        error = error.__cause__
    return False


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
    except (ImportError, OSError, RuntimeError) as error:  # torchaudio with another build of torch, for one
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
        if is_out_of_memory(error):
            return Failure("decode", MEMORY, f"asked for more than {memory_gb:g} GB of memory")
        if isinstance(error, MediaError):
            return Failure(error.stage, type(error).__name__, str(error))
        return Failure("decode", type(error).__name__, str(error).splitlines()[0] if str(error) else "")
