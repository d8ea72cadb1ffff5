"""Command line of the synthetic corpus: `python -m features.synthetic --out DIR --clips 240 --seed 0`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from features.errors import CorpusError
from features.synthetic.semantics import SOURCES, ceilings
from features.synthetic.writing import generate


@dataclass(frozen=True)
class Options:
    """Write a corpus of short mp4 clips with planted semantics, its manifest and its accuracy ceilings."""

    out: Path
    """Folder to write: clips/*.mp4, corpus.csv (the manifest), latents.csv, ceilings.json."""
    clips: int = 240
    """Number of clips in all splits together."""
    seed: int = 0
    """Seed of everything that is drawn; the same seed gives the same bytes for any number of processes."""
    val_share: float = 0.1
    """Share of the clips in the val split."""
    test_share: float = 0.3
    """Share of the clips in the test split; the rest is train."""
    rhythms: bool = False
    """The rhythms of picture and sound as two more tasks, video_rate and audio_rate, which help to learn `match`."""
    processes: int | None = None
    """Processes that render and encode; all processor cores when not given."""


def print_ceilings() -> None:
    """Print the best possible accuracy per task and source."""
    print("Best possible accuracy (every planted cue read without error):")
    print(f"{'task':<8}" + "".join(f"{source:>8}" for source in SOURCES))
    for task, row in ceilings().items():
        print(f"{task:<8}" + "".join(f"{row[source]:>8.3f}" for source in SOURCES))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = tyro.cli(Options, prog="python -m features.synthetic", args=arguments)
    try:
        written = generate(**vars(options))
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to resume", file=sys.stderr)
        return 130
    if written:
        print(f"{options.out / 'corpus.csv'}: {options.clips} clips ({written} written now)")
    else:
        print(f"{options.out / 'corpus.csv'}: complete already, nothing to do")
    print_ceilings()
    return 0


if __name__ == "__main__":
    sys.exit(main())
