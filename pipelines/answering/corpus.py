"""predict --corpus: answers for a media file, a folder of them, or a manifest, without a store of one's own.

One clip, and up to `HERE` of them, are answered in this process, without Ray. More become a store first
(OUT/_store, extracted with the options of the model's own store), which is then predicted as any store is: both parts
run on the cluster and resume.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSelector, FileType

from features.corpus.folder import SUFFIXES
from features.corpus.manifest import Clip, read_corpus
from features.decode.specs import AudioSpec, ImageSpec, VideoSpec
from features.encoders.registry import KINDS, kind_of
from features.errors import one_line
from features.files import open_fs, resolve, write_atomic
from pipelines.answering.clips import Answer, ClipAnswerer, clip_of_file, make_clip
from pipelines.common.cli import Progress, resolve_uri
from pipelines.common.errors import JobError
from pipelines.training.trained import open_model

Predict = Callable[[Any], None]
HERE = 32  # clips up to which starting Ray takes longer than answering
MANIFESTS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".pq")


class Asked(Protocol):
    """What is read here of the options of pipelines/predict.py, a dataclass."""

    @property
    def corpus(self) -> str:
        """Raw clips: a media file, a folder or a manifest."""
        ...

    @property
    def model(self) -> str:
        """The trained model."""
        ...

    @property
    def out(self) -> str:
        """Folder for the predictions, "" for none."""
        ...

    @property
    def weights(self) -> str:
        """Weights of ResNet-18, where the store was made with it."""
        ...


def predict_corpus(config: Any, predict: Predict) -> None:
    """The job for raw clips. predict: the job for a store.

    Raises JobError where there is no clip, or none that can be used.
    """
    started = time.perf_counter()
    clips, folder = find_clips(resolve_uri("--corpus", config.corpus))
    if len(clips) > HERE:
        return predict_extracted(config, clips, folder, predict)
    places = dict.fromkeys(("video", "audio", "image"), config.weights)
    answerer = ClipAnswerer(open_model("--model", config.model), places=places)
    loaded = time.perf_counter()
    answerer.start()
    ready = time.perf_counter()
    print(f"model loaded in {loaded - started:.1f} s, decoder ready in {ready - loaded:.1f} s", flush=True)
    answers, progress = [], Progress("predict", len(clips))
    for answer in answerer.answer_many(clips, folder):
        answers.append(answer)
        if len(clips) > 1:
            progress.update(1)
    answerer.close()
    write_answers(config, answers)
    if failed := [(answer.clip_id, answer.failure) for answer in answers if answer.failure]:
        for clip_id, failure in failed:
            print(f"{clip_id}: {failure['error']}: {failure['message']}", flush=True)
        if len(failed) == len(answers):
            _, first = failed[0]
            raise JobError(f"--corpus {config.corpus}: no clip can be used: {first['error']}: {first['message']}")


def find_clips(uri: str) -> tuple[list[Clip], str]:
    """The clips of a media file, a folder or a manifest, and the folder that their paths are relative to.

    Files of a folder that differ in their ending alone are one clip. Labels and splits, where there are any, are not
    read. Raises JobError where there is no clip, CorpusError for a manifest that does not read.
    """
    if uri.lower().endswith(MANIFESTS):
        corpus = read_corpus(uri)
        if "clip_id" not in corpus.schema.names:
            raise JobError(f"--corpus {uri} has no column clip_id; it has {', '.join(corpus.schema.names)}")
        clips = [replace(Clip.from_row(row, ()), split="test") for b in corpus.batches() for row in b.to_pylist()]
        if not clips:
            raise JobError(f"--corpus {uri} has no row")
        if len({clip.clip_id for clip in clips}) < len(clips):
            raise JobError(f"--corpus {uri}: a clip_id is there more than once")
        return clips, corpus.folder
    try:
        fs, path = open_fs(uri)
        kind = fs.get_file_info(path).type
    except OSError as error:
        raise JobError(f"--corpus {uri} does not open: {one_line(error)}") from error
    if kind == FileType.NotFound:
        raise JobError(f"--corpus {uri} does not exist: name a media file, a folder of them, a .csv or a .parquet")
    if kind == FileType.File:
        return [clip_of_file(uri)], ""
    files = [f.path for f in fs.get_file_info(FileSelector(path, recursive=True)) if f.type == FileType.File]
    by_id: dict[str, dict[str, str]] = {}
    for file in sorted(files):
        name = file[len(path.rstrip("/")) + 1 :]
        if any(part.startswith(".") for part in name.split("/")):
            continue
        clip_id, _, suffix = name.rpartition(".")
        if suffix.lower() in SUFFIXES:
            by_id.setdefault(clip_id, {}).setdefault(SUFFIXES[suffix.lower()], name)
    if not by_id:
        raise JobError(f"--corpus {uri} has no media file ({', '.join(SUFFIXES)}) below it")
    return [make_clip(clip_id, **media) for clip_id, media in by_id.items()], uri


def write_answers(config: Asked, answers: Sequence[Answer]) -> None:
    """OUT/clips.parquet, and OUT/_failures/ of clips that cannot be used; one clip's answer to the screen too."""
    tables = [answer.table for answer in answers if answer.table is not None]
    if len(answers) == 1 and tables:
        answer = answers[0]
        said = {name: value for name, value in answer.values.items() if name not in ("split", "fold")}
        print(json.dumps(said, indent=2), flush=True)
        decode, model = answer.seconds["decode"], answer.seconds["model"]
        print(f"answered in {decode + model:.3f} s: {decode:.3f} s to decode, {model:.3f} s in the model", flush=True)
    if not config.out:
        if len(answers) > 1:
            for table in tables:
                print(json.dumps(table.drop_columns(["split", "fold"]).to_pylist()[0]), flush=True)
        return
    out = resolve_uri("--out", config.out)
    failed = [{"clip_id": a.clip_id, **a.failure} for a in answers if a.failure]
    for folder, rows in ((out, tables), (f"{out}/_failures", [pa.Table.from_pylist(failed)] if failed else [])):
        if rows:
            _write(folder, "clips.parquet", pa.concat_tables(rows))
        else:  # an earlier start may have left one, when other clips failed
            fs, path = open_fs(folder)
            with contextlib.suppress(FileNotFoundError):
                fs.delete_file(f"{path}/clips.parquet")
    if tables:
        print(f"predictions of {len(tables)} clips: {out}/clips.parquet", flush=True)


