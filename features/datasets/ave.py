"""AVE (Tian et al. 2018): clips of ten seconds with one event that is seen and heard, in which seconds is labelled.

    ROOT/AVE/RUhOCu3LNXM.mp4
    LISTS/Annotations.txt                    `Church bell&RUhOCu3LNXM&good&0&10`: category, video, quality, start, end
    LISTS/trainSet.txt, valSet.txt, testSet.txt           of the same lines, as the data set has them; or
    LISTS/train_order.h5, val_order.h5, test_order.h5     of numbers of lines, as the code has them

3,339 / 402 / 402 events in 4,097 videos: one video may have several categories, each a clip of its own, and then be in
two splits. The paper's task is `event`, a class per second (`--tasks event:events`); `category` is the clip's class.
"""

from collections.abc import Iterator

import numpy as np

from features.corpus.manifest import SPLITS
from features.datasets.layout import VIDEO, Layout, Row, fields
from features.errors import CorpusError

SECONDS = 10.0


def read(layout: Layout) -> Iterator[Row]:
    """A row per annotated event: video, the event's second of start and end, category."""
    videos = layout.media(*VIDEO)
    for split, lines in _splits(layout).items():
        for category, video, _, start, end in fields(lines, "&", 5, "Annotations.txt"):
            event = {"start": float(start), "end": float(end), "label": category}
            yield {
                "clip_id": f"{video}/{category}",
                "video": videos.get(video),
                "end": SECONDS,
                "split": split,
                "category": category,
                "event": [event] if float(end) > float(start) else [],  # a few annotations last for no second
            }


def _splits(layout: Layout) -> dict[str, list[str]]:
    names = [f"{split}Set.txt" for split in SPLITS]
    if all(any(layout.lists.rglob(name)) for name in names):
        return {split: _annotations(layout, name) for split, name in zip(SPLITS, names, strict=True)}
    lines = _annotations(layout, "Annotations.txt")
    orders = {split: _order(layout.list_file(f"{split}_order.h5").read_bytes()) for split in SPLITS}
    if sorted(number for order in orders.values() for number in order) != list(range(len(lines))):
        raise CorpusError(f"{layout.lists}: the *_order.h5 files do not share out the lines of Annotations.txt")
    return {split: [lines[number] for number in order] for split, order in orders.items()}


def _annotations(layout: Layout, name: str) -> list[str]:
    lines = [line for line in layout.lines(name) if line.strip()]
    return lines[1:] if lines[0].startswith("Category&") else lines


def _order(content: bytes) -> list[int]:
    """The one array of an order file, int64 and the last thing in it; that the three are a partition is the check."""
    if not content.startswith(b"\x89HDF"):
        raise CorpusError("an *_order.h5 file is no HDF5")
    header = 2144  # bytes in front of the array in files of this kind
    return np.frombuffer(content[header : len(content) - (len(content) - header) % 8], "<i8").tolist()
