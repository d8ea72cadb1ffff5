"""What every model here shares: the encoder, its declarations, what a forward pass returns, parameter groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from clcr.batches import Batch, FeatureSpec
from clcr.config import CLCRConfig, pairs
from clcr.errors import ConfigError
from clcr.hierarchy import SemanticHierarchy
from clcr.tasks import TaskSpec


@dataclass
class Output:
    """logits: (B, outputs) per task; losses: regularisers by name, already weighted (training mode only)."""

    logits: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)


class MultimodalModel(nn.Module):
    """A model built from what it reads (features), what it predicts (tasks) and its options.

    levels: which levels of the hierarchy the model reads (default: all); the others' outputs are not built, so every
    parameter has a gradient.
    """

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

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Set the stems' standardisation from training batches."""
        self.encoder.fit_statistics(batches)

    def prepare_evaluation(self, sample: Callable[[int], Iterable[Batch]]) -> None:
        """Store what predictions need of the training split; the training loop calls it before it validates.

        sample(clips): batches of a seeded sample of that split, the same on every worker.
        """

    def diagnostics(self, out: Output, batch: Batch) -> dict[str, Tensor]:
        """What to log beside the losses: (B,) per name, NaN where it is undefined for a sample."""
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups: matrices decay; vectors, scalars and what a module calls `undecayed` do not.

        What a module calls `scalars` goes by a learning rate that is `lr_scale` times that of the others.
        """
        decayed, undecayed, scalars = [], [], []
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in getattr(module, "scalars", ()):
                    scalars.append(parameter)
                else:
                    skip = parameter.ndim < 2 or name in getattr(module, "undecayed", ())
                    (undecayed if skip else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
            {"params": scalars, "weight_decay": 0.0, "lr_scale": self.config.budget.lr_scale},
        ]
        return groups if scalars else groups[:2]
