"""The one training loop: every model, every job and every test runs this.

Data-parallel when torch.distributed is initialised. Losses are sums over known targets divided by the global count,
so the number of workers does not change the objective. The order of the data belongs to the loader; everything random
here follows from (seed, step, rank), so a run resumes from any step as if it had never stopped.

A step asks the device nothing: whether it was finite is decided there, and one that was not, like all after it, changes
no weight. It is named at the next check: when a log or a checkpoint is due, after UNREAD steps, at an epoch's end.
"""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clcr import metrics as M
from clcr.base import MultimodalModel
from clcr.batches import Batch
from clcr.class_loss import ClassLoss
from clcr.errors import ConfigError, DivergedError
from clcr.schedule import parse_scales, scale_parts, warmup_cosine
from clcr.steps import Losses, Step, blame, read
from clcr.tasks import TaskSpec, target_losses
from clcr.versions import completed_weights

NAMED = 16  # clips that an error names
UNREAD = 50  # steps after which what they showed is read in any case


@dataclass(frozen=True)
class OptimConfig:
    """How a model is trained."""

    epochs: int = 30
    """passes over the training split"""
    patience: int = 0
    """stop after so many epochs without a better val/score; 0 = never"""
    batch_size: int = 32
    """clips per step, over all workers together"""
    micro_batch: int = 0
    """clips that a worker passes forward and back at once, where its share of a step does not fit into its memory;
    gradients are summed over the passes. The regularisers then compare the clips of one pass (of all workers), not of
    the whole step, and so do mm_orient's neighbours and ogm_ge's noise. 0 = the whole share"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum 0.9 (the paper)"""
    lr: float = 1e-3
    """peak learning rate"""
    lr_scale: tuple[str, ...] = ()
    """parts of the model that learn faster or slower, `encoder=.1`: the rate of a module, by its dotted name, times
    that of the rest; of a module within another the inner one's counts. A wrong name lists them"""
    weight_decay: float = 1e-2
    """on weight matrices only: bases, budgets, norms and biases are left out"""
    warmup: float = 0.1
    """share of all steps over which the learning rate rises linearly; then it falls along a cosine"""
    grad_clip: float = 1.0
    """largest norm of the whole gradient; 0 = no clipping"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast; bases, the budget, heads and losses stay in float32; for GPUs: on CPUs attention is slower in
    it"""
    compile: bool = False
    """run the model through torch.compile"""
    score: Literal["bounded", "skill"] = "bounded"
    """what val/score, which chooses the best epoch and trial, takes of a numeric task: its skill, below 0 bounded by -1
    so that one task cannot outweigh all others; or the plain skill, as version 1 did"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        for name in ("patience", "micro_batch", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"--warmup {self.warmup}: must lie in [0, 1)")
        object.__setattr__(self, "lr_scale", tuple(self.lr_scale))
        parse_scales(self.lr_scale)


class Loader(Protocol):
    """What the loop needs of a data loader: a fixed number of steps, and batches by epoch."""

    steps: int

    def batches(self, epoch: int, first: int = 0) -> Iterable[Batch]:
        """This worker's share of every global batch of an epoch, from batch `first` on."""

    def sample_batches(self, clips: int) -> Iterable[Batch]:
        """A seeded sample of so many clips, the same on every worker."""


@dataclass
class Epoch:
    """What one epoch showed. metrics: by tracking name; improved: val/score is the best so far."""

    number: int
    metrics: dict[str, float]
    improved: bool


