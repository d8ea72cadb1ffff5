"""Sound through Hugging Face models: Wav2Vec2, HuBERT and WavLM by the wave, Whisper's encoder and AST by log-mel.

Each position of a model sees a stretch of sound around it. Windows begin where that makes the middle of what position k
sees the middle of the seconds that its token covers.
"""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from features.encoders import hub
from features.encoders.contract import Asked
from features.encoders.hidden import HiddenLayers, central
from features.errors import FeaturesError

SPAN = 5.0  # seconds at once, of models that take any length
OVERLAP = 0.2  # of it are context, unless a stride is given
HOP = 160  # samples between log-mel frames of Whisper and AST
FRAME = 400  # samples that one of AST's sees


class Sound(HiddenLayers):
    """What the families share. cell: samples to a token; given: positions of a window; first: of those that count."""

    batch = 8
    sample_rate = 16_000

    def arrange(self, window: int, cell: int, given: int, middle: float, kept: int, first: int = 0) -> None:
        """Set the contract's fields. middle: of what position `first` sees, in samples from the window's beginning.

        kept: positions of a window that become tokens.
        """
        if not 0 < kept <= given - first:
            raise FeaturesError(
                f"--audio.stride {self.asked.stride:g}: {self.asked.name} makes tokens of "
                f"{(given - first) * cell / self.sample_rate:g} s of sound at once; name a part of it"
            )
        within = central(given - first, kept)
        self.kept = slice(first + within.start, first + within.stop)
        self.window, self.hop, self.tokens = window, kept * cell, kept
        self.lead = round(middle - cell / 2) + within.start * cell

    def cells(self, seconds: float, cell: int) -> int:
        """How many tokens so many seconds are."""
        return round(seconds * self.sample_rate / cell)

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """See HiddenLayers."""
        return hidden[:, self.kept]


class Waves(Sound):
    """Wav2Vec2's kind: convolutions over the wave itself, which each clip has with a mean of 0 and a deviation of 1."""

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        super().__init__(asked, config, model)
        said = hub.preprocessing(asked.name)
        self.sample_rate, self.normalise = said.get("sampling_rate", 16_000), said.get("do_normalize", True)
        cell, sees = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            sees += (kernel - 1) * cell
            cell *= stride
        span = asked.span or SPAN
        given = max(1, self.cells(span, cell))
        kept = self.cells(asked.stride or span * (1 - OVERLAP), cell)
        self.arrange((given - 1) * cell + sees, cell, given, sees / 2, max(1, kept))

    def prepare(self, values: np.ndarray) -> np.ndarray:
        """See Encoder."""
        if not self.normalise:
            return values
        return ((values - values.mean()) / np.sqrt(values.var() + 1e-7)).astype(np.float32)

    def inputs(self, windows: np.ndarray) -> Tensor:
        """See HiddenLayers."""
        return torch.from_numpy(np.ascontiguousarray(windows)).to(self.device)


class Whisper(Sound):
    """The encoder of Whisper: always as many seconds at once as it learned on."""

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        super().__init__(asked, config, model)
        _require_own_span(asked)
        from transformers import WhisperFeatureExtractor

        said = hub.preprocessing(asked.name)
        self.mel = WhisperFeatureExtractor(said.get("feature_size", config.num_mel_bins))
        given, cell = config.max_source_positions, 2 * HOP
        # Position 1 sees around its own beginning what position 0, half before the window, would have to cover.
        kept = self.cells(asked.stride, cell) if asked.stride else given - 1
        self.arrange(given * cell, cell, given, cell, kept, first=1)

    def part(self, model: Any) -> Any:
        """See HiddenLayers."""
        return model.encoder

    def inputs(self, windows: np.ndarray) -> Tensor:
        """See HiddenLayers."""
        mel = self.mel([*windows], sampling_rate=self.sample_rate, padding="longest", truncation=False)
        return torch.from_numpy(np.stack(mel["input_features"])).to(self.device)


class Spectrograms(Sound):
    """AST: a picture of log-mel in patches; a token is the mean over the patches of one time."""

    def __init__(self, asked: Asked, config: Any, model: str = "AutoModel") -> None:
        super().__init__(asked, config, model)
        _require_own_span(asked)
        from transformers import ASTFeatureExtractor

        said = hub.preprocessing(asked.name)
        options = {name: said[name] for name in ("mean", "std", "do_normalize") if name in said}
        self.mel = ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length, **options)
        given, cell = (config.max_length - config.patch_size) // config.time_stride + 1, config.time_stride * HOP
        middle = (config.patch_size - 1) / 2 * HOP + FRAME / 2
        kept = self.cells(asked.stride, cell) if asked.stride else given
        self.arrange((config.max_length - 1) * HOP + FRAME, cell, given, middle, kept)
        self.given = given

    def inputs(self, windows: np.ndarray) -> Tensor:
        """See HiddenLayers."""
        mel = self.mel([*windows], sampling_rate=self.sample_rate, return_tensors="np")
        return torch.from_numpy(mel["input_values"]).to(self.device)

    def tokens_of(self, hidden: Tensor) -> Tensor:
        """See HiddenLayers."""
        patches = hidden[:, 2:]  # two stand for the whole
        return rearrange(patches, "n (f t) l d -> n f t l d", t=self.given).mean(dim=1)[:, self.kept]


def _require_own_span(asked: Asked) -> None:
    if asked.span:
        raise FeaturesError(f"--audio.span {asked.span:g}: {asked.name} takes as much sound as it learned on")
