"""The one training loop: every model, every job and every test runs this.

Data-parallel when torch.distributed is initialised. Losses are sums over known targets divided by the global count,
so the number of workers does not change the objective. The order of the data belongs to the loader; everything random
here follows from (seed, epoch, rank), so an epoch can be run again from its start.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clcr import metrics as M
from clcr.batches import Batch
from clcr.errors import ClcrError, ConfigError
from clcr.tasks import TaskSpec, task_loss


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained."""

    epochs: int = 30
    """passes over the training split"""
    batch_size: int = 32
    """clips per step, over all workers together"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9 (the paper)"""
    lr: float = 1e-3
    """peak learning rate"""
    weight_decay: float = 1e-2
    """on weight matrices only: bases, budgets, norms and biases are left out"""
    warmup: float = 0.1
    """share of all steps over which the learning rate rises linearly; then it falls along a cosine"""
    grad_clip: float = 1.0
    """largest norm of the whole gradient; 0 = no clipping"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast; bases, projection and losses stay in float32"""
    compile: bool = False
    """run the model through torch.compile"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"--warmup {self.warmup}: must lie in [0, 1)")


class Loader(Protocol):
    """What the loop needs of a data loader: a fixed number of steps, and batches by epoch."""

    steps: int

    def batches(self, epoch: int) -> Iterable[Batch]:
        """This worker's share of every global batch of an epoch."""

    def sample_batches(self, clips: int) -> Iterable[Batch]:
        """A seeded sample of so many clips, the same on every worker."""


@dataclass
class Epoch:
    """What one epoch showed. metrics: by tracking name; improved: val/score is the best so far."""

    number: int
    metrics: dict[str, float]
    improved: bool


class Trainer:
    """A model, its optimiser and what is needed to go on from a checkpoint.

    Raises ClcrError with the batch's clip ids when the loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, TaskSpec],
        config: OptimConfig,
        steps_per_epoch: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.tasks, self.config, self.seed = model.to(device), tasks, config, seed
        self.device = torch.device(device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        groups = model.parameter_groups(config.weight_decay)
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, _warmup_cosine(config.epochs * steps_per_epoch, config.warmup)
        )
        self.next_epoch, self.best_score = 0, -math.inf
        self.best_weights: dict[str, Tensor] = {}
        forward = torch.compile(self.model) if config.compile else self.model
        self.forward = DistributedDataParallel(forward) if self.world > 1 else forward

    def fit(self, train: Loader, val: Loader) -> Iterator[Epoch]:
        """Train and validate; yields after every epoch, so that the caller may report, save or stop."""
        while self.next_epoch < self.config.epochs:
            epoch, started = self.next_epoch, time.perf_counter()
            measured = self.train_epoch(epoch, train.batches(epoch))
            measured["perf/epoch_s"] = time.perf_counter() - started
            with torch.no_grad(), self._autocast():
                self.model.prepare_evaluation(train.sample_batches)
            predictions, diagnostics = self.evaluate(val.batches(0))
            measured |= M.tracked("val", M.split_metrics(self.tasks, predictions)) | diagnostics
            improved = measured["val/score"] > self.best_score
            if improved:
                self.best_score = measured["val/score"]
                self.best_weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.next_epoch += 1
            yield Epoch(epoch, measured, improved)

    def train_epoch(self, epoch: int, batches: Iterable[Batch]) -> dict[str, float]:
        """One pass; returns the means of all losses, the learning rate and the speed."""
        torch.manual_seed(hash((self.seed, epoch, self.rank)) % 2**31)  # dropout: the same when an epoch is run again
        self.forward.train()
        sums: dict[str, float] = defaultdict(float)
        steps, samples, waited, clock = 0, 0, 0.0, time.perf_counter()
        started = clock
        for batch in batches:
            waited += time.perf_counter() - clock
            for name, value in self.train_step(batch.to(self.device)).items():
                sums[name] += value
            steps, samples = steps + 1, samples + len(batch)
            clock = time.perf_counter()
        seconds = time.perf_counter() - started
        shares = _gather(dict(sums))
        means = {name: sum(share[name] for share in shares) / (steps * self.world) for name in sums}
        return means | {
            "train/lr": self.schedule.get_last_lr()[0],
            "perf/samples_per_s": samples * self.world / seconds,
            "perf/waiting_for_data": waited / seconds,
        }

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, update on one batch; returns the step's losses by tracking name."""
        with self._autocast():
            out = self.forward(batch)
        losses = self._task_losses(out.logits, batch) | {f"train/loss_{k}": v for k, v in out.losses.items()}
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise ClcrError(
                f"the loss is {loss.item()} on clips {', '.join(batch.clip_ids)}: check those clips' features, "
                "or lower --lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        return {"train/loss": loss.item()} | {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, M.Predictions], dict[str, float]]:
        """Predictions of every clip by task, gathered over workers, and the means of the model's diagnostics."""
        self.forward.eval()
        parts, sums = [], defaultdict(lambda: (0.0, 0))
        for batch in batches:
            batch = batch.to(self.device)
            with self._autocast():
                out = self.model(batch)
            parts.append(
                {
                    name: M.Predictions(batch.clip_ids, out.logits[name].float().cpu(), batch.targets[name].cpu())
                    for name in self.tasks
                }
            )
            real = torch.tensor([bool(clip_id) for clip_id in batch.clip_ids], device=self.device)  # no padding
            for name, value in self.model.diagnostics(out, batch).items():
                known = value[real & ~value.isnan()].double()  # NaN: a modality that the clip lacks
                total, count = sums[name]
                sums[name] = total + known.sum().item(), count + len(known)
        gathered = _gather((M.concatenate(parts), dict(sums)))
        means = {
            f"diag/{name}": sum(s[name][0] for _, s in gathered) / max(1, sum(s[name][1] for _, s in gathered))
            for name in sums
        }
        return M.concatenate([p for p, _ in gathered]), means

    def load_best(self) -> None:
        """Put the weights of the best epoch (by val/score) into the model."""
        self.model.load_state_dict(self.best_weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on after the last finished epoch."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "next_epoch": self.next_epoch,
            "best_score": self.best_score,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.next_epoch, self.best_score = state["next_epoch"], state["best_score"]
        self.best_weights = state["best_weights"]

    def _task_losses(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Each task's sum over known targets, divided by their global count, times the task's weight."""
        pairs = [task_loss(task, logits[name], batch.targets[name]) for name, task in self.tasks.items()]
        counts = torch.stack([count for _, count in pairs]).float()
        if self.world > 1:
            dist.all_reduce(counts)
        # DistributedDataParallel averages gradients over workers; the world size undoes it.
        own = torch.tensor([self.model.config.loss.task_weight(name) for name in self.tasks], device=counts.device)
        weights = own * self.world / counts.clamp(min=1)
        return {f"train/loss_{name}": s * w for name, (s, _), w in zip(self.tasks, pairs, weights, strict=True)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def _warmup_cosine(total: int, warmup: float) -> Any:
    rise = max(1, round(total * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))

    return factor


def _gather(value: Any) -> list[Any]:
    """The value of every worker, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
