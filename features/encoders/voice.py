"""`voice:FILE`: who speaks, and how, in 1.6 s of sound: a speaker encoder's LSTM, with weights from a file.

Wan et al., Generalized End-to-End Loss for Speaker Verification, 2018. Weights that fit are those of Resemblyzer
(Apache-2.0), `resemblyzer/pretrained.pt` in its wheel. Unlike there no silence is cut out: tokens keep their times.
"""

import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features.encoders.contract import Asked, Encoder, thirds
from features.encoders.registry import weights_id
from features.encoders.resnet18 import read_weights
from features.errors import FeaturesError, one_line

WIDTH, DEPTH = 256, 3  # of the LSTM
FRAMES, SEES, HOP, MELS = 160, 400, 160, 40  # log-mel frames of a window; samples of one, and between two; bands
STRIDE = 0.4  # seconds
LOUDNESS = 10 ** (-30 / 20)  # root mean square that quieter clips are brought to, of full scale


def make(asked: Asked) -> "Voice":
    """See features.encoders.registry."""
    return Voice(asked)


class Voice(Encoder):
    """Windows of sound to the LSTM's state after them: its layers from 1 on, and last what names a voice."""

    sample_rate, batch = 16_000, 64
    window = (FRAMES - 1) * HOP + SEES

    def __init__(self, asked: Asked) -> None:
        self.asked, self.file, self.layers = asked, asked.name.partition(":")[2], asked.layers or thirds(DEPTH + 1)
        if asked.span or self.layers[-1] > DEPTH + 1:
            raise FeaturesError(f"{asked.option} has {DEPTH + 1} layers, and always sees 1.6 s: it has no other span")
        if not os.path.isfile(self.file):
            raise FeaturesError(f"{asked.option}: there is no such file; name one of weights, such as Resemblyzer's")
        self.hop = round((asked.stride or STRIDE) * self.sample_rate)
        self.shape = (len(self.layers), WIDTH)
        self.identity = {"encoder": f"voice:{weights_id(self.file)}", "layers": list(self.layers)}

    def load(self, device: str) -> None:
        """See Encoder."""
        from torchaudio.transforms import MelSpectrogram

        net = nn.ModuleDict({"lstm": nn.LSTM(MELS, WIDTH, DEPTH, batch_first=True), "linear": nn.Linear(WIDTH, WIDTH)})
        try:
            given: Any = read_weights(self.file)
            state = given.get("model_state", given)
            net.load_state_dict({name: state[name] for name in net.state_dict()})
        except Exception as error:  # torch.load raises whatever damaged bytes make it raise
            raise FeaturesError(f"{self.asked.option}: no weights of this encoder: {one_line(error)}") from error
        self.net: Any = net.eval().to(device)
        slaney: dict[str, Any] = {"norm": "slaney", "mel_scale": "slaney"}  # as librosa has it, which it learned on
        self.mel = MelSpectrogram(self.sample_rate, SEES, hop_length=HOP, n_mels=MELS, center=False, **slaney).to(
            device
        )
        self.device = device

    def prepare(self, values: np.ndarray) -> np.ndarray:
        """See Encoder: a quiet clip is made louder."""
        loudness = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
        return values * np.float32(LOUDNESS / loudness) if 0 < loudness < LOUDNESS else values

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Encoder."""
        power: Tensor = self.mel(torch.from_numpy(np.ascontiguousarray(windows)).to(self.device))
        _, (states, _) = self.net["lstm"](power.transpose(1, 2))
        voice = F.normalize(self.net["linear"](states[-1]).relu(), dim=1)
        layers = [*states, voice]
        return torch.stack([layers[layer - 1] for layer in self.layers], dim=1).cpu().numpy()
