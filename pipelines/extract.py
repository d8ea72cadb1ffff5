#!/usr/bin/env python
"""Extract: a corpus of clips becomes a feature store, on any number of machines (Ray Data).

Each task takes one shard's rows, decodes its clips in a process that may die, writes the shard and commits it. A run
that was killed goes on where it stopped when the same command is given again; a run over a finished store does nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import ray

from features.audio import AudioSpec
from features.corpus import Clip, Corpus, read_corpus
from features.encode import EncoderSpec
from features.isolation import IsolatedEncoder
from features.store import Store, StoreSpec, shard_name
from features.store.lock import StoreLock
from features.store.shards import Failure, ShardWriter, create_store, find_store, sweep_litter
from features.video import VideoSpec
from infra.doctor import decoders, ray_access, require, storage, torch_pairing
from pipelines.cli import JobError, Progress, main, resolve_uri, start_ray


@dataclass(frozen=True)
class ExtractConfig:
    """Options of the extract job."""

    corpus: str
    """manifest (.csv or .parquet) or folder of class folders; path or URI"""
    store: str
    """feature store to make or to go on with; path or URI"""
    tasks: tuple[str, ...] = ()
    """label columns, `name` or `name:regression`; none named = every label column"""
    modalities: tuple[str, ...] = ("video", "audio")
    """which modalities to extract"""
    video: VideoSpec = field(default_factory=VideoSpec)
    audio: AudioSpec = field(default_factory=AudioSpec)
    shard_rows: int = 64
    """clips per shard: the unit of work, of commit, and of loss when a machine dies"""
    concurrency: int = 0
    """decoding processes over the whole cluster; 0 = one per CPU"""
    timeout: float = 120.0
    """seconds that one clip may take before it counts as failed"""
    max_failed: float = 0.05
    """share of clips (0-1) that may fail before the job's exit code is not 0"""
    dry_run: bool = False
    """check the corpus and print the plan; write nothing"""

    def __post_init__(self) -> None:
        for name, least in (("shard_rows", 1), ("concurrency", 0), ("timeout", 1e-3), ("max_failed", 0)):
            if getattr(self, name) < least:
                raise JobError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least:g} or more")


class ShardExtractor:
    """A Ray Data worker that turns one shard's manifest rows into a committed shard."""

    def __init__(self, store_uri: str, corpus: Corpus, spec: StoreSpec, encoder: EncoderSpec, timeout: float) -> None:
        self.store_uri, self.corpus, self.spec = store_uri, corpus, spec
        self.encoder = IsolatedEncoder(encoder, timeout)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One shard's rows in, one row of counts out. A clip that cannot be used is a failure row, never a raise."""
        name = rows["shard"][0].as_py()
        labels = self.corpus.labels
        clips = [Clip.from_row(row, labels) for row in rows.to_pylist()]
        label_types = pa.schema([self.corpus.schema.field(label) for label in labels])
        with ShardWriter(self.store_uri, name, self.spec, label_types) as writer:
            for clip, outcome in self.encoder.encode((clip, clip.media(self.corpus.folder)) for clip in clips):
                if isinstance(outcome, Failure):
                    writer.fail(clip, outcome)
                else:
                    writer.add(clip, outcome)
            writer.commit()
        return pa.table({"shard": [name], "indexed": [len(writer.rows)], "failed": [len(writer.failed)]})

    def __del__(self) -> None:
        """Ray Data drops the object when its work is done; the decoding child goes with it."""
        self.encoder.close()


def extract(config: ExtractConfig) -> None:
    """The job: check the corpus, plan, run what is not committed yet, count."""
    corpus_uri, store_uri = resolve_uri("--corpus", config.corpus), resolve_uri("--store", config.store)
    corpus = read_corpus(corpus_uri)
    encoder = plan_encoders(config, corpus)
    report = corpus.validate(",".join(config.tasks) or None)
    spec = StoreSpec(encoder.features(), report.tasks, report.splits, config.shard_rows, report.digest)
    print(f"corpus {corpus_uri}: {spec.rows} clips ({', '.join(f'{n} {s}' for s, n in spec.splits.items())})")
    print("tasks: " + (", ".join(f"{t.name} ({len(t.classes) or t.kind})" for t in spec.tasks) or "none"), flush=True)
    existing = find_store(store_uri, spec)
    if config.dry_run:
        return print_plan(store_uri, spec, existing)
    require(torch_pairing(), decoders(), ray_access(), storage(store_uri))
    start_ray()
    with StoreLock(store_uri) as lock:
        store = create_store(store_uri, spec)
        if removed := sweep_litter(store):
            print(f"removed {removed} files of a run that was interrupted")
        run_pending(config, corpus, store, encoder, store.committed(), lock)
    summarize(store, config.max_failed)


