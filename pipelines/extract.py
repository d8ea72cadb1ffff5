#!/usr/bin/env python
"""Extract: a corpus of clips becomes a feature store, on any number of machines (Ray Data).

Each task takes one shard of the plan, decodes its clips in a process of its own, writes the shard and commits it. A
clip that crashes, hangs or exhausts memory is recorded in failures/ and costs only itself. Run the same command again
to resume a run that was killed; over a finished store it does nothing, tries failed clips again (`--retry-failed`), or
extracts the clips by which the manifest has grown (`--extend`).
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated

import pyarrow.compute as pc
import ray
from pyarrow.fs import FileType
from rich.table import Table

from features import s3
from features.corpus.events import NO_TIME
from features.corpus.manifest import MEDIA, VECTORS, Corpus, read_corpus
from features.corpus.tasks import Task
from features.corpus.validation import validate
from features.decode import text, vectors
from features.decode.specs import AudioSpec, EncoderSpec, ImageSpec, TextSpec, VectorSpec, VideoSpec
from features.errors import FeaturesError, StoreError, one_line
from features.extractor import Extraction, extract_shard
from features.files import find_file, open_fs, split_place
from features.store import Feature, Store, StoreSpec
from features.store.growth import apply_change, changed_spec
from features.store.inspect import make_console
from features.store.lock import StoreLock
from features.store.plan import write_plan
from features.store.quality import QualitySpec, follows_faces
from features.store.shards import (
    create_store,
    failed_shards,
    find_any_store,
    find_store,
    require_same_decoding,
    sweep_litter,
)
from features.store.spec import default_shard_rows
from infra.doctor import ray_access, require, storage
from pipelines.common.cli import Progress, main, require_at_least, resolve_uri
from pipelines.common.cluster import start_ray
from pipelines.common.embedding import shared_networks
from pipelines.common.errors import JobError
from pipelines.common.networks import resolved
from pipelines.common.primitives import OPTIONAL_LIST
from pipelines.training.like import require_default, spec_like, with_places

LOOKED_AT = 500  # clips whose headers say whether there is sound at all; of a larger corpus nobody looks


@dataclass(frozen=True)
class ExtractConfig:
    """Options of the extract job."""

    corpus: str
    """manifest (.csv or .parquet) or folder of class folders; path or URI"""
    store: str
    """feature store to make or to resume; path or URI"""
    tasks: tuple[str, ...] = ()
    """label columns, `name` or `name:KIND`, KIND classification, regression, sentiment (MOSI's scale of -3 to 3),
    events (one bin a second) or events@25 (25 bins a second); none named = every label column"""
    unlabelled: bool = False
    """clips to predict (pipelines/predict.py): no label is read, and not every split needs a clip"""
    modalities: tuple[str, ...] = ()
    """which modalities to extract: video, audio, image, text, or NAME of a column NAME_features, which goes before a
    medium of that name; none named = all that the corpus has a source of"""
    video: VideoSpec = field(default_factory=VideoSpec)
    audio: AudioSpec = field(default_factory=AudioSpec)
    image: ImageSpec = field(default_factory=ImageSpec)
    text: TextSpec = field(default_factory=TextSpec)
    vectors: VectorSpec = field(default_factory=VectorSpec)
    quality: QualitySpec = field(default_factory=QualitySpec)
    like: str = ""
    """a store, a trained model, models:/NAME/VERSION or models:/NAME@ALIAS whose options are taken: new clips are
    encoded just as its own were. Text, video and image of a network from a file also need its place (--text.encoder,
    --video.weights)"""
    shard_rows: int = 0
    """clips per shard: the unit of work, of commit, and of loss when a machine dies; 0 = as many as in the store that
    is resumed, and in a new one 64, or more for a corpus of millions, for about 20,000 shards in all"""
    concurrency: int = 0
    """decoding processes over the whole cluster; 0 = one per CPU"""
    gpus: int = -1
    """GPUs for the networks of video, sound and images, each for many clips at a time; -1 = those that are free; where
    there is none, or for 0, they run on CPUs (numbers differ in their last bits)"""
    timeout: float = 120.0
    """seconds that one clip may take before it counts as failed"""
    memory_gb: float = 4.0
    """GB of memory that decoding one clip may take before it counts as failed"""
    max_failed: float = 0.05
    """share of clips (0-1) that may fail before the job's exit code is not 0"""
    retry_failed: Annotated[tuple[str, ...] | None, OPTIONAL_LIST] = None
    """try failed clips again: those of the named classes or stages (Timeout, Crash, video, ...), or all of them"""
    extend: bool = False
    """the manifest has grown since the store was begun, by clips after the old ones of their split: extract the new
    ones into shards of their own, and leave the old ones as they are"""
    dry_run: bool = False
    """check the corpus and print the plan; write nothing"""

    def __post_init__(self) -> None:
        require_at_least(
            self, {"shard_rows": 0, "concurrency": 0, "gpus": -1, "timeout": 1e-3, "memory_gb": 1e-3, "max_failed": 0}
        )
        if self.unlabelled and self.tasks:
            raise JobError(
                f"--tasks {','.join(self.tasks)}: labels to read, where --unlabelled says that there are none"
            )
        if self.like:
            require_default(self, ("video", "audio", "image", "text", "vectors", "quality"))


def extract(config: ExtractConfig) -> None:
    """The job: check the corpus, plan, run what is not committed yet, count."""
    corpus_uri, store_uri = resolve_uri("--corpus", config.corpus), resolve_uri("--store", config.store)
    tasks = ",".join(config.tasks) or None
    corpus = read_corpus(corpus_uri).declare(tasks)
    report = validate(corpus, tasks, config.unlabelled)
    encoder = (
        plan_like(config, corpus, report.sources) if config.like else plan_encoders(config, corpus, report.sources)
    )
    begun = find_any_store(store_uri)
    asked = config.modalities or config.like or "audio" in report.sources
    if not asked and (begun is None or "audio" not in begun.spec.features):
        encoder = without_missing_sound(encoder, corpus)
    require_time(corpus, encoder, report.tasks)
    own = begun.spec.shard_rows if begun else default_shard_rows(sum(report.splits.values()))
    content = (encoder.features(), report.tasks, report.splits, config.shard_rows or own, report.digest)
    spec = StoreSpec(*content, decoding=encoder.decoding())
    print(f"corpus {corpus_uri}: {spec.rows} clips ({', '.join(f'{n} {s}' for s, n in spec.splits.items())})")
    for note in (*corpus.notes, *report.notes):
        print(f"note: {note}")
    print("tasks: " + (", ".join(f"{t.name} ({len(t.classes) or t.kind})" for t in spec.tasks) or "none"), flush=True)
    existing, changed = find_store_to_extract(config, store_uri, spec, corpus)
    spec = changed or (existing.spec if existing else spec)
    require_media(corpus)
    if config.dry_run:
        return print_plan(store_uri, spec, existing)
    require(ray_access(), storage(store_uri))  # decoders are looked at where they run
    start_ray()
    with StoreLock(store_uri) as lock:
        store = create_store(store_uri, spec) if changed is None or existing is None else existing
        if removed := sweep_litter(store):
            print(f"removed {removed} files of a run that was interrupted")
        if changed is not None:
            require_same_decoding(store, encoder.decoding())
            store = apply_change(store, changed, corpus)
        write_plan(store, corpus)
        committed = store.committed()
        pending = [name for name in store.spec.shards() if name not in committed]
        if config.retry_failed is not None:
            pending += shards_to_retry(store, config.retry_failed, pending)
        if pending:
            require_same_decoding(store, encoder.decoding())
        run(config, corpus, store, encoder, pending, lock)
        sweep_litter(store)  # of workers that died
    summarize(store, config.max_failed)


def find_store_to_extract(
    config: ExtractConfig, store_uri: str, spec: StoreSpec, corpus: Corpus
) -> tuple[Store | None, StoreSpec | None]:
    """The store where there is one, and the spec that it is to have where its manifest changed.

    A manifest may change in the sources of clips that failed, with --retry-failed, and grow, with --extend. Raises
    StoreError for any other difference.
    """
    try:
        return find_store(store_uri, spec), None
    except StoreError:
        if config.retry_failed is None and not config.extend:
            raise
        store = find_any_store(store_uri)
        changed = changed_spec(store, spec, corpus, config.extend) if store else None
        if changed is None:
            raise
    return store, changed


def plan_encoders(config: ExtractConfig, corpus: Corpus, sources: Collection[str]) -> EncoderSpec:
    """What the store will hold of the modalities asked for; sources: the manifest's columns that are not empty.

    Raises JobError for a modality without a source, FeaturesError where a network or given vectors do not load.
    """
    given = {name.removesuffix(VECTORS) for name in sources if name.endswith(VECTORS)}
    known = given | set(sources) & set(MEDIA) | ({"audio"} if "video" in sources else set())
    if missing := sorted(set(config.modalities) - known):
        raise JobError(f"--modalities {','.join(missing)}: {corpus.uri} has a source of {', '.join(sorted(known))}")
    wanted = set(config.modalities) or known
    if unknown := sorted(name for name, _, _ in (r.partition("=") for r in config.vectors.rates) if name not in given):
        raise JobError(f"--vectors.rates {unknown[0]}: {corpus.uri} has no column {unknown[0]}{VECTORS} with values")
    spec = EncoderSpec(
        video=resolved("video", config.video) if "video" in wanted - given else None,
        audio=resolved("audio", config.audio) if "audio" in wanted - given else None,
        quality=config.quality,
        image=resolved("image", config.image) if "image" in wanted - given else None,
        text=resolved("text", config.text) if "text" in wanted - given else None,
        vectors=config.vectors if wanted & given else None,
    )
    declared = {"text": text.find_feature(spec.text)} if spec.text is not None else {}
    declared |= vectors.find_features(corpus, sorted(wanted & given), config.vectors)
    return replace(spec, declared=declared)


def plan_like(config: ExtractConfig, corpus: Corpus, sources: Collection[str]) -> EncoderSpec:
    """What the store of --like holds. Raises JobError where the corpus has a source of none of it."""
    encoder = spec_like(config.like, with_places(config), config.modalities)
    known = set(sources) | ({"audio"} if "video" in sources else set())
    wanted = [name + VECTORS if name in encoder.given() else name for name in encoder.features()]
    if not known.intersection(wanted):
        raise JobError(
            f"--like {config.like} takes {', '.join(wanted)}, and {corpus.uri} has {', '.join(sorted(known))}"
        )
    return encoder


def without_missing_sound(encoder: EncoderSpec, corpus: Corpus) -> EncoderSpec:
    """The same spec without sound where no video of a small corpus has any, and nobody asked for it."""
    if encoder.audio is None or encoder.video is None:
        return encoder
    clips = list(itertools.islice(corpus.clips(), LOOKED_AT + 1))
    uris = {uri for clip in clips if (uri := clip.media(corpus.folder).get("video")) is not None}
    if len(clips) > LOOKED_AT or any("://" in uri or may_have_sound(uri) for uri in uris):
        return encoder
    print(
        f"note: none of the {len(uris)} videos has sound: the store has no audio; --modalities video,audio asks for it"
    )
    return replace(encoder, audio=None)


def may_have_sound(uri: str) -> bool:
    """Whether a video has a sound track; also where it does not open, and extraction says why."""
    from features.decode.probe import has_sound

    try:
        return has_sound(uri)
    except FeaturesError:
        return True


def require_time(corpus: Corpus, encoder: EncoderSpec, tasks: Iterable[Task]) -> None:
    """Raise JobError for events in clips of which nothing says how long they are."""
    timed = "end" in corpus.schema.names or any(feature.rate for feature in encoder.features().values())
    if events := [task.name for task in tasks if task.kind == "events" and not timed]:
        raise JobError(f"--tasks {events[0]}: every clip of {corpus.uri} {NO_TIME}")


def require_media(corpus: Corpus) -> None:
    """Raise JobError where none of the first clips' files is there: a wrong folder or prefix, not some lost files.

    Says how many of them are lost where some are.
    """
    clips, lost, why = itertools.islice(corpus.clips(), 32), list[str](), ""
    uris = [uri for clip in clips for uri in clip.media(corpus.folder).values()]
    for uri in uris:
        try:
            fs, path = open_fs(split_place(uri)[0])
            if find_file(fs, path).type == FileType.File:
                continue
        except (FeaturesError, OSError) as error:  # a name that cannot be, storage that lets nobody in
            if s3.is_transient(error.__cause__ or error):  # away: the next name would wait for it as long
                raise
            why = why or f" ({s3.explain(error) or one_line(error)})"
        lost.append(uri)
    if len(lost) < len(uris):
        if lost:
            print(f"note: {len(lost)} of the first {len(uris)} media files are missing: {lost[0]}{why}")
    elif uris:
        raise JobError(
            f"corpus {corpus.uri}: none of the first {len(uris)} media files is there, such as {uris[0]}{why}; "
            "relative paths are taken from the manifest's folder"
        )


def shards_to_retry(store: Store, classes: tuple[str, ...], pending: Collection[str]) -> list[str]:
    """Committed shards with failures to try again.

    Raises JobError for a class that no failure is of, where nothing is pending either: what is pending may be what is
    left of a run that was killed, and that had cured all of that class.
    """
    if not store.counts()[1]:
        return []
    failures = store.failures().select(["stage", "error"])
    known = {value for column in failures.columns for value in column.unique().to_pylist()}
    if not pending and (unknown := sorted(set(classes) - known)):
        raise JobError(f"--retry-failed {','.join(unknown)}: {store.uri} has failures of {', '.join(sorted(known))}")
    counts = failed_shards(store, classes)
    print(f"trying again {sum(counts.values())} failed clips in {len(counts)} shards")
    return list(counts)


def run(
    config: ExtractConfig, corpus: Corpus, store: Store, encoder: EncoderSpec, pending: list[str], lock: StoreLock
) -> None:
    """Extract the pending shards on the whole cluster."""
    if not pending:
        return print("nothing to do: every shard is committed")
    cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.concurrency or cpus, len(pending))
    total, rows = sum(1 for _ in store.spec.shards()), sum(map(store.spec.rows_of, pending))
    print(f"{len(pending)} of {total} shards to extract, {workers} decoding processes", flush=True)
    progress, failed = Progress("extract", store.spec.rows, done=store.spec.rows - rows), 0
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Only names travel, one to a block: a block is what a dead worker costs.
    shards = ray.data.from_items([{"shard": name} for name in pending], override_num_blocks=len(pending))
    with shared_networks(encoder, config.gpus, workers) as embed:
        bare, retry = replace(corpus, table=None), config.retry_failed
        extraction = Extraction(store.uri, bare, encoder, config.timeout, config.memory_gb, retry, embed)
        # Tasks rather than actors: those of a node that died run elsewhere, wherever a CPU is free.
        results = shards.map_batches(
            extract_shard,  # type: ignore[arg-type]  # Ray's hint leaves out functions that take fn_kwargs
            fn_kwargs={"extraction": extraction},
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=workers),
            num_cpus=1,
        )
        for row in results.iter_rows():
            if row["error"]:
                raise JobError(row["error"])
            failed += row["failed"]
            progress.update(row["indexed"] + row["failed"], f"{failed} failed")
            lock.check()


