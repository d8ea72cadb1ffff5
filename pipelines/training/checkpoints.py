"""Checkpoints of a training on Ray Train: when all workers save together, and what a run resumes from.

A checkpoint is one file, state.pt, on the run's storage. It is written on the worker's own disk and uploaded while
training continues; the newest two are kept.
"""

import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow.fs import FileSelector, FileSystem
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero

from features.files import open_fs, read_text, resolve, write_text
from pipelines.common.compat import checkpoint_snapshot, silence_train_reports

SNAPSHOT = "checkpoints/checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints


class Checkpoints:
    """Saves at most every `seconds`, at a step that is the same on every worker: rank 0's clock decides.

    Asking rank 0 is an exchange between all workers. So that not every step needs one, it answers for how many steps
    nobody need ask: half of those that fit, at the speed so far, into the time that is left.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        silence_train_reports()
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self._saved, self._steps, self._ask_at = time.monotonic(), 0, 1
        self._uploading: Path | None = None  # Ray deletes the folder when it is on the storage

    def due(self, last: bool = False) -> bool:
        """Whether to save now. All workers call it after every step; last: save in any case."""
        self._steps += 1
        if not last and self._steps < self._ask_at:
            return False
        wait = 0 if last else self._steps_to_wait()
        if self.world > 1:
            wait = broadcast_from_rank_zero(wait)
        self._ask_at = self._steps + wait
        return wait == 0

    def save(self, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Rank 0's state becomes the run's newest checkpoint. All workers call it."""
        checkpoint = None
        if self.rank == 0:
            self._uploading = Path(tempfile.mkdtemp(prefix="checkpoint-"))
            torch.save(state, self._uploading / "state.pt")
            checkpoint = Checkpoint.from_directory(str(self._uploading))
        ray.train.report(dict(metrics), checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        self._saved, self._steps, self._ask_at = time.monotonic(), 0, 1

    def _steps_to_wait(self) -> int:
        passed = time.monotonic() - self._saved
        if passed < self.seconds:
            return max(1, int((self.seconds - passed) / (passed / self._steps) / 2))
        return int(self._uploading is not None and self._uploading.exists())  # one upload at a time


def repair(out: str) -> None:
    """Write Ray Train's list of a run's checkpoints anew where a kill cut it short: the newest one that is whole.

    Ray empties the file before it writes it again, and a driver that is killed in between leaves nothing in it.
    """
    text = read_text(out, SNAPSHOT)
    if text is None or _is_json(text):
        return
    fs, path = open_fs(resolve("checkpoints", out))
    files = fs.get_file_info(FileSelector(path, recursive=True))  # object stores list files, and not always folders
    for state in sorted((f.path for f in files if f.base_name == "state.pt"), reverse=True):
        if _is_whole(fs, state):
            write_text(out, SNAPSHOT, checkpoint_snapshot(state.split("/")[-2]))
            return
    fs.delete_file(f"{path}/{SNAPSHOT.rpartition('/')[2]}")  # killed before there was any: from the beginning


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_whole(fs: FileSystem, path: str) -> bool:
    try:
        with fs.open_input_file(path) as file:
            torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever a torn file makes it raise
        return False
    return True


def restore(device: torch.device | str) -> dict[str, Any] | None:
    """The state that this worker resumes from; None at a run's beginning."""
    if (checkpoint := ray.train.get_checkpoint()) is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", map_location=device, weights_only=True)
