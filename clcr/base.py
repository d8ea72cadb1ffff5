"""What every model here shares: the encoder, its declarations, what a forward pass returns, parameter groups."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from clcr.answers import Answer, answers_of, unlabelled
from clcr.batches import Batch, FeatureSpec, collate
from clcr.config import CLCRConfig, pairs
from clcr.errors import ConfigError
from clcr.hierarchy import SemanticHierarchy
from clcr.tasks import TaskSpec
from clcr.units import Units
from clcr.windows import Windows


@dataclass
class Output:
    """logits: (B, outputs) per task, numbers in the unit of their labels (float64); losses: regularisers by name,
    already weighted; unimodal: logits as each modality by itself gives them, by modality (both in training mode only).
    """

    logits: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    unimodal: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class MultimodalModel(nn.Module):
    """A model built from what it reads (features), what it predicts (tasks) and its options.

    levels: which levels of the hierarchy the model reads (default: all); the others' outputs are not built, so every
    parameter has a gradient.
    """

    recipe: dict[str, Any]  # what `registry.build` built it from
    own_heads: Any  # a ModuleList of TaskHeads of the models that have heads for each modality by itself
    pooling: Any  # of most models: a ModuleList of TimePooling; torch has no type for the items of one

    def __init__(
        self,
        config: CLCRConfig,
        features: Mapping[str, FeatureSpec],
        tasks: Mapping[str, TaskSpec],
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not features:
            raise ConfigError("no features: a model needs at least one modality")
        if not tasks:
            raise ConfigError("no tasks: declare at least one thing to predict")
        if unknown := set(pairs(config.loss.task_weights, "loss.task-weights")) - set(tasks):
            raise ConfigError(f"--loss.task-weights: no task named {min(unknown)}; there are {', '.join(tasks)}")
        self.config = config
        self.features = dict(features)
        self.tasks = dict(tasks)
        read = range(config.model.levels) if levels is None else levels
        self.encoder = SemanticHierarchy(self.features, config.model, config.stem, read)
        self.units = Units(self.tasks)
        self.register_forward_hook(_in_units)  # every model's own forward pass ends in standardised numbers

    def predict(self, samples: Iterable[Mapping[str, Any]], batch_size: int = 64) -> Iterator[Answer]:
        """An answer for each sample, in their order, `batch_size` of them passed through the model at a time.

        samples: {"clip_id", "features": {modality: (T, *shape) array}}, as `Store.samples` yields them; a task of
        events also needs "duration" in seconds. An answer is {"clip_id", TASK: a class's name, a number, or a list of
        {"start", "end", "label"} in seconds}; a class comes with TASK_probability and TASK_probabilities by class.
        Raises ClcrError where a sample's features are not those that the model reads.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: must be 1 or more")
        rest = iter(samples)
        while several := list(islice(rest, batch_size)):
            yield from self._answer(several)

    @torch.no_grad()
    def _answer(self, samples: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """One batch's answers, in evaluation mode; afterwards the model is in the mode in which it was."""
        batch = collate([unlabelled(sample, self.tasks) for sample in samples], self.features, self.tasks)
        before, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            logits = self(batch.to(device)).logits
        finally:
            self.train(before)
        answers: list[Answer] = [{"clip_id": clip_id} for clip_id in batch.clip_ids]
        for name, task in self.tasks.items():
            for answer, of_task in zip(answers, answers_of(task, logits[name].cpu(), samples), strict=True):
                answer |= of_task
        return answers

    def fit_statistics(self, batches: Iterable[Batch], labels: Mapping[str, ArrayLike] | None = None) -> None:
        """Set the stems' standardisation from training batches, and the units of numeric targets.

        labels: all training labels (n,) of every numeric task, NaN missing; None = those of the batches.
        """
        seen: dict[str, list[np.ndarray]] = {name: [] for name in self.units.names}

        def observed() -> Iterator[Batch]:
            for batch in batches:
                for name, values in seen.items():
                    values.append(batch.targets[name].cpu().numpy())
                yield batch

        self.encoder.fit_statistics(observed())
        if self.config.loss.standardise:
            found = labels or {name: np.concatenate(values) for name, values in seen.items() if values}
            self.units.fit(found)

    def prepare_evaluation(self, sample: Callable[[int], Iterable[Batch]]) -> None:
        """Store what predictions need of the training split; the training loop calls it before it validates.

        sample(clips): batches of a seeded sample of that split, the same on every worker.
        """

    def by_themselves(self, summaries: Sequence[Tensor], windows: Windows) -> dict[str, dict[str, Tensor]]:
        """Logits that each modality's own head (`own_heads`) gives for its summaries (B, N, width), by modality."""
        return {
            m: dict(zip(self.tasks, heads(own, windows), strict=True))
            for m, heads, own in zip(self.features, self.own_heads, summaries, strict=False)
        }

    def diagnostics(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """What to log with the losses: (B,) per name, NaN where it is undefined for a sample."""
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: matrices decay; vectors, scalars and what a module calls `undecayed` do not.

        What a module calls `scalars` is learned `lr_scale` times as fast as the rest, in a group of its own.
        """
        scale = self.config.budget.lr_scale
        decayed: list[nn.Parameter] = []
        undecayed: list[nn.Parameter] = []
        scalars: list[nn.Parameter] = []
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if scale != 1 and name in getattr(module, "scalars", ()):
                    scalars.append(parameter)
                else:
                    skip = parameter.ndim < 2 or name in getattr(module, "undecayed", ())
                    (undecayed if skip else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
            {"params": scalars, "weight_decay": 0.0, "lr_scale": scale},
        ]
        return groups if scalars else groups[:2]


def _in_units(model: MultimodalModel, inputs: object, output: Output) -> Output:
    """A forward hook: the same output with numbers in the unit of their labels."""
    unimodal = {m: model.units.answer(logits) for m, logits in output.unimodal.items()}
    return replace(output, logits=model.units.answer(output.logits), unimodal=unimodal)
