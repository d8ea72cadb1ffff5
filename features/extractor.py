"""One shard, from its planned rows to its commit: the work that a cluster hands out."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from features.corpus.manifest import Clip, Corpus
from features.decode.isolation import IsolatedEncoder
from features.decode.specs import EncoderSpec
from features.errors import FeaturesError, MediaError, StorageError, StoreError, one_line
from features.files import split_place
from features.store import Store
from features.store.plan import planned_rows
from features.store.samples import PackedSample, Sample, pack, unpack
from features.store.shards import Earlier, Failure, ShardWriter, read_earlier

Outcome = tuple[Clip, PackedSample | Failure]
PREFETCH = 4  # clips that may be decoded while the tokens of others are waited for


class Embed(Protocol):
    """Networks that run elsewhere, shared by many decoders."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that it has a network for."""
        ...

    def __call__(self, modality: str, values: np.ndarray) -> Callable[[], np.ndarray]:
        """Takes what was decoded of a clip at once, and gives what waits for its tokens."""
        ...


@dataclass(frozen=True)
class Extraction:
    """What a worker has to know: which store, from which corpus (its schema and folder), how to encode.

    timeout: seconds that one clip may take; memory_gb: GB that one clip may take. retry: classes of failures to try
    again where a shard is committed already; None writes every shard anew. embed: takes what was decoded to where its
    network runs, several clips at a time; None runs networks where clips are decoded.
    """

    store_uri: str
    corpus: Corpus
    encoder: EncoderSpec
    timeout: float
    memory_gb: float
    retry: tuple[str, ...] | None = None
    embed: Embed | None = None

    def shard(self, name: str) -> ShardWriter:
        """Extract and commit one shard; a clip that cannot be used is a failure, never a raise.

        Returns the writer, which knows what it wrote. Raises StoreError when the shard cannot be written, StorageError
        when the media's storage stays away.
        """
        try:
            return self._shard(name)
        except FeaturesError:
            raise
        except OSError as error:
            raise StoreError(
                f"shard {name} of {self.store_uri} cannot be written: {one_line(error)}; "
                "fix the cause, then run the same command again to resume"
            ) from error

    def _shard(self, name: str) -> ShardWriter:
        store = Store(self.store_uri)  # anew: a reader holds on to the tar that it opened
        clips = [Clip.from_row(row, self.corpus.labels) for row in planned_rows(store, name).to_pylist()]
        earlier = Earlier() if self.retry is None else read_earlier(store, name, self.retry)
        fresh = [clip for clip in clips if clip.clip_id not in earlier.rows and clip.clip_id not in earlier.failed]
        outcomes = self._encode((clip, clip.media(self.corpus.folder)) for clip in fresh)
        label_types = pa.schema([self.corpus.schema.field(label) for label in self.corpus.labels])
        with ShardWriter(self.store_uri, name, store.spec, label_types) as writer:
            for clip in clips:
                if (row := earlier.rows.get(clip.clip_id)) is not None:
                    writer.keep(row, store.payload(name, row["offset"], row["nbytes"]))
                elif (failure := earlier.failed.get(clip.clip_id)) is not None:
                    writer.fail(clip, failure)
                elif isinstance(outcome := next(outcomes)[1], Failure):
                    if outcome.error == StorageError.__name__:  # says nothing about the clip
                        raise StorageError(outcome.message)
                    outcome = self._portable(outcome.after(earlier.attempts.get(clip.clip_id, 0)), clip)
                    writer.fail(clip, outcome)
                else:
                    writer.add(clip, outcome)
            writer.commit()
        return writer

    def _encode(self, clips: Iterable[tuple[Clip, dict[str, str]]]) -> Iterator[Outcome]:
        if self.embed is None:
            return isolated_encoder(self.encoder, self.timeout, self.memory_gb).encode(clips)
        raw = replace(self.encoder, raw=self.embed.modalities)
        return embedded(isolated_encoder(raw, self.timeout, self.memory_gb).encode(clips), self.embed)

    def _portable(self, failure: Failure, clip: Clip) -> Failure:
        """The failure with files named as the manifest has them: a store's bytes know nothing of the machine."""
        message = failure.message
        named = clip.files()
        for column, uri in clip.media(self.corpus.folder).items():
            message = message.replace(split_place(uri)[0], split_place(named[column])[0])
        return replace(failure, message=message)


def embedded(decoded: Iterable[Outcome], embed: Embed) -> Iterator[Outcome]:
    """Each clip, in order, with its tokens in the place of what was decoded; some more decode meanwhile."""
    waiting: deque[Callable[[], Outcome]] = deque()
    for clip, outcome in decoded:
        waiting.append(_with_tokens(clip, outcome, embed))
        if len(waiting) > PREFETCH:
            yield waiting.popleft()()
    for finish in waiting:
        yield finish()


def _with_tokens(clip: Clip, outcome: PackedSample | Failure, embed: Embed) -> Callable[[], Outcome]:
    if isinstance(outcome, Failure) or not set(embed.modalities) & outcome.tokens.keys():
        return lambda: (clip, outcome)
    features, duration, quality = unpack(outcome.payload), outcome.duration, outcome.quality
    del features["json"]
    # From here on nobody holds what was decoded but the network.
    tokens = {name: embed(name, features.pop(name)) for name in embed.modalities if name in features}

    def finish() -> Outcome:
        try:
            features.update({name: wait() for name, wait in tokens.items()})
        except MediaError as error:
            return clip, Failure(error.stage, type(error).__name__, error.message)
        return clip, pack(clip, Sample(features, duration, quality))

    return finish


@functools.lru_cache(maxsize=1)
def isolated_encoder(spec: EncoderSpec, timeout: float, memory_gb: float) -> IsolatedEncoder:
    """This process's decoding child: it lives from shard to shard, and goes when this process goes."""
    return IsolatedEncoder(spec, timeout, memory_gb)


def extract_shard(batch: pa.Table, extraction: Extraction) -> pa.Table:
    """The same for Ray Data: a table with one shard's name in, its counts out, or the error that stops the job.

    Never raises for what a person can mend: Ray would wrap it in errors and logs of its own.
    """
    indexed, failed, error = 0, 0, ""
    try:
        writer = extraction.shard(batch["shard"][0].as_py())
        indexed, failed = len(writer.rows), len(writer.failed)
    except FeaturesError as stop:
        error = str(stop)
    return pa.table({"shard": batch["shard"], "indexed": [indexed], "failed": [failed], "error": [error]})
