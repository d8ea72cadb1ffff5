"""Kinetics-Sounds (Arandjelovic & Zisserman 2017): 31 classes of Kinetics-400 that are both seen and heard.

    ROOT/.../-3Mwkq-7TV4_000002_000012.mp4       Kinetics' own names, in folders of any kind
    LISTS/my_train.txt, my_test.txt              `NAME,SECONDS,CLASS` as OGM-GE has them: 14,799 / 2,597

The lists give the classes as numbers, and the test list clips as `VIDEO_START` in seconds without zeros. Some clips are
held out of train for validation.
"""

import re
from collections.abc import Iterator

from features.datasets.layout import VIDEO, Layout, Row, fields

ID = 11  # characters of a video's id, which may be digits and underscores too


def read(layout: Layout) -> Iterator[Row]:
    """A row per clip of the official lists: video (its sound is the video's own), label."""
    videos = {clip_of(name): path for name, path in layout.media(*VIDEO).items()}
    for split in ("train", "test"):
        for name, _, label in fields(layout.lines(f"my_{split}.txt"), ",", 3, f"my_{split}.txt"):
            yield {
                "clip_id": name,
                "video": videos.get(clip_of(name)),
                "split": layout.held_out(name) if split == "train" else split,
                "label": int(label),
            }


def clip_of(name: str) -> tuple[str, int]:
    """A clip's video and the second at which it starts: of `ID_2`, `ID_000002_000012` and `ID_2_12` the same."""
    match = re.fullmatch(r"_(\d+)(?:_\d+)?", name[ID:])
    return name[:ID], int(match[1]) if match else -1
