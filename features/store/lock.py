"""One writer per store: a lock file with an owner and a heartbeat.

A lock whose owner is dead (its process is gone from this host, or its heartbeat stood still) is taken over, so a job
that was killed never blocks the next one. Storage that is away stops every heartbeat, so that time counts for nobody.
"""

import contextlib
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import pyarrow.fs as pafs

from features.errors import StoreError
from features.files import open_fs, write_atomic

HEARTBEAT = 5.0  # seconds
POLL = 1.0  # seconds between two looks at another's heartbeat
ADVICE = "wait for it, or stop it"
STALE = 30.0  # seconds without a heartbeat after which an owner counts as dead


class StoreLock:
    """Context manager that holds a folder's lock. Raises StoreError when a living job holds it.

    name: of the lock's file; about: what else its file says of its owner, for those who are refused; lost: called from
    a thread, with a reason, when another job has taken the lock over.
    """

    def __init__(
        self,
        store_uri: str,
        name: str = "lock.json",
        about: Mapping[str, str] | None = None,
        lost: Callable[[str], object] | None = None,
    ) -> None:
        self.uri = store_uri
        self.fs, self.folder = open_fs(store_uri)
        # One try each: a write that waited for the storage to come back could land on the lock of the next owner.
        self._impatient, _ = open_fs(store_uri, patience=0)
        self.name, self.about, self.lost = name, dict(about or {}), lost
        self.path = f"{self.folder}/{name}"
        self.owner = uuid.uuid4().hex
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "StoreLock":
        holder = self._read()
        if holder is not None and not _gone(holder):
            self._wait_until_stale(holder)
        self.fs.create_dir(self.folder, recursive=True)
        self._write(self.fs)
        time.sleep(0.2)  # no filesystem here has compare-and-swap: write, then see who wrote last
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if (self._read() or {}).get("owner") == self.owner:
            for info in self.fs.get_file_info(pafs.FileSelector(self.folder)):
                if info.base_name.startswith(self.name):  # with what a dead owner was about to rename
                    self.fs.delete_file(info.path)

    def check(self) -> None:
        """Raise StoreError when another job has taken the lock over."""
        holder = self._read() or {}
        if holder.get("owner") != self.owner:
            raise StoreError(self._taken_by(holder))

    def _wait_until_stale(self, holder: dict[str, Any]) -> None:
        print(f"waiting: {self.uri} is locked by {_describe(holder)}", flush=True)
        # Counted in looks, for while the storage is away, perhaps for the owner as well, one look takes long.
        for _ in range(math.ceil(STALE / POLL)):
            time.sleep(POLL)
            now = self._read()
            if now is None or _gone(now):
                return
            if (now["owner"], now["beats"]) != (holder["owner"], holder["beats"]):
                raise StoreError(f"{self.uri} is being written by {_describe(now)}: {now.get('advice') or ADVICE}")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # storage that is away for a moment: the next beat tries again
                holder = self._read(self._impatient) or {}
                if holder.get("owner") != self.owner:
                    if holder and self.lost:  # not where the folder was deleted
                        self.lost(self._taken_by(holder))
                    return
                self._write(self._impatient)

    def _taken_by(self, holder: Mapping[str, Any]) -> str:
        return f"{self.uri} was taken over by another job ({_describe(holder)}): this one stops"

    def _read(self, fs: pafs.FileSystem | None = None) -> dict[str, Any] | None:
        for _ in range(2):  # a heartbeat may replace the file between our look at its size and our read
            try:
                with (fs or self.fs).open_input_file(self.path) as f:
                    return json.loads(f.read())
            except FileNotFoundError:
                return None
            except ValueError:  # a power cut leaves an empty file, and no owner
                continue
        return None

    def _write(self, fs: pafs.FileSystem) -> None:
        self._beats += 1
        me = {"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(), "beats": self._beats}
        me["started"] = psutil.Process().create_time()
        me |= self.about
        # No wait for the disk: the longer a write takes, the likelier another job wrote since we looked.
        write_atomic(fs, self.path, json.dumps(me).encode(), sync=False)


def _gone(holder: dict[str, Any]) -> bool:
    """True when the owner ran on this host and its process (same id, same start) is no more.

    A start is known up to corrections of the clock; a wrong False only costs the wait for a heartbeat.
    """
    if holder["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder["started"]) > STALE
    except psutil.NoSuchProcess:
        return True


def _describe(holder: Mapping[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')}"
