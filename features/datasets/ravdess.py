"""RAVDESS (Livingstone & Russo 2018): 24 actors speak two sentences in eight emotions.

    ROOT/.../Actor_12/01-01-06-01-02-01-12.mp4     picture and sound (01-...); the picture alone (02-...) serves as well
    ROOT/.../Actor_12/03-01-06-01-02-01-12.wav     the sound; without it, the video's own is used

A name's numbers are: modality, channel, emotion, intensity, statement, repetition, actor. The speech is read, all 1,440
performances of it. The songs, which have six of the emotions and 23 of the actors, are left out. Without any video, the
corpus is one of sound. There is no official split: `fold` holds the five folds of actors of Luna-Jimenez et al. 2022,
test is fold 0, val is fold 1. Not run on an official download.
"""

from collections.abc import Iterator
from itertools import product

from features.datasets.layout import VIDEO, Layout, Row

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
INTENSITIES = ("normal", "strong")
STATEMENTS = ("kids", "dogs")  # "Kids are talking by the door", "Dogs are sitting by the door"
FOLDS = ((2, 5, 14, 15, 16), (3, 6, 7, 13, 18), (10, 11, 12, 19, 20), (8, 17, 21, 23, 24), (1, 4, 9, 22))
SPLITS = {0: "test", 1: "val"}


def read(layout: Layout) -> Iterator[Row]:
    """A row per performance of speech: video, audio, emotion, intensity, statement; the actor is its group."""
    videos, sounds = layout.media(*VIDEO), layout.media("wav")
    for fold, actors in enumerate(FOLDS):
        for actor, name, labels in performances(actors):
            video = videos.get(f"01-{name}") or videos.get(f"02-{name}")
            yield {
                "clip_id": name,
                **({"video": video} if videos else {}),
                "audio": sounds.get(f"03-{name}"),
                "split": SPLITS.get(fold, "train"),
                "fold": fold,
                "group": f"actor{actor:02d}",
                **labels,
            }


def performances(actors: tuple[int, ...]) -> Iterator[tuple[int, str, dict[str, str]]]:
    """What these actors spoke: the actor, the name without its modality, the labels. Neutral has no strong form."""
    grid = product(actors, enumerate(EMOTIONS, 1), enumerate(INTENSITIES, 1), enumerate(STATEMENTS, 1), (1, 2))
    for actor, (e, emotion), (i, intensity), (s, statement), repetition in grid:
        if (emotion, intensity) != ("neutral", "strong"):
            numbers = (1, e, i, s, repetition, actor)
            labels = {"emotion": emotion, "intensity": intensity, "statement": statement}
            yield actor, "-".join(f"{number:02d}" for number in numbers), labels
