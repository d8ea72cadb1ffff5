"""Which answers of a run were right, as text: the column `right` of a file of results."""

import numpy as np


def packed(right: np.ndarray) -> str:
    """Which answers are right, (clips, tasks), as `200:hex`, or `200x8:hex` of eight tasks."""
    clips, tasks = right.shape
    return f"{clips}{f'x{tasks}' * (tasks > 1)}:{np.packbits(right).tobytes().hex()}"


def unpacked(text: str) -> np.ndarray:
    """The share of a clip's answers that are right, (clips,), from what `packed` wrote, or nothing."""
    shape, _, bits = (text or "0:").partition(":")
    clips, _, tasks = shape.partition("x")
    count = int(clips) * int(tasks or 1)
    right = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=count)
    return right.reshape(int(clips), int(tasks or 1)).mean(axis=1)
