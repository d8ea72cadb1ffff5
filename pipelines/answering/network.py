"""A trained network alone, for programs without this project: as a torch.export program and as an ONNX file.

    inputs    MODALITY.values (clips, tokens, *shape) as the store has them, and MODALITY.valid (clips, tokens) bool;
              of a task of events also TASK.bins (clips, bins) bool: which bins each clip has
    outputs   TASK.logits (clips, outputs), of events (clips, bins, outputs); of a number TASK.number (clips, 1), in the
              unit of the labels

Clips and tokens may be any number. A modality that a clip lacks is all False in `valid`.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcr import Batch, Features
from clcr.base import MultimodalModel
from clcr.subspaces import Subspaces
from features.errors import one_line
from pipelines.common.errors import JobError

FORMATS = {"torch": "network.pt2", "onnx": "network.onnx"}
CLOSE = 1e-4  # largest difference to the model, over the size of its answers


class Bases(nn.Module):
    """What `Subspaces` gives, as constants: ONNX has no QR decomposition."""

    shared: Tensor  # both are buffers
    private: Tensor

    def __init__(self, subspaces: nn.Module) -> None:
        super().__init__()
        for name, basis in zip(("shared", "private"), subspaces(), strict=True):
            self.register_buffer(name, basis.detach().clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        """-> U_sh (d, k_s) and U_pr (M, d, k_p)."""
        return self.shared, self.private


class Network(nn.Module):
    """A model from tensors to tensors, in the order of `inputs` and `outputs`."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval()
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Subspaces):
                    setattr(module, name, Bases(child))
        self.events = [name for name, task in model.tasks.items() if task.rate]
        parts = [f"{m}.{part}" for m in model.features for part in ("values", "valid")]
        self.inputs = [*parts, *(f"{name}.bins" for name in self.events)]
        self.outputs = [f"{t}.{'logits' if task.has_classes else 'number'}" for t, task in model.tasks.items()]
        # Padding changes no answer, and with it no level has a single token, which would be another program.
        towers = dict(zip(self.model.encoder.modalities, self.model.encoder.encoders, strict=True))
        self.padding = {m: math.prod(getattr(towers.get(m), "strides", (1,))) for m in model.features}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors by name, see the module's head."""
        return tuple(self.model(self.batch(*tensors)).logits.values())

    def batch(self, *tensors: Tensor) -> Batch:
        """What the model is given of these inputs."""
        given = dict(zip(self.inputs, tensors, strict=True))
        features = {}
        for m, spec in self.model.features.items():
            values, valid = given[f"{m}.values"], given[f"{m}.valid"]
            values = F.pad(values, (*(0, 0) * len(spec.shape), 0, self.padding[m]))
            features[m] = Features(values, F.pad(valid, (0, self.padding[m])))
        bins = {name: given[f"{name}.bins"] for name in self.events}
        unknown = torch.zeros_like(tensors[1][:, 0], dtype=torch.int64)
        return Batch(
            features,
            present={m: f.valid.any(dim=1) for m, f in features.items()},
            targets={name: bins[name].long() if name in bins else unknown for name in self.model.tasks},
            clip_ids=[],
            bins={name: mask.sum(dim=1) for name, mask in bins.items()},
        )

    def example(self, clips: int, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs; each modality and task has another number of tokens, and clips are of unequal length.

        Of several clips, each modality is missing from one.
        """
        rng, made = np.random.default_rng(seed), []
        for number, spec in enumerate(self.model.features.values()):
            length = tokens + 3 * number
            values = rng.normal(size=(clips, length, *spec.shape))
            values = values * 40 + 128 if np.dtype(spec.dtype).kind == "u" else values
            valid = np.arange(length) < rng.integers(1, length + 1, clips)[:, None]
            if clips > 1 and len(self.model.features) > 1:
                valid[number % clips] = False
            kept = values * valid.reshape(*valid.shape, *[1] * len(spec.shape))
            made += [torch.from_numpy(kept.astype(spec.dtype)), torch.from_numpy(valid)]
        bins = [torch.ones(clips, tokens + 1 + number, dtype=torch.bool) for number in range(len(self.events))]
        return (*made, *bins)


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its answers are from the model's, over the size of those."""

    path: Path
    error: float


def export_network(model: MultimodalModel, folder: Path, formats: tuple[str, ...]) -> dict[str, Exported]:
    """Write the formats named to a folder. Raises JobError, naming the model, for what cannot be exported."""
    name, network = model.recipe["model"], Network(model)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) * len(network.inputs)
    written = {}
    try:
        with torch.no_grad():
            program = torch.export.export(network, network.example(3, 7), dynamic_shapes=(dynamic,), strict=False)
        for kind in formats:
            write, run = WRITERS[kind]
            path = folder / FORMATS[kind]
            write(program, network, path)
            written[kind] = Exported(path, largest_error(network, run(path, network)))
    except Exception as error:  # torch.export and the converter raise classes of many libraries
        raise JobError(f"{name} cannot be exported as {', '.join(formats)}: {one_line(error)}") from error
    if wrong := [kind for kind, file in written.items() if not file.error <= CLOSE]:
        raise JobError(f"{name} as {wrong[0]} answers otherwise than the model, by {written[wrong[0]].error:.1e}")
    return written


@torch.no_grad()
def largest_error(network: Network, run: Any) -> float:
    """Largest difference between a file's answers and the network's for other numbers of clips and tokens.

    NaN where one of them is.
    """
    worst = 0.0
    for seed, (clips, tokens) in enumerate([(1, 1), (1, 40), (5, 12), (2, 90)]):
        inputs = network.example(clips, tokens, seed)
        for found, wanted in zip(run(inputs), network(*inputs), strict=True):
            scale = max(1.0, wanted.abs().max().item())
            error = (torch.as_tensor(found) - wanted).abs().max().item() / scale
            worst = float(np.maximum(worst, error))  # `max` passes over NaN
    return worst


def _write_torch(program: Any, network: Network, path: Path) -> None:
    torch.export.save(program, str(path))


def _run_torch(path: Path, network: Network) -> Any:
    loaded = torch.export.load(str(path)).module()
    return lambda inputs: loaded(*inputs)


def _write_onnx(program: Any, network: Network, path: Path) -> None:
    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        optimize=False,  # onnxscript takes a minute for it, and onnxruntime optimises what it loads
        input_names=network.inputs,
        output_names=network.outputs,
    )
    assert converted is not None  # it is with dynamo
    converted.save(str(path))


def _run_onnx(path: Path, network: Network) -> Any:
    session = open_onnx(path)
    return lambda inputs: session.run(
        network.outputs, {name: value.numpy() for name, value in zip(network.inputs, inputs, strict=True)}
    )


def open_onnx(path: Path) -> Any:
    """An onnxruntime session of one thread on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors: it warns of every constant that it does not fold
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


WRITERS = {"torch": (_write_torch, _run_torch), "onnx": (_write_onnx, _run_onnx)}
