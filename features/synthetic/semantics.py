"""What the clips mean: latent cues, how they depend on the answers, and the best accuracy anyone can reach.

label   four classes. Each of four cues shows the class with its reliability, otherwise one of the other three drawn
        uniformly; given the class the cues are independent. Both modalities together beat either one.
match   two classes. The two rhythms are each uniform over four rates whatever the answer, so one modality is at chance.
when    four classes. The picture marks a quarter (uniform); the sound plays a permutation of four pitches (uniform);
        the answer is the pitch in the marked quarter, so one modality is at chance.
"""

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from features.corpus.manifest import SPLITS
from features.errors import CorpusError

LABELS = ("A", "B", "C", "D")
MATCHES = ("differ", "agree")
RATE_NAMES = ("slow", "mid-slow", "mid-fast", "fast")
PITCHES = ("low", "mid-low", "mid-high", "high")
TASKS = {"label": LABELS, "match": MATCHES, "when": PITCHES}
# What `match` compares, on request as tasks of their own: alone, `match` is an exclusive or, which has no gradient
# before both rhythms are read.
RHYTHMS = {"video_rate": RATE_NAMES, "audio_rate": RATE_NAMES}
SOURCES = ("video", "audio", "both")

RELIABILITY = {
    "colour": Fraction(62, 100),
    "timbre": Fraction(62, 100),
    "video_order": Fraction(70, 100),
    "audio_order": Fraction(70, 100),
}
# Two orders and their reversals: no single position of an event tells the order.
ORDERS = ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0))
KINDS = 4  # values of every cue
PERMUTATIONS = tuple(itertools.permutations(range(KINDS)))


@dataclass(frozen=True)
class Latents:
    """One clip's answers (class indices) and planted cues."""

    index: int
    split: str
    label: int
    match: int
    when: int
    colour: int
    timbre: int
    video_order: int
    audio_order: int
    video_rate: int
    audio_rate: int
    marked_quarter: int
    pitches: tuple[int, ...]

    @property
    def clip_id(self) -> str:
        """The key of the clip in the manifest."""
        return f"clip-{self.index:06d}"


def split_counts(clips: int, val_share: float, test_share: float) -> dict[str, int]:
    """Number of clips per split; raises CorpusError when a split would stay empty."""
    if not (val_share > 0 and test_share > 0 and val_share + test_share < 1):
        raise CorpusError(
            f"--val-share {val_share:g} and --test-share {test_share:g}: give two shares above 0 whose sum is below 1"
        )
    val, test = int(clips * val_share + 0.5), int(clips * test_share + 0.5)
    counts = {"train": clips - val - test, "val": val, "test": test}
    if min(counts.values()) < 1:
        shown = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise CorpusError(f"--clips {clips} is too few to fill every split ({shown}): give more clips")
    return counts


def draw(clips: int, seed: int, val_share: float = 0.1, test_share: float = 0.3) -> list[Latents]:
    """Draw the latents of a corpus: the answers of every task are balanced within each split and shuffled."""
    counts = split_counts(clips, val_share, test_share)
    rng = np.random.default_rng([seed, 0])
    splits = rng.permutation(np.repeat(SPLITS, [counts[name] for name in SPLITS]))
    answers = {task: np.empty(clips, dtype=int) for task in TASKS}
    for split in SPLITS:
        members = np.flatnonzero(splits == split)
        for task, classes in TASKS.items():
            order = rng.permutation(len(classes))  # which class gets the odd clip
            answers[task][members] = rng.permutation(order[np.arange(len(members)) % len(classes)])
    return [
        _draw_cues(rng, index, str(splits[index]), *(int(answers[task][index]) for task in TASKS))
        for index in range(clips)
    ]


def _draw_cues(rng: np.random.Generator, index: int, split: str, label: int, match: int, when: int) -> Latents:
    def other(value: int) -> int:
        return int((value + rng.integers(1, KINDS)) % KINDS)

    cues = {name: label if rng.random() < p else other(label) for name, p in RELIABILITY.items()}
    video_rate = int(rng.integers(KINDS))
    audio_rate = video_rate if match else other(video_rate)
    marked_quarter = int(rng.integers(KINDS))
    pitches = [int(pitch) for pitch in rng.permutation(np.delete(np.arange(KINDS), when))]
    pitches.insert(marked_quarter, when)
    return Latents(
        index, split, label, match, when, **cues, video_rate=video_rate, audio_rate=audio_rate,
        marked_quarter=marked_quarter, pitches=tuple(pitches),
    )  # fmt: skip


Outcome = tuple[Fraction, int, Hashable, Hashable]  # probability, answer, what the video shows, what the audio shows


def outcomes(task: str) -> Iterator[Outcome]:
    """Enumerate the joint distribution of a task's answer and the cues that bear on it."""
    values = range(KINDS)
    if task == "label":
        for label, *cues in itertools.product(values, repeat=1 + len(RELIABILITY)):
            chance = Fraction(1, KINDS)
            for cue, p in zip(cues, RELIABILITY.values(), strict=True):
                chance *= p if cue == label else (1 - p) / (KINDS - 1)
            colour, timbre, video_order, audio_order = cues
            yield chance, label, (colour, video_order), (timbre, audio_order)
    elif task == "match":
        for video, audio in itertools.product(values, repeat=2):
            agree = video == audio
            yield Fraction(1, 2 * KINDS) / (1 if agree else KINDS - 1), int(agree), video, audio
    else:
        for quarter, pitches in itertools.product(values, PERMUTATIONS):
            yield Fraction(1, KINDS * len(PERMUTATIONS)), pitches[quarter], quarter, pitches


def ceilings() -> dict[str, dict[str, float]]:
    """Bayes-optimal accuracy per task and source (video, audio, both), exact by enumeration.

    Presumes that every planted cue is read from the media without error: a model can only fall below.
    """
    return {task: {source: _bayes_accuracy(task, source) for source in SOURCES} for task in TASKS}


def _bayes_accuracy(task: str, source: str) -> float:
    seen: dict[Hashable, dict[int, Fraction]] = {}
    for chance, answer, video, audio in outcomes(task):
        observation = {"video": video, "audio": audio, "both": (video, audio)}[source]
        posterior = seen.setdefault(observation, {})
        posterior[answer] = posterior.get(answer, Fraction(0)) + chance
    return float(sum(max(posterior.values()) for posterior in seen.values()))