def print_plan(store_uri: str, spec: StoreSpec, store: Store | None) -> None:
    """What a run would do."""
    names, committed = list(spec.shards()), store.committed() if store else set()
    print(f"store {store_uri}: {len(names)} shards, {sum(name in committed for name in names)} committed already")
    for name, feature in spec.features.items():
        print(f"  {name}: {describe(name, feature)}")


def describe(name: str, feature: Feature) -> str:
    """A modality's rate and shape, and the option that gives it a rate where it has none."""
    rate = f"{feature.rate:g} tokens per second" if feature.rate else "tokens without time"
    what = f"{rate} of {feature.dtype} {list(feature.shape)}"
    without_time = not feature.rate and feature.encoder.get("name") == "vectors"
    return f"{what}; --vectors.rates {name}=30 gives them 30 per second" if without_time else what


def print_modalities(store: Store, indexed: int) -> None:
    """Per modality how many clips have it, and how it is stored."""
    tokens = store.index(columns=[f"tokens_{name}" for name in store.spec.features]) if indexed else None
    for name, feature in store.spec.features.items():
        present = 0 if tokens is None else pc.sum(pc.greater(tokens[f"tokens_{name}"], 0)).as_py() or 0
        line = f"  {name}: in {present} of {indexed} clips"
        if present:
            print(f"{line}, {describe(name, feature)}")
        else:
            others = ",".join(other for other in store.spec.features if other != name)
            print(f"{line}: leave it out with --modalities {others}" if others else line)
    if indexed and follows_faces(store.spec.features):
        print_faces(store)