class Trainer:
    """A model, its optimiser and what is needed to resume from a checkpoint.

    Raises DivergedError with the clips' ids, on every worker, when a loss or a gradient is not finite.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tasks: Mapping[str, TaskSpec],
        config: OptimConfig,
        steps_per_epoch: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        class_loss: ClassLoss | None = None,
    ) -> None:
        self.class_loss = class_loss
        self.model, self.tasks, self.config, self.seed = model.to(device), tasks, config, seed
        self.device, self.steps_per_epoch = torch.device(device), steps_per_epoch
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        groups = scale_parts(model, model.parameter_groups(config.weight_decay), config.lr_scale)
        for group in groups:
            group["lr"] = config.lr * group.pop("lr_scale", 1.0)  # the schedule multiplies each group's own
        self.optimizer: Any  # found_inf is in no type hint
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(config.epochs * steps_per_epoch, config.warmup)
        )
        # The fused optimisers of torch leave everything as it is where this is 1.
        self.stopped = self.optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=self.device)
        self.next_epoch, self.done = 0, 0  # the epoch under way, and how many of its steps are done
        self.sums: dict[str, float] = defaultdict(float)  # this worker's part of their losses' sums, and of their time
        self.unread: list[Step] = []
        self.best_score, self.best_epoch = -math.inf, -1
        self.best_weights: dict[str, Tensor] = {}
        forward = torch.compile(self.model, dynamic=True) if config.compile else self.model  # batches differ in shape
        self.forward: Any = DistributedDataParallel(forward) if self.world > 1 else forward

    @property
    def step(self) -> int:
        """Steps done since the beginning."""
        return self.next_epoch * self.steps_per_epoch + self.done

    @property
    def finished(self) -> bool:
        """All epochs are done, or the last `patience` of them brought nothing better."""
        stale = self.next_epoch - 1 - self.best_epoch
        return self.next_epoch >= self.config.epochs or 0 < self.config.patience <= stale

    def fit(
        self, train: Loader, val: Loader, after_step: Callable[[Mapping[str, float]], None] | None = None
    ) -> Iterator[Epoch]:
        """Train and validate; yields after every epoch, so that the caller may report, save or stop.

        after_step: called after every step with this worker's losses of it, which stay on the device until they are
        looked at; `state_dict` may be taken there too.
        """
        while not self.finished:
            measured = self.train_epoch(train.batches(self.next_epoch, self.done), after_step)
            with torch.no_grad(), self._autocast():
                self.model.prepare_evaluation(train.sample_batches)
            predictions, diagnostics = self.evaluate(val.batches(0))
            measured |= M.tracked("val", self.metrics(predictions), self.config.score) | diagnostics
            improved = measured["val/score"] > self.best_score
            if improved:
                self.best_score, self.best_epoch = measured["val/score"], self.next_epoch
                self.best_weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.next_epoch, self.done = self.next_epoch + 1, 0
            self.sums.clear()
            yield Epoch(self.next_epoch - 1, measured, improved)

    def train_epoch(
        self, batches: Iterable[Batch], after_step: Callable[[Mapping[str, float]], None] | None = None
    ) -> dict[str, float]:
        """The rest of an epoch; returns the whole epoch's means of all losses, the learning rate and the speed."""
        self.forward.train()
        clock, after = time.perf_counter(), 0.0
        for batch in batches:
            waited = time.perf_counter() - clock
            torch.manual_seed(mixed_seed(self.seed, self.step, self.rank))  # dropout, and the shift of frames
            step = self.advance(batch.to(self.device))
            self.unread.append(step)
            self.done += 1
            now = time.perf_counter()
            self.sums["samples"] += sum(map(bool, batch.clip_ids))
            for name, value in {"waited": waited, "seconds": now - clock + after}.items():
                self.sums[name] += value / self.world  # their number may change before the epoch ends
            if after_step:
                after_step(step.losses)
            if len(self.unread) >= UNREAD:
                self.check()
            clock = time.perf_counter()
            after = clock - now  # counts as time of the next step, which has not waited for it
        self.check()
        self.sums["seconds"] += (time.perf_counter() - clock) / self.world  # until the device was done
        return self._epoch_means()

    def train_step(self, batch: Batch) -> Losses:
        """`advance`, read at once: raises DivergedError where this very step is not finite."""
        step = self.advance(batch)
        self._require_finite([step])
        return step.losses

    def advance(self, batch: Batch) -> Step:
        """Forward, backward, update on one batch, all given to the device without waiting for it.

        Where the loss or a gradient is not finite neither this step nor a later one changes any weight.
        """
        parts = batch.split(self.config.micro_batch) if self.config.micro_batch else [batch]
        weights = self._task_weights(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses, finite = [], []
        for number, part in enumerate(parts):
            with self._synchronised(number + 1 == len(parts)):
                with self._autocast():
                    out = self.forward(part)
                own = {name: self._losses(name, out.logits[name], part.targets[name]) for name in self.tasks}
                tasks = {
                    f"train/loss_{name}": own[name].sum() * weight
                    for name, weight in zip(self.tasks, weights, strict=True)
                }
                terms = tasks | {f"train/loss_{name}": value / len(parts) for name, value in out.losses.items()}
                for m, logits_of in out.unimodal.items():
                    terms[f"train/loss_unimodal_{m}"] = self._unimodal(m, logits_of, part, weights)
                loss = sum(terms.values())
                # Times one exactly; but a loss that is not finite makes every gradient so, and the norm below.
                (loss * (loss.detach() * 0 + 1)).backward()
            losses.append(torch.stack([loss, *terms.values()]).detach())
            each = [values.detach().isfinite().view(len(part), -1).all(dim=1) for values in own.values()]
            finite.append(torch.stack(each).all(dim=0))
        # The norm is that of the gradient averaged over workers: all see the same, and stop together.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        torch.maximum(self.stopped, (~norm.isfinite()).to(self.stopped.dtype), out=self.stopped)
        self.optimizer.step()
        self.schedule.step()
        values = Losses(["train/loss", *terms], torch.stack(losses).sum(0))
        return Step(self.step, values, norm, batch.clip_ids, torch.cat(finite))

    def check(self) -> None:
        """Read what the steps since the last check showed. Every worker must call it, after the same step.

        Raises DivergedError for the first of them that was not finite.
        """
        steps, self.unread = self.unread, []
        self._require_finite(steps)
        for step in steps:
            for name, value in step.losses.items():
                self.sums[name] += value / self.world

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[dict[str, M.Predictions], dict[str, float]]:
        """Predictions of every clip by task, gathered over workers, and the means of the model's diagnostics."""
        self.forward.eval()
        kinds = {n: torch.float32 if task.has_classes else torch.float64 for n, task in self.tasks.items()}
        parts: list[Mapping[str, M.Predictions]] = []
        sums: dict[str, Tensor] = {}  # of every diagnostic its sum and how many clips have it
        for batch in batches:
            batch = batch.to(self.device)
            with self._autocast():
                out = self.model(batch)
            logits = {n: out.logits[n].to(kinds[n]).cpu() for n in self.tasks}
            parts.append({n: M.Predictions(batch.clip_ids, logits[n], batch.targets[n].cpu()) for n in self.tasks})
            real = torch.tensor([bool(clip_id) for clip_id in batch.clip_ids]).to(self.device)  # no padding
            for name, value in self.model.diagnostics(out, batch).items():
                known = real & ~value.isnan()  # NaN: a modality that the clip lacks
                found = torch.stack([value.double().where(known, 0.0).sum(), known.sum()])
                sums[name] = sums[name] + found if name in sums else found
        gathered = _gather((M.concatenate(parts), {name: found.tolist() for name, found in sums.items()}))
        means = {
            f"diag/{name}": sum(s[name][0] for _, s in gathered) / max(1, sum(s[name][1] for _, s in gathered))
            for name in sums
        }
        return M.concatenate([p for p, _ in gathered]), means

    def metrics(self, predictions: Mapping[str, M.Predictions]) -> dict[str, dict[str, float]]:
        """Metrics by task of what `evaluate` gave, for tasks that have a labelled clip."""
        spreads = {name: float(self.model.units.spread_of(name)) for name in self.tasks}
        return M.split_metrics(self.tasks, predictions, spreads)

    def load_best(self) -> None:
        """Put the weights of the best epoch (by val/score) into the model."""
        self.model.load_state_dict(self.best_weights)

    def mean_over_workers(self, losses: Mapping[str, float]) -> dict[str, float]:
        """A step's losses over all workers. Every worker must call it. Raises as `check` does."""
        self.check()
        shares = _gather(dict(losses))
        return {name: sum(share[name] for share in shares) / self.world for name in losses}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to resume from here, on any number of workers. Every worker must call it.

        Raises as `check` does: a run that has diverged is not saved.
        """
        self.check()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "next_epoch": self.next_epoch,
            "done": self.done,
            "sums": _gather(dict(self.sums)),
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        fresh = self.model.state_dict()
        self.model.load_state_dict(completed_weights(state["model"], fresh))
        for part in ("optimizer", "schedule"):
            getattr(self, part).load_state_dict(state[part])
        for group in self.optimizer.param_groups:
            group |= {"fused": True, "foreach": None}  # an earlier version's SGD was not
        for name in ("next_epoch", "done", "best_score", "best_epoch", "best_weights"):
            setattr(self, name, state[name])
        if self.best_weights:
            self.best_weights = completed_weights(self.best_weights, fresh)
        self.sums.clear()
        for share in state["sums"][self.rank :: self.world]:
            for name, value in share.items():
                self.sums[name] += value

    def _epoch_means(self) -> dict[str, float]:
        """Of the steps summed so far, over all workers. Padding is no sample."""
        shares = _gather(dict(self.sums))
        totals = {name: sum(share.get(name, 0.0) for share in shares) for name in {k: 0 for s in shares for k in s}}
        samples, waited, seconds = (totals.pop(name) for name in ("samples", "waited", "seconds"))
        return {name: total / self.done for name, total in totals.items()} | {
            "train/lr": self.schedule.get_last_lr()[0],
            "perf/samples_per_s": samples / seconds,
            "perf/waiting_for_data": waited / seconds,
            "perf/epoch_s": seconds,
        }

    def _task_weights(self, batch: Batch) -> Tensor:
        """What each task's sum of losses is multiplied with: its weight over its known targets in the whole step."""
        known = [task.known(batch.targets[name]).sum() for name, task in self.tasks.items()]
        counts = torch.stack(known).float()
        if self.world > 1:
            dist.all_reduce(counts)
        # DistributedDataParallel averages gradients over workers; the world size undoes it.
        own = torch.stack([counts.new_full((), self.model.config.loss.task_weight(name)) for name in self.tasks])
        return own * self.world / counts.clamp(min=1)

    def _losses(self, task: str, logits: Tensor, target: Tensor) -> Tensor:
        """A task's loss of every target, 0 where it is not known."""
        spec = self.tasks[task]
        if self.class_loss and spec.has_classes:
            return self.class_loss(spec, logits, target)
        return target_losses(spec, logits, target, self.model.units.spread_of(task))

    def _unimodal(self, modality: str, logits: Mapping[str, Tensor], part: Batch, weights: Tensor) -> Tensor:
        """The tasks' losses of one modality's own logits, over the clips that have it, weighted: ()."""
        each = [self._losses(name, logits[name], part.targets[name]) for name in self.tasks]
        losses = torch.stack([x.view(len(part), -1).sum(dim=1) for x in each]) * part.present[modality]
        return self.model.config.loss.unimodal * (losses.sum(dim=1) * weights).sum()

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients in the last pass of a step only."""
        return nullcontext() if last or self.world == 1 else self.forward.no_sync()

    def _require_finite(self, steps: list[Step]) -> None:
        for step, norm in zip(steps, read(steps), strict=True):
            if not math.isfinite(norm):
                clips = [clip_id for clip_id in step.clip_ids if clip_id]
                own = [c for c, good in zip(step.clip_ids, step.finite.tolist(), strict=True) if c and not good]
                shares = _gather((step.losses["train/loss"], clips, own))
                raise DivergedError(blame(shares, step.number, norm, NAMED))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers: the first 8 bytes of the SHA-256 of their decimal digits, joined by commas."""
    return int.from_bytes(hashlib.sha256(",".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def _gather(value: Any) -> list[Any]:
    """The value of every worker, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
