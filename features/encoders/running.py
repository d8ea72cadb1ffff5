"""Clips through an encoder: cut into windows, batched, and put together again as tokens.

A batch that many clips share is always as large, filled up where need be: what shares a batch with a
clip changes no bit of it.
A batch that does not fit into memory is halved, and stays so.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from features.encoders.contract import Asked, Encoder
from features.encoders.registry import find_encoder
from features.errors import FeaturesError, MediaError

ALONE = 16  # windows at once where a clip goes through by itself: on a CPU more are no faster
LIMIT = float(np.finfo(np.float16).max)


def count_tokens(units: int, encoder: Encoder) -> int:
    """Tokens of a clip of so many frames or samples, at least 1."""
    return max(1, round(units * encoder.tokens / encoder.hop))


def windows(values: np.ndarray, encoder: Encoder) -> np.ndarray:
    """A clip's frames (T, H, W, 3) or samples (T,) as windows, (N, window, ...): views, but for the ends.

    Beyond the ends, sound is silence, and the first and last frame stay. Where window is 1, its axis is left out.
    """
    number = math.ceil(count_tokens(len(values), encoder) / encoder.tokens)
    lead = (encoder.window - encoder.hop) // 2 if encoder.lead is None else encoder.lead
    wanted = (number - 1) * encoder.hop + encoder.window
    before, after = max(0, lead), max(0, wanted - lead - len(values))
    ends = ((before, after), *[(0, 0)] * (values.ndim - 1))
    if before or after:
        values = np.pad(values, ends, mode="constant" if values.ndim == 1 else "edge")
    values = values[max(0, -lead) :]
    cut = np.lib.stride_tricks.sliding_window_view(values, encoder.window, axis=0)[:: encoder.hop][:number]
    cut = np.moveaxis(cut, -1, 1)  # the window's axis comes last
    return cut[:, 0] if encoder.window == 1 else cut


class Runner:
    """An encoder on a device. batch: windows at once; 0 = as many as the encoder says."""

    def __init__(self, encoder: Encoder, device: str = "cpu", batch: int = 0) -> None:
        self.encoder, self.device, self.batch = encoder, device, batch or encoder.batch
        encoder.load(device)

    def one(self, values: np.ndarray) -> np.ndarray:
        """The tokens of one clip, (T, *shape) float16: by itself, in batches that are not filled up."""
        return self._run([values], filled=False)[0]

    def many(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The tokens of each clip, through batches that they share; neighbours change no bit."""
        return self._run(clips, filled=True)

    def _run(self, clips: Sequence[np.ndarray], filled: bool) -> list[np.ndarray]:
        counts = [count_tokens(len(clip), self.encoder) for clip in clips]
        pieces = [windows(self.encoder.prepare(clip), self.encoder) for clip in clips]
        tokens = np.concatenate([*self._batches([window for clip in pieces for window in clip], filled)])
        ends = np.cumsum([len(clip) * self.encoder.tokens for clip in pieces])
        return [part[:count] for part, count in zip(np.split(tokens, ends[:-1]), counts, strict=True)]

    def _batches(self, pieces: Sequence[np.ndarray], filled: bool) -> Iterator[np.ndarray]:
        first = 0
        while first < len(pieces):
            batch = pieces[first : first + self.batch]
            filling = list(batch[-1:]) * (self.batch - len(batch)) if filled else []
            try:
                tokens = self._call(np.stack([*batch, *filling]))
            except Exception as error:
                if self.batch == 1 or not is_out_of_memory(error):
                    raise
                self.batch //= 2
                continue
            yield tokens[: len(batch) * self.encoder.tokens]
            first += len(batch)

    def _call(self, batch: np.ndarray) -> np.ndarray:
        """(N, window, ...) to (N * tokens, *shape) float16."""
        made, shape = np.asarray(self.encoder(batch)), tuple(self.encoder.shape)
        if made.shape not in ((len(batch), self.encoder.tokens, *shape), (len(batch) * self.encoder.tokens, *shape)):
            wanted = (len(batch), self.encoder.tokens, *shape)
            raise FeaturesError(f"{type(self.encoder).__name__} made {made.shape} of a batch, and declares {wanted}")
        return finite(made.reshape(-1, *shape), type(self.encoder).__name__)


def finite(tokens: np.ndarray, encoder: str) -> np.ndarray:
    """Tokens as float16, the largest it holds for larger ones. Raises MediaError for what is no number."""
    if np.isnan(tokens).any():
        raise MediaError("encoder", f"{encoder} makes tokens of it that are no numbers (NaN)")
    return tokens.clip(-LIMIT, LIMIT).astype(np.float16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a batch was too large for a device's memory."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@functools.lru_cache(maxsize=4)
def runner_alone(asked: Asked) -> Runner:
    """The encoder on this process's CPU, loaded once."""
    return Runner(find_encoder(asked), batch=min(ALONE, find_encoder(asked).batch))


def encode_text(text: str, asked: Asked) -> np.ndarray:
    """The tokens of a text, (T, *shape) float16, by an encoder of the contract."""
    encoder: Any = runner_alone(asked).encoder
    made = np.asarray(encoder(text))
    if made.ndim != 1 + len(encoder.shape) or made.shape[1:] != tuple(encoder.shape):
        raise FeaturesError(f"{asked.option} made {made.shape} of a text, and declares (T, *{encoder.shape})")
    return finite(made, asked.option)
