"""Where the fork server's socket lies: a folder that is short enough for a socket and does not outlive its processes.

multiprocessing makes such a folder below TMPDIR and deletes it when the process exits. Ray kills its workers, so each
of them would leave one behind; and a socket's path may have 107 characters. So the folder is ours: the fork server,
which ends after all who may use it, deletes it, and the next start deletes those of processes that were killed with
theirs.
"""

import atexit
import contextlib
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LONGEST = 107  # characters of a socket's path
OWN = 55  # of them are the folder's and the socket's names
FOLDER = "CLCR_SOCKET_FOLDER"  # tells the fork server which folder it has to delete
NAME = re.compile(r"clcr-socket-(\d+)-(\d+)-\w+")  # of which namespace, and of which process in it

if (_folder := os.environ.pop(FOLDER, None)) is not None:  # this is the fork server: its children end without atexit
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)


def short_temporary_folder(longest: int = LONGEST - OWN) -> str:
    """The temporary folder, or /tmp where its path has more than `longest` characters."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= longest else "/tmp"


@contextlib.contextmanager
def socket_folder() -> Iterator[None]:
    """In this context a fork server may start: its socket lies in a folder that it deletes when it ends."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # private, so not hinted
    if "tempdir" not in config or not os.path.isdir(config["tempdir"]):
        base = short_temporary_folder()
        _sweep(base)
        config["tempdir"] = tempfile.mkdtemp(prefix=f"clcr-socket-{_namespace()}-{os.getpid()}-", dir=base)
    ours = NAME.fullmatch(os.path.basename(config["tempdir"])) is not None
    if ours:
        os.environ[FOLDER] = config["tempdir"]
    try:
        yield
    finally:
        os.environ.pop(FOLDER, None)


def _sweep(base: str) -> None:
    """Delete the folders of processes that are gone, and whose fork server was killed with them."""
    for folder in Path(base).glob("clcr-socket-*"):
        match = NAME.fullmatch(folder.name)
        if match and int(match[1]) == _namespace() != 0 and not os.path.exists(f"/proc/{match[2]}"):
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays


def _namespace() -> int:
    """Names who counts processes as we do: containers may share a temporary folder. 0 where there is no telling."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
