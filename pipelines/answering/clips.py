"""A trained model for raw clips: the spec in its folder says how to encode, a process of its own decodes.

answerer = ClipAnswerer(open_model("--model", "runs/clcr"))
answerer.answer(clip_of_file("clip.mp4")).values      # {"label": "dog", "label_probability": .93, ...}
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clcr.base import MultimodalModel
from clcr.batches import collate
from features.corpus.events import bin_events
from features.corpus.folder import SUFFIXES
from features.corpus.manifest import MEDIA, Clip
from features.decode.isolation import IsolatedEncoder
from features.decode.like import spec_of_store
from features.errors import FeaturesError
from features.store.samples import PackedSample, unpack
from pipelines.answering.table import to_table
from pipelines.common.errors import JobError
from pipelines.training.trained import TrainedModel


@dataclass(frozen=True)
class Decoded:
    """One clip's features, {modality: (T, *shape)}, its duration, and the seconds that decoding it took."""

    clip: Clip
    features: Mapping[str, np.ndarray]
    duration: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """One clip's answer: a row as predictions have it, or what is wrong with the clip (stage, error, message).

    seconds: decode and model, apart.
    """

    clip_id: str
    table: pa.Table | None = None
    failure: Mapping[str, str] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The row as plain values; {} for a failure."""
        return self.table.to_pylist()[0] if self.table is not None else {}


class ClipAnswerer:
    """Holds a model and one decoding process; clips come one at a time. Safe to call from several threads.

    timeout: seconds that decoding one clip may take; memory_gb: GB; places: weights files, see `spec_of_store`.
    Raises JobError where clips cannot be encoded as the model's store was.
    """

    def __init__(
        self,
        trained: TrainedModel,
        timeout: float = 120.0,
        memory_gb: float = 4.0,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self._lock = trained.model, threading.Lock()
        learned = {m: trained.learned.features[m] for m in self.model.features}
        try:
            self.encoder = IsolatedEncoder(spec_of_store(learned, places), timeout, memory_gb)
        except FeaturesError as error:
            raise JobError(f"--model: new clips cannot be encoded for it: {error}") from error

    def start(self) -> "ClipAnswerer":
        """Start the decoding process now, rather than at the first clip."""
        self.encoder.start()
        return self

    def close(self) -> None:
        """Stop the decoding process."""
        self.encoder.close()

    def answer(self, clip: Clip, folder: str = "") -> Answer:
        """One clip's answer. folder: what its relative paths are relative to."""
        decoded = self.decode(clip, folder)
        if isinstance(decoded, Answer):
            return decoded
        started = time.perf_counter()
        table = answer_features(self.model, [decoded])
        seconds = {"decode": decoded.seconds, "model": time.perf_counter() - started}
        return Answer(clip.clip_id, table, seconds=seconds)

    def decode(self, clip: Clip, folder: str = "") -> Decoded | Answer:
        """One clip's features, or, where it cannot be used, the answer that says why."""
        started = time.perf_counter()
        with self._lock:
            _, outcome = next(self.encoder.encode([(clip, clip.media(folder))]))
        seconds = time.perf_counter() - started
        if isinstance(outcome, PackedSample):
            return Decoded(clip, unpack(outcome.payload), outcome.duration, seconds)
        failure = {"stage": outcome.stage, "error": outcome.error, "message": outcome.message}
        return Answer(clip.clip_id, failure=failure, seconds={"decode": seconds})

    def answer_many(self, clips: Iterable[Clip], folder: str = "") -> Iterator[Answer]:
        """Each clip's answer, in order."""
        return (self.answer(clip, folder) for clip in clips)


@torch.no_grad()
def answer_features(model: MultimodalModel, several: Sequence[Decoded]) -> pa.Table:
    """Rows of predictions for some clips' features, of one forward pass."""
    samples, rows = [], []
    for clip, features, duration in ((d.clip, d.features, d.duration) for d in several):
        unknown = {n: bin_events(None, duration, task.rate, {}) for n, task in model.tasks.items() if task.rate}
        given = {m: features[m] for m in model.features if m in features}
        samples.append({"clip_id": clip.clip_id, "features": given, "targets": unknown})
        rows.append({"clip_id": clip.clip_id, "split": clip.split, "fold": clip.fold, "duration": duration})
    batch = collate(samples, model.features, model.tasks)
    logits = model(batch.to(next(model.parameters()).device)).logits
    return to_table(model.tasks, rows, {name: values.cpu() for name, values in logits.items()})


def clip_of_file(uri: str, clip_id: str | None = None) -> Clip:
    """One media file as a clip. Raises JobError for an ending that is none of a medium's."""
    suffix = uri.partition("?")[0].rpartition(".")[2].lower()
    if suffix not in SUFFIXES:
        raise JobError(f"{uri}: not a media file that is known ({', '.join(SUFFIXES)})")
    name = uri.rpartition("/")[2].rpartition(".")[0]
    return make_clip(clip_id or name, **{SUFFIXES[suffix]: uri})


def make_clip(clip_id: str, **media: str) -> Clip:
    """A clip without a label, of the test split."""
    sources: dict[str, Any] = dict.fromkeys(MEDIA) | media
    return Clip(clip_id, **sources, start=None, end=None, split="test", fold=None, group=None)
