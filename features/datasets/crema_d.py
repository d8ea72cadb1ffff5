"""CREMA-D (Cao et al. 2014): actors say a sentence in one of six emotions.

    ROOT/VideoFlash/1001_DFA_ANG_XX.flv      as the authors give it out; any video ending will do
    ROOT/AudioWAV/1001_DFA_ANG_XX.wav
    LISTS/train.csv, test.csv                `1001_DFA_ANG_XX,ANG`, the split that OGM-GE introduced: 6,698 / 744

The split is by clip: every actor is in both. Some clips are held out of train for validation.
"""

from collections.abc import Iterator

from features.datasets.layout import VIDEO, Layout, Row, fields


def read(layout: Layout) -> Iterator[Row]:
    """A row per clip of the official lists: video, audio, emotion."""
    videos, sounds = layout.media(*VIDEO), layout.media("wav")
    for split in ("train", "test"):
        for name, emotion in fields(layout.lines(f"{split}.csv"), ",", 2, f"{split}.csv"):
            yield {
                "clip_id": name,
                "video": videos.get(name),
                "audio": sounds.get(name),
                "split": layout.held_out(name) if split == "train" else split,
                "emotion": emotion,
            }
