"""What becomes of each file of the media zoo: `python tests/helpers/zoo.py` prints the table.

One line per file: sample or failure, its stage and message, and the figures of the index's quality columns.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from storefiles import make_clip

from features.decode.isolation import IsolatedEncoder
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store.quality import QUALITY_SCHEMA
from features.store.samples import PackedSample
from features.store.shards import Failure

ZOO = Path(__file__).parents[2].parent / "shared/data/media_zoo"
SPEC = EncoderSpec(VideoSpec(size=32), AudioSpec())


def manifest() -> dict[str, dict[str, str]]:
    """The zoo's files with their manifest rows; ffmpeg_rc 0 is a file that FFmpeg decodes."""
    names, *lines = (ZOO / "manifest.csv").read_text().splitlines()
    # One by one: messages that were cut short have lost their closing quote.
    rows = [dict(zip(names.split(","), next(csv.reader([line])), strict=False)) for line in lines]
    return {row["file"]: row for row in rows}


def outcomes(spec: EncoderSpec = SPEC) -> Iterator[tuple[str, PackedSample | Failure]]:
    """Each file's name with its packed sample or failure, by the decoder that runs apart."""
    names = sorted(path.name for path in ZOO.glob("[0-9]*"))
    encoder = IsolatedEncoder(spec, timeout=60)
    for clip, outcome in encoder.encode((make_clip(name), {"video": str(ZOO / name)}) for name in names):
        yield clip.clip_id, outcome
    encoder.close()


def main() -> None:
    """Print the table, tab-separated."""
    print("file", "outcome", "stage", "message", "tokens", *QUALITY_SCHEMA.names, sep="\t")
    for name, outcome in outcomes():
        if isinstance(outcome, Failure):
            print(name, "failure", outcome.stage, outcome.message.replace(f"{ZOO}/", ""), sep="\t")
        else:
            tokens = " ".join(f"{m}={n}" for m, n in outcome.tokens.items())
            figures = (outcome.quality.get(figure) for figure in QUALITY_SCHEMA.names)
            cells = ("" if value is None else f"{value:.3g}" for value in figures)
            print(name, "sample", "", "", tokens, *cells, sep="\t")


if __name__ == "__main__":
    sys.exit(main())
