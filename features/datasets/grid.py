"""GRID (Cooke et al. 2006): 34 speakers say 1,000 sentences each, such as "bin blue at f two now".

    ROOT/.../s1/.../bbaf2n.mpg             the speaker is the nearest folder named s1 to s34; any video ending will do
    ROOT/.../s1/.../bbaf2n.wav             optional: the sound of its own; without it, the video's is used
    ROOT/.../s1/.../bbaf2n.align           optional: `23750 29500 bin` per word, in 25,000ths of a second

A file's name spells its sentence: six words of a fixed grammar, each a label. Speaker 21 has no video. There is no
official split: test is LipNet's (Assael et al. 2016) unseen speakers 1, 2, 20 and 22, and whole speakers are held out
of train for validation. With alignments the column `word` has the words as events. Not run on an official download.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from features.datasets.layout import VIDEO, Layout, Row, fields
from features.errors import CorpusError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRAMMAR: dict[str, dict[str, str]] = {
    "command": {"b": "bin", "l": "lay", "p": "place", "s": "set"},
    "color": {"b": "blue", "g": "green", "r": "red", "w": "white"},
    "preposition": {"a": "at", "b": "by", "i": "in", "w": "with"},
    "letter": {letter: letter for letter in "abcdefghijklmnopqrstuvxyz"},  # no w, the one long name of a letter
    "digit": {word[0] if word == "zero" else str(number): word for number, word in enumerate(DIGITS)},
    "adverb": {"a": "again", "n": "now", "p": "please", "s": "soon"},
}
SENTENCE = re.compile("".join(f"([{''.join(words)}])" for words in GRAMMAR.values()))
TEST = ("s1", "s2", "s20", "s22")
UNITS = 25_000  # of an alignment's times in a second
SILENCE = ("sil", "sp")


def read(layout: Layout) -> Iterator[Row]:
    """A row per sentence of which any file is there: video, audio, the six words; the speaker is its group."""
    videos, sounds, aligned = (_by_speaker(layout, *endings) for endings in (VIDEO, ("wav",), ("align",)))
    if not (sentences := sorted({*videos, *sounds, *aligned})):
        raise CorpusError(f"{layout.root} has no files named as GRID's, such as s1/bbaf2n.mpg")
    for speaker, name in sentences:
        key = (speaker, name)
        match = SENTENCE.fullmatch(name)
        assert match is not None
        words = zip(GRAMMAR.items(), match.groups(), strict=True)
        yield {
            "clip_id": f"{speaker}/{name}",
            "video": videos.get(key),
            **({"audio": sounds.get(key)} if sounds else {}),
            "split": "test" if speaker in TEST else layout.held_out(speaker),
            "group": speaker,
            **{column: spoken[letter] for (column, spoken), letter in words},
            **({"word": _words(aligned[key]) if key in aligned else None} if aligned else {}),
        }


def _by_speaker(layout: Layout, *endings: str) -> dict[tuple[str, str], Path]:
    """Files named as a sentence, by speaker and name."""
    found = {}
    for path in layout.files(*endings):
        speaker = next((part for part in reversed(path.parts[:-1]) if re.fullmatch(r"s\d{1,2}", part)), None)
        if speaker and SENTENCE.fullmatch(path.stem):
            found[speaker, path.stem] = path
    return found


def _words(path: Path) -> list[dict[str, float | str]]:
    lines = path.read_text().splitlines()
    try:
        timed = [(int(start), int(end), word) for start, end, word in fields(lines, " ", 3, str(path))]
    except ValueError as error:
        raise CorpusError(f"{path} is no alignment of GRID's: {error}") from error
    return [
        {"start": start / UNITS, "end": end / UNITS, "label": word}
        for start, end, word in timed
        if word not in SILENCE and end > start
    ]
