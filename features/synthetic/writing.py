"""Writing the corpus: clips in parallel, then the sidecars, and the manifest last, which says that the rest is there.

An interrupted run leaves `synthetic.json` (its arguments) and finished clips but no manifest; the same command
resumes it.
"""

import csv
import io
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

from features.errors import CorpusError
from features.progress import counted
from features.synthetic.render import write_clip
from features.synthetic.semantics import RELIABILITY, RHYTHMS, TASKS, Latents, ceilings, draw

VERSION = 1  # of the clips' meaning and look: raise it when the same arguments give other clips
CEILINGS_NOTE = "Bayes-optimal accuracy, exact by enumeration; presumes every planted cue is read without error"


def generate(
    out: Path,
    clips: int,
    seed: int = 0,
    val_share: float = 0.1,
    test_share: float = 0.3,
    rhythms: bool = False,
    processes: int | None = None,
) -> int:
    """Write a corpus to a folder and return how many clips were missing and are now there (0: it was complete).

    rhythms: the manifest has the two rhythms as tasks too. Same clips.
    Raises CorpusError when the splits cannot be filled or the folder holds anything else than this corpus.
    """
    if seed < 0:
        raise CorpusError(f"--seed {seed} is negative: give 0 or more")
    if processes is not None and processes < 1:
        raise CorpusError(f"--processes {processes} is below 1: give 1 or more")
    corpus = draw(clips, seed, val_share, test_share)
    arguments = {
        "version": VERSION, "clips": clips, "seed": seed, "val_share": val_share, "test_share": test_share,
    }  # fmt: skip
    if rhythms:
        arguments["rhythms"] = True
    try:
        _claim(out, arguments)
        missing = [latents for latents in corpus if not _clip_path(out, latents).exists()]
        if (out / "corpus.csv").exists() and not missing:
            return 0
        _render(out, missing, seed, min(processes or os.cpu_count() or 1, max(len(missing), 1)))
        write_sidecars(out, corpus, {**TASKS, **RHYTHMS} if rhythms else TASKS)
    except OSError as error:
        raise CorpusError(f"--out {out}: {error.strerror or error}") from error
    return len(missing)


def _claim(out: Path, arguments: dict[str, float]) -> None:
    """Make the folder ours, or see that it is the same corpus begun earlier."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):
        raise CorpusError(f"--out {out} is a URI: write to a local folder, then copy it")
    record = out / "synthetic.json"
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except ValueError:
            before = None
        if before != arguments:
            raise CorpusError(
                f"--out {out} already holds another corpus ({before}, now {arguments}): give a new folder"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise CorpusError(f"--out {out} already holds other files: give a new or empty folder")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    for litter in (out / "clips").glob("*.part*"):
        litter.unlink()
    if not record.exists():
        _replace(record, json.dumps(arguments) + "\n")


def _render(out: Path, missing: Sequence[Latents], seed: int, processes: int) -> None:
    for _ in counted(_each(partial(_write_one, out, seed), missing, processes), len(missing)):
        pass


def _each(task: partial, items: Sequence[Latents], processes: int) -> Iterator[None]:
    if processes == 1:
        yield from map(task, items)
        return
    # spawn: libraries with threads of their own (PyAV's, torch's in a caller) do not survive fork.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(task, items, chunksize=4)


def _write_one(out: Path, seed: int, latents: Latents) -> None:
    path = _clip_path(out, latents)
    part = path.with_suffix(f".part{os.getpid()}")
    try:
        write_clip(latents, seed, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _clip_path(out: Path, latents: Latents) -> Path:
    return out / "clips" / f"{latents.clip_id}.mp4"


def write_sidecars(out: Path, corpus: Sequence[Latents], tasks: Mapping[str, Sequence[str]]) -> None:
    """Write latents.csv (never read by training), ceilings.json and, last, the manifest corpus.csv with `tasks`."""
    cues = [field.name for field in fields(Latents) if field.name not in ("index", "pitches")]
    latents = (
        [clip.clip_id, *(getattr(clip, cue) for cue in cues), "".join(map(str, clip.pitches))] for clip in corpus
    )
    _replace(out / "latents.csv", _csv(["clip_id", *cues, "pitches"], latents))
    reliability = {cue: float(p) for cue, p in RELIABILITY.items()}
    report = {"note": CEILINGS_NOTE, "cue_reliability": reliability, "ceilings": ceilings()}
    _replace(out / "ceilings.json", json.dumps(report, indent=2) + "\n")
    manifest = (
        [clip.clip_id, f"clips/{clip.clip_id}.mp4", clip.split, *(tasks[task][getattr(clip, task)] for task in tasks)]
        for clip in corpus
    )
    _replace(out / "corpus.csv", _csv(["clip_id", "video", "split", *tasks], manifest))


def _csv(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(text)
    part.replace(path)
