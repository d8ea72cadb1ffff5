"""Whole shards of a remote store on this host's own disk, fetched once for all processes of the host.

    FOLDER/{store}/{shard}.{size}.{time}.tar     a whole copy; .tmp while it is fetched, .lock while somebody does

The first that needs a shard fetches it and the others wait. A process that is killed leaves a .tmp that is no copy: its
lock dies with it, and the next that needs the shard begins again. What does not fit is not kept: of data that is
read over and over, each time in a new order, the copies that came first are worth as much as any. Copies of other
stores make room.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock

from features.files import publish
from features.store.reader import Store

PIECE = 8 << 20  # bytes fetched at a time


class DiskCache:
    """Copies of a store's shards, all stores' together at most `limit` bytes, below the folder for temporary files."""

    def __init__(self, store: Store, limit: float, folder: str | None = None) -> None:
        self.store, self.limit = store, limit
        self.root = Path(folder or os.path.join(tempfile.gettempdir(), f"clcr-shards-{os.getuid()}"))
        name = hashlib.sha256(f"{store.path} {store.spec.fingerprint}".encode()).hexdigest()[:16]
        self.folder = self.root / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Path] = {}

    def path(self, shard: str) -> str | None:
        """The copy of a shard, fetched first where there is room; None where there is none.

        Of a mixture with remote stores, a local shard is read where it lies.
        """
        fs, tar = self.store.tar(shard)
        if fs.type_name == "local" and self.store.remote:
            return tar
        if shard not in self._known:
            info = fs.get_file_info(tar)
            changed = 0 if info.mtime_ns is None else info.mtime_ns
            self._known[shard] = self.folder / f"{shard}.{info.size or 0}.{changed}.tar"
        copy = self._known[shard]
        if copy.exists():
            return str(copy)
        with FileLock(copy.with_suffix(".lock"), is_singleton=False):
            if copy.exists():  # while we waited
                return str(copy)
            size = int(copy.name.rsplit(".", 3)[1])
            temporary = copy.with_suffix(".tmp")
            if not self._make_room(temporary, size):
                return None
            self._fetch(shard, temporary, size)
            publish(pafs.LocalFileSystem(), str(temporary), str(copy))
            return str(copy)

    def _make_room(self, temporary: Path, size: int) -> bool:
        """Reserve a file's bytes within the limit; copies of other stores, the oldest first, make way for it."""
        with FileLock(self.root / "room.lock", is_singleton=False):
            temporary.unlink(missing_ok=True)  # of a process that was killed
            shard = temporary.name.rsplit(".", 3)[0]
            for old in self.folder.glob(f"{shard}.*.t[am][rp]"):  # this shard as it was before it was written again
                old.unlink(missing_ok=True)
            files = {}
            for path in self.root.glob("*/*.t[am][rp]"):
                with contextlib.suppress(FileNotFoundError):  # given its name, or removed, since it was listed
                    files[path] = path.stat()
            total = sum(about.st_size for about in files.values())
            others = sorted((about.st_mtime, path) for path, about in files.items() if path.parent != self.folder)
            for _, path in others:
                if total + size <= self.limit:
                    break
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total -= files[path].st_size
            if total + size > self.limit:
                return False
            with temporary.open("wb") as file:
                file.truncate(size)
            return True

    def _fetch(self, shard: str, temporary: Path, size: int) -> None:
        fs, tar = self.store.tar(shard)
        source = fs.open_input_file(tar)
        with source, temporary.open("r+b") as target:
            for offset in range(0, size, PIECE):
                target.write(source.read_at(min(PIECE, size - offset), offset))
