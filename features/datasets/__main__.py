"""Command line: `python -m features.datasets crema_d --root DIR --out corpus.parquet`."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from features.corpus.manifest import EVENTS
from features.datasets import ave, crema_d, grid, kinetics_sounds, memotion, mosi, ravdess, ucf101, utd_mhad
from features.datasets.layout import Layout, Row
from features.errors import CorpusError

READERS: dict[str, Callable[[Layout], Iterator[Row]]] = {
    "crema_d": crema_d.read,
    "kinetics_sounds": kinetics_sounds.read,
    "ave": ave.read,
    "ucf101": ucf101.read,
    "mosi": mosi.read,
    "mosei": mosi.read,
    "memotion": memotion.read,
    "grid": grid.read,
    "ravdess": ravdess.read,
    "utd_mhad": utd_mhad.read,
}
MEDIA = ("video", "image", "audio")
NAMED = 20  # missing clips that are named on the screen; a file next to the manifest names all


@dataclass(frozen=True)
class Options:
    """Write the manifest of an official benchmark from its official layout, and name the clips that are missing."""

    name: Annotated[
        Literal[
            "crema_d",
            "kinetics_sounds",
            "ave",
            "ucf101",
            "mosi",
            "mosei",
            "memotion",
            "grid",
            "ravdess",
            "utd_mhad",
        ],
        tyro.conf.Positional,
    ]
    root: Path
    """Folder of the media; what it has to look like stands at the head of its file in features/datasets."""
    out: Path
    """Manifest to write (.parquet); paths in it are relative to its folder."""
    lists: Path | None = None
    """Folder of the official lists; the root when not given."""
    val_share: float = 0.1
    """Share (0-1) of the training clips to hold out where the benchmark has no val split and no people set aside."""
    split: int = 1
    """Which of UCF101's three official splits."""
    pickle: str | None = None
    """MOSI and MOSEI: MMSA's file of features to read instead of the videos, such as unaligned_50.pkl."""


def write(options: Options) -> tuple[Counter[str], list[str]]:
    """Write the manifest; returns the clips by split, missing ones included, and the names of those that are missing.

    Raises CorpusError where the layout is not the official one, or no clip is present.
    """
    if options.out.suffix != ".parquet":
        raise CorpusError(f"--out {options.out}: name a .parquet file")
    if not 0 <= options.val_share < 1:
        raise CorpusError(f"--val-share {options.val_share}: must lie in [0, 1)")
    if options.pickle and options.name not in ("mosi", "mosei"):
        raise CorpusError(f"--pickle is of mosi and mosei, not of {options.name}")
    if options.split != 1 and not (options.name == "ucf101" and options.split in (2, 3)):
        raise CorpusError(f"--split {options.split}: ucf101 has the splits 1, 2 and 3, the others one")
    for folder in (options.root, options.lists or options.root):
        if not folder.is_dir():
            raise CorpusError(f"{folder} is no folder")
    vectors = options.out.with_suffix("")
    layout = Layout(options.root, options.lists or options.root, options.val_share, options.split, vectors)
    rows = list(mosi.read_pickle(layout, options.pickle) if options.pickle else READERS[options.name](layout))
    present = [row for row in rows if _first_file(row) is not None]
    missing = [row["clip_id"] for row in rows if _first_file(row) is None]
    if not present:
        raise CorpusError(f"{options.root} has none of the {len(rows)} clips of the lists, such as {missing[0]}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(present, options.out.parent), options.out)
    return Counter(row["split"] for row in rows), missing


def _first_file(row: Row) -> Any:
    """What a clip cannot be without: the first of its files."""
    return next(value for name, value in row.items() if name in MEDIA or name.endswith("_features"))


def _table(rows: Sequence[Row], folder: Path) -> pa.Table:
    columns = {name: [_portable(row[name], folder) for row in rows] for name in rows[0]}
    types = {"event": EVENTS, "word": EVENTS, "text": pa.string()}
    return pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})


def _portable(value: Any, folder: Path) -> Any:
    """A path relative to the manifest's folder, with the place in the file if it has one; other values as they are."""
    if isinstance(value, tuple):
        return f"{os.path.relpath(value[0], folder)}{value[1]}"
    return os.path.relpath(value, folder) if isinstance(value, Path) else value


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 0 also where clips are missing."""
    options = tyro.cli(Options, prog="python -m features.datasets", args=arguments)
    try:
        splits, missing = write(options)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{splits[split]} {split}" for split in ("train", "val", "test"))
    print(f"{options.name}: {splits.total()} clips in the official lists ({counts}), {len(missing)} of them missing")
    if missing:
        names = options.out.with_suffix(".missing.txt")
        names.write_text("".join(f"{name}\n" for name in missing))
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        print(f"missing: {', '.join(missing[:NAMED])}{more}; all in {names}")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
