"""`onnx:FILE`: an exported network of pictures or of sound.

Its first input is (N, 3, H, W), normalised as ImageNet's networks expect, or (N, samples) at 16 kHz. Outputs are
(N, D), one token; (N, T, D), of sound T tokens spread over the window, of pictures patches, whose mean counts; or
(N, D, h, w), maps, whose mean counts. Several outputs are layers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.encoders.contract import Asked, Encoder, thirds
from features.encoders.registry import weights_id
from features.encoders.resnet18 import pixels
from features.errors import FeaturesError, one_line

SIDE = 64  # pixels of the picture by which the outputs of a network that takes any size are found


def make(asked: Asked) -> "Onnx":
    """See features.encoders.registry."""
    try:
        return Onnx(asked)
    except FeaturesError:
        raise
    except Exception as error:  # onnxruntime has its own classes, and raises whatever a damaged file makes it raise
        raise FeaturesError(f"{asked.option} does not load: {one_line(error)}") from error


def open_session(file: str, device: str) -> Any:
    """A file's network in onnxruntime, on a GPU where device is cuda and it can; on a CPU by torch's many threads.

    Threads that wait sleep: by default they spin, and take the processor from those that decode the next clips.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    known = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(file, options, [provider for provider in wanted if provider in known])


class Onnx(Encoder):
    """A file's network; onnxruntime runs it on a GPU where it can."""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.file = asked, asked.name.partition(":")[2]
        self.is_sound = asked.modality == "audio"
        self.load("cpu")
        given = self.session.get_inputs()[0].shape
        self.fixed = given[0] if isinstance(given[0], int) else 0  # a batch of one size alone
        self.batch = self.fixed or self.batch
        axes = 2 if self.is_sound else 4
        if len(given) != axes or (not self.is_sound and given[1] != 3):
            raise FeaturesError(f"{asked.option} takes {given}, not {'(N, samples)' if axes == 2 else '(N, 3, H, W)'}")
        last = given[-1] if isinstance(given[-1], int) else 0
        if self.is_sound:
            self.sample_rate = 16_000
            if last and asked.span:
                raise FeaturesError(f"--audio.span: {asked.name} takes {last} samples at once")
            self.window = last or round(asked.span * self.sample_rate)
            if not self.window:
                raise FeaturesError(f"{asked.option} takes any length of sound: say how much at once with --audio.span")
            trial: np.ndarray = np.zeros((1, self.window), np.float32)
        else:
            self.size = last
            trial = np.zeros((1, last or SIDE, last or SIDE, 3), np.uint8)
        count = len(self.session.get_outputs())
        self.layers = asked.layers or (thirds(count) if count > 1 else ())
        if self.layers and self.layers[-1] > count:
            raise FeaturesError(f"--{asked.modality}.layers: {asked.name} has {count} outputs")
        made = self(trial)
        self.tokens, self.shape = made.shape[1], made.shape[2:]
        self.hop = self.window
        if self.is_sound:
            if asked.stride and self.tokens > 1:
                raise FeaturesError(f"--audio.stride: {asked.name} makes {self.tokens} tokens of its window")
            self.hop = round(asked.stride * self.sample_rate) or self.window // self.tokens * self.tokens
        self.identity = {"encoder": f"onnx:{weights_id(self.file)}", "layers": list(self.layers)}

    def load(self, device: str) -> None:
        """See Encoder."""
        self.session: Any = open_session(self.file, device)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """See Encoder."""
        given = windows if self.is_sound else pixels(windows, torch.device("cpu")).numpy()
        size = self.fixed or len(given)
        made = [self._run(given[first : first + size], size) for first in range(0, len(given), size)]
        return np.concatenate(made)

    def _run(self, given: np.ndarray, size: int) -> np.ndarray:
        """The tokens of at most `size` windows, which go through as so many."""
        filled = np.concatenate([given, np.repeat(given[-1:], size - len(given), axis=0)])
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: filled})
        picked = [outputs[layer - 1] for layer in self.layers or (1,)]
        tokens = np.stack([self._tokens(torch.from_numpy(output)).numpy() for output in picked], axis=2)
        return (tokens if self.layers else tokens[:, :, 0])[: len(given)]

    def _tokens(self, output: Tensor) -> Tensor:
        """One output to (N, T, D)."""
        output = output.float()
        if output.ndim == 4:
            return output.mean(dim=(2, 3))[:, None]
        if output.ndim == 3:
            return output if self.is_sound else output.mean(dim=1, keepdim=True)
        return output[:, None]
