"""What can go wrong between a manifest and a feature store; every message is one line: what, where, what to do."""

import difflib
from collections.abc import Iterable


class FeaturesError(Exception):
    """Base of the errors of this package; a job catches it once and prints one line."""


class CorpusError(FeaturesError):
    """A manifest, or a folder of clips, that cannot be used as it stands."""


class StoreError(FeaturesError):
    """A feature store that is missing, damaged, locked, or made with another specification."""


class StorageError(FeaturesError):
    """Storage that stays away: no clip's fault, so the job stops and is resumed later."""


class MediaError(FeaturesError):
    """One clip that cannot be used; stage says where: open, video, audio, image, text, vectors, encoder or quality."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(stage, message)  # both in args, so that the error survives pickling between processes
        self.stage = stage
        self.message = message

    def __str__(self) -> str:
        return self.message


class SegmentBeyondEnd(MediaError):
    """A segment that starts after its stream has ended, in a file that is whole: that modality is absent there."""


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """Which known names may have been meant: those with the same last part (width: model.width), else a close one."""
    names, last = list(known), name.rpartition(".")[2]
    if same := [other for other in names if other.rpartition(".")[2] == last and other != name]:
        return same[:3]
    lasts = {other.rpartition(".")[2]: other for other in reversed(names)}
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(last, lasts, n=1)
    return [lasts.get(found, found) for found in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'label'?)` where one of the known names is close, for the end of a message."""
    close = close_names(name, known)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, short enough for a table."""
    return " ".join(str(error).split())[:200] or type(error).__name__