def predict_extracted(config: Any, clips: Sequence[Clip], folder: str, predict: Predict) -> None:
    """Many clips: extract them as the model's store was, then predict that store."""
    from pipelines.extract import ExtractConfig, extract

    if not config.out:
        raise JobError(f"--out: name a folder for the predictions of {len(clips)} clips")
    out = resolve_uri("--out", config.out)
    rows = [_row(clip, folder) for clip in clips]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name in ("clip_id", "split") or any(row.get(name) for row in rows)]
    _write(f"{out}/_corpus", "corpus.parquet", pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]))
    store = f"{out}/_store"
    manifest = f"{out}/_corpus/corpus.parquet"
    read = tuple(open_model("--model", config.model).model.features)  # and no more than that, as of few clips
    asked = ExtractConfig(manifest, store, like=config.model, modalities=read, unlabelled=True, max_failed=1.0)
    if kind := kind_of(config.weights):  # as --video.encoder has it
        named = {"video": VideoSpec, "image": ImageSpec, "audio": AudioSpec}
        takes = {name: spec(encoder=config.weights) for name, spec in named.items() if name in KINDS[kind].of}
        asked = replace(asked, **takes)
    elif config.weights:
        resnets = {"video": VideoSpec, "image": ImageSpec}
        asked = replace(asked, **{n: spec(encoder="resnet18", weights=config.weights) for n, spec in resnets.items()})
    extract(asked)
    predict(replace(config, corpus="", store=store, out=out))


def _row(clip: Clip, folder: str) -> dict[str, Any]:
    """A manifest's row with every file by its whole path."""
    row: dict[str, Any] = {"clip_id": clip.clip_id, "split": "test", "text": clip.text}
    row |= {"start": clip.start, "end": clip.end}
    return row | {column: resolve(uri, folder) for column, uri in clip.media(folder).items()}


def _write(out: str, name: str, table: pa.Table) -> None:
    fs, path = open_fs(out)
    fs.create_dir(path, recursive=True)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(fs, f"{path}/{name}", buffer.getvalue().to_pybytes())