def plan_encoders(config: ExtractConfig, corpus: Corpus) -> EncoderSpec:
    """Which modalities the store will hold: those asked for that the corpus has a source of."""
    if unknown := set(config.modalities) - {"video", "audio"}:
        raise JobError(f"--modalities {','.join(sorted(unknown))}: known are video, audio")
    columns = set(corpus.schema.names)
    wanted = set(config.modalities) & ({"video", "audio"} if "video" in columns else {"audio"} & columns)
    if not wanted:
        raise JobError(f"--modalities {','.join(config.modalities)}: {corpus.uri} has no such media column")
    return EncoderSpec(
        video=config.video if "video" in wanted else None, audio=config.audio if "audio" in wanted else None
    )


def run_pending(
    config: ExtractConfig, corpus: Corpus, store: Store, encoder: EncoderSpec, committed: set[str], lock: StoreLock
) -> None:
    """Extract every planned shard that is not committed."""
    pending = sum(1 for name in store.spec.shards() if name not in committed)
    if not pending:
        return print("nothing to do: every shard is committed")
    tables = [table for name, table in shards(corpus, store.spec) if name not in committed]
    cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.concurrency or cpus, pending)
    indexed, failed = store.counts()
    print(f"{pending} of {pending + len(committed)} shards to extract, {workers} decoding processes", flush=True)
    progress = Progress("extract", store.spec.rows, done=indexed + failed)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    results = ray.data.from_arrow(tables).map_batches(
        ShardExtractor,
        fn_constructor_args=(store.uri, corpus, store.spec, encoder, config.timeout),
        batch_size=None,  # a block is a shard
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    for row in results.iter_rows():
        failed += row["failed"]
        progress.update(row["indexed"] + row["failed"], f"{failed} failed")
        lock.check()


def shards(corpus: Corpus, spec: StoreSpec) -> Iterator[tuple[str, pa.Table]]:
    """Shard names with their manifest rows, streamed: rows of a split in manifest order, `shard_rows` at a time."""
    waiting = {split: [] for split in spec.splits}
    numbers = dict.fromkeys(spec.splits, 0)

    def flush(split: str, table: pa.Table) -> tuple[str, pa.Table]:
        name = shard_name(split, numbers[split])
        numbers[split] += 1
        return name, table.append_column("shard", pa.array([name] * len(table)))

    for batch in corpus.batches():
        for split in spec.splits:
            part = pa.table(batch).filter(pa.compute.equal(batch["split"], split))
            waiting[split] = pa.concat_tables([*waiting[split], part]) if waiting[split] else part
            while len(waiting[split]) >= spec.shard_rows:
                yield flush(split, waiting[split].slice(0, spec.shard_rows).combine_chunks())
                waiting[split] = waiting[split].slice(spec.shard_rows)
    for split, rest in waiting.items():
        if len(rest):
            yield flush(split, rest.combine_chunks())


def print_plan(store_uri: str, spec: StoreSpec, store: Store | None) -> None:
    """What a run would do."""
    names, committed = list(spec.shards()), store.committed() if store else set()
    print(f"store {store_uri}: {len(names)} shards, {sum(name in committed for name in names)} committed already")
    for name, feature in spec.features.items():
        print(f"  {name}: {feature.rate:g} tokens per second of {feature.dtype} {list(feature.shape)}")


def summarize(store: Store, max_failed: float) -> None:
    """Count what is there. Raises JobError when rows are missing or too many failed."""
    indexed, failed = store.counts()
    rows = store.spec.rows
    print(f"{store.uri}: {rows} rows = {indexed} indexed + {failed} failed", flush=True)
    if failed:
        failures = store.failures()
        for group in failures.group_by(["stage", "error"]).aggregate([("clip_id", "count")]).to_pylist():
            print(f"  {group['clip_id_count']} x {group['stage']}: {group['error']}")
        for row in failures.slice(0, 5).to_pylist():
            print(f"  {row['clip_id']}: {row['message']}")
        print(f"  all of them: {store.uri}/failures/*.parquet")
    if indexed + failed != rows:
        raise JobError(f"{rows - indexed - failed} rows are in neither index nor failures: run the same command again")
    if failed > max_failed * rows:
        raise JobError(f"{failed} of {rows} clips failed, more than --max-failed {max_failed:g} allows")


if __name__ == "__main__":
    started = time.monotonic()
    main(extract, ExtractConfig, "Decode a corpus into a feature store. Run again to go on where it stopped.")
    print(f"done in {time.monotonic() - started:.0f} s")