def print_faces(store: Store) -> None:
    """In how many clips the crop found no face to follow, and what it shows of them."""
    found = store.index(columns=["face_found"])["face_found"].drop_null()
    without = pc.sum(pc.equal(found, 0)).as_py() or 0
    middle = "; of the others it shows the middle (face_found 0 in the index)" if without else ""
    print(f"  crop: a face in {len(found) - without} of {len(found)} videos{middle}")


def summarize(store: Store, max_failed: float) -> None:
    """Count what is there. Raises JobError when rows are missing or too many failed."""
    indexed, failed = store.counts()
    rows = store.spec.rows
    print(f"{store.uri}: {rows} rows = {indexed} indexed + {failed} failed", flush=True)
    print_modalities(store, indexed)
    if failed:
        print_failures(store)
    if indexed + failed != rows:
        raise JobError(f"{rows - indexed - failed} rows are in neither index nor failures: run the same command again")
    if failed > max_failed * rows:
        raise JobError(f"{failed} of {rows} clips failed, more than --max-failed {max_failed:g} allows")


def print_failures(store: Store) -> None:
    """Failures by class, most frequent first, with an example of each."""
    table = Table("clips", "stage", "class", "for example")
    groups = store.failures().group_by(["stage", "error"], use_threads=False)
    groups = groups.aggregate([("clip_id", "count"), ("message", "first"), ("clip_id", "first")])
    for group in groups.sort_by([("clip_id_count", "descending")]).to_pylist():
        example = f"{group['clip_id_first']}: {group['message_first']}"
        table.add_row(str(group["clip_id_count"]), group["stage"], group["error"], example)
    make_console().print(table)
    print(f"all of them: {store.uri}/failures/*.parquet; --retry-failed [CLASS] tries them again", flush=True)


if __name__ == "__main__":
    main(extract, ExtractConfig, "Decode a corpus into a feature store. Run again to resume.")
