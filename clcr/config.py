"""The options of every model: frozen dataclasses with a docstring under each field (the command line shows them)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clcr.errors import ConfigError

Pooling = Literal["attention", "mean", "statistics"]
Hierarchy = Literal["levels", "deepest", "repeated", "mixed"]
Exchange = Literal["budgeted", "dense", "whole", "none"]
Space = Literal["coordinates", "lifted", "tokens"]
Aggregation = Literal["attention", "even_levels", "mean"]
BudgetKind = Literal["learned", "fixed"]
FrameStem = Literal["patches", "trunk", "resnet18"]
Layers = Literal["levels", "stages"]
Correlation = Literal["cka", "whitened"]
Absent = Literal["zeros", "reweighted"]
Untimed = Literal["average", "far"]
Sage = Literal["relu", "normalised"]
Attention = Literal["two_stage", "released"]
Evidence = Literal["norm", "content"]
Regularised = Literal["summaries", "means"]
Reference = Literal["bank", "batch"]


def _require(condition: bool, option: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"--{option} {value}: {rule}")


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`name=value` words of an option as a dict."""
    for value in values:
        _require("=" in value.strip("="), option, value, "give name=value, several separated by commas")
    return dict(value.split("=", 1) for value in values)


def _require_one_of(value: str, choices: object, option: str) -> None:
    _require(value in get_args(choices), option, value, f"choose one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class ModelConfig:
    """Size and shape of the network (the baselines share it)."""

    width: int = 128
    """Features per token (d)."""
    levels: int = 3
    """Levels of the semantic hierarchy (K), 1 to 5; the paper has 3."""
    heads: int = 4
    """Attention heads of the exchange; must divide its dimensions, of coordinates those of the shared subspace."""
    dropout: float = 0.1
    """Dropout in the encoder's blocks, on exchanged tokens and in the heads."""
    pooling: Pooling = "attention"
    """From tokens to a summary: a learned query per task, the mean over time (the paper), or a learned query and how
    much the tokens vary in time (statistics)."""
    blocks: int = 1
    """Residual convolutions per stage of the encoder, after its plain one."""
    stride: int = 2
    """Temporal pooling before each stage after the first: 2 halves the tokens, 1 keeps them."""
    min_rate: float = 12.0
    """Tokens per second that pooling between stages never goes below: slow inputs keep their tokens."""
    max_rate: float = 50.0
    """Tokens per second at the shallow level, at most: faster inputs are merged by the first stage."""
    shared_width: int = 0
    """Dimensions of a level's shared subspace (k_s); 0 is half the width."""
    private_width: int = 0
    """Dimensions of a private subspace (k_p), at most width - k_s; 0 is private_share of the width."""
    private_share: float = 0.4375
    """Share of the width that a private subspace takes where private_width is 0. With k_s it must leave some of the
    width free, or all modalities have the same private subspace, which cannot be learned; but what it leaves free of a
    token is lost."""
    hierarchy: Hierarchy = "levels"
    """What exchanges: each level by itself; ablations: the deepest one in every level's place (repeated), the deepest
    one alone, which leaves the heads less to read, or all levels mixed together."""
    exchange: Exchange = "budgeted"
    """How: within the token budget; ablations: dense (no budget), none, or whole (neither budget nor subspaces)."""
    space: Space = "coordinates"
    """What is exchanged: coordinates in the shared subspace, the shared part of a token at full width (lifted), or
    whole tokens, of which the private part travels too (tokens); what is read stays in the subspaces."""
    null_key: bool = True
    """A head may hear nothing, by a key of value 0; without it the budget does not bound how much is heard of a single
    other modality."""
    null_logit: float = -1.0
    """Start of each head's logit of hearing nothing, compared with all that it could hear: at -1 it hears .73 of it,
    where content is indifferent."""
    nearest: float = 2.0
    """Start of the gain for nearness in time of the first head: at 2 it hears a tenth of a second."""
    farthest: float = 1.0
    """The same of the last head; 0 = blind to time, and so it stays."""
    by_index: bool = True
    """Tokens without a time are near by their place, where no modality has a time and those there are equally long."""
    untimed: Untimed = "average"
    """How tokens without a time are heard beside some that have one: as the average one of these, or as before version
    5 as one far away, that is hardly (far; then places count beside times too)."""
    alike: bool = True
    """Queries and keys of the exchange start as what they are made of, so that a token first hears those like itself;
    no: from random maps, whose logits hardly differ."""
    drop_answer: float = 0.0
    """In training, share of clips (of each modality and level) that hear nothing of the others."""
    synchronise: bool = False
    """Bring each level's summaries into one space by a linear map of their own before they are averaged."""
    aggregation: Aggregation = "attention"
    """Of levels and modalities: learned weights; ablations: even_levels (omega uniform), or mean (no weights)."""
    absent: Absent = "zeros"
    """A missing modality is zeros in the shared path: what is there is as loud as it was where beta is even, and the
    whole by the share of modalities that are there; or these are weighed up to fill its place (reweighted)."""

    def __post_init__(self) -> None:
        _require(self.width >= 2, "model.width", self.width, "must be 2 or more")
        _require(1 <= self.levels <= 5, "model.levels", self.levels, "must lie in 1..5")
        _require(self.heads >= 1, "model.heads", self.heads, "must be 1 or more")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must lie in [0, 1)")
        _require(self.blocks >= 1, "model.blocks", self.blocks, "must be 1 or more")
        _require(self.stride >= 1, "model.stride", self.stride, "must be 1 or more")
        _require(self.min_rate >= 0, "model.min-rate", self.min_rate, "must not be negative (tokens per second)")
        _require(self.max_rate > 0, "model.max-rate", self.max_rate, "must be positive (tokens per second)")
        _require(0 < self.private_share <= 0.5, "model.private-share", self.private_share, "must lie in (0, 0.5]")
        _require(self.nearest >= 0, "model.nearest", self.nearest, "must not be negative")
        _require(self.farthest >= 0, "model.farthest", self.farthest, "must not be negative")
        _require(0 <= self.drop_answer < 1, "model.drop-answer", self.drop_answer, "must lie in [0, 1)")
        _require(math.isfinite(self.null_logit), "model.null-logit", self.null_logit, "must be a finite number")
        k_shared, k_private = self._subspaces
        _require(
            k_shared >= 1 and k_private >= 1 and k_shared + k_private <= self.width,
            "model.shared-width",
            k_shared,
            f"must be 1 or more, and with --model.private-width {k_private} not exceed the width {self.width}",
        )
        _require_one_of(self.pooling, Pooling, "model.pooling")
        _require_one_of(self.hierarchy, Hierarchy, "model.hierarchy")
        _require_one_of(self.exchange, Exchange, "model.exchange")
        _require_one_of(self.space, Space, "model.space")
        _require_one_of(self.absent, Absent, "model.absent")
        _require_one_of(self.untimed, Untimed, "model.untimed")
        _require_one_of(self.aggregation, Aggregation, "model.aggregation")

    @property
    def _subspaces(self) -> tuple[int, int]:
        """k_s and k_p."""
        k_private = self.private_width or max(1, int(self.private_share * self.width))
        return self.shared_width or self.width // 2, k_private

    @property
    def k_shared(self) -> int:
        """Dimensions of the shared flow: of its subspace, or of the whole token."""
        return self.width if self.exchange == "whole" else self._subspaces[0]

    @property
    def k_private(self) -> int:
        """Dimensions of each private flow: of its subspace, or of the whole token."""
        return self.width if self.exchange == "whole" else self._subspaces[1]

    @property
    def exchange_width(self) -> int:
        """Dimensions of what the exchange attends with."""
        return self.k_shared if self.space == "coordinates" else self.width


@dataclass(frozen=True)
class StemConfig:
    """How raw feature values become tokens."""

    video: FrameStem = "patches"
    """Frames to tokens: a linear map of patch means (cheapest), a small convolutional trunk, or ResNet-18."""
    motion: bool | None = None
    """Remove the clip's mean and add differences, of frames and of vectors in time; default: not of resnet18's."""
    shift: float = 0.1
    """In training, move each clip's frames by up to this share of their side, up or down, left or right; 0 = off."""
    layers: Layers | None = None
    """How hidden layers of a network become levels: each is one, as it is (levels), or each enters a stage of the
    temporal network, on top of what the stages before made of earlier ones (stages); default: stages of what has a
    time (frames, sound), levels of text."""

    def __post_init__(self) -> None:
        _require_one_of(self.video, FrameStem, "stem.video")
        if self.layers is not None:
            _require_one_of(self.layers, Layers, "stem.layers")
        _require(0 <= self.shift < 0.5, "stem.shift", self.shift, "must lie in [0, 0.5)")

    @property
    def uses_motion(self) -> bool:
        """Whether frames are split into the clip's mean frame and what moves."""
        return self.video != "resnet18" if self.motion is None else self.motion

    def staged(self, rate: float) -> bool:
        """Whether layers at so many tokens per second, 0 = without a time, enter the temporal network's stages."""
        return rate > 0 if self.layers is None else self.layers == "stages"

    @property
    def vectors_move(self) -> bool:
        """The same of vectors that have a time."""
        return self.motion is not False


@dataclass(frozen=True)
class BudgetConfig:
    """The token budget: budget = gamma * sigmoid(rho) * valid tokens."""

    kind: BudgetKind = "learned"
    """Whether the share of admitted tokens is learned, or stays at its start (ablation)."""
    start: tuple[float, ...] = (0.68,)
    """Share of tokens admitted at the start (b0, rho = logit(b0)): one value, or one per level."""
    gamma: float = 1.0
    """Fixed multiplier of the budget."""
    evidence: Evidence = "norm"
    """What speaks for a token: its size in the shared subspace (the paper), or that and a learned direction in it."""
    threshold: float = -1.5
    """Start of the evidence threshold, in standard deviations of the evidence."""
    scale: float = 1.0
    """Start of the steepness of the activation (positive)."""
    lr_scale: float = 10.0
    """Learning rate of single numbers (rho, threshold, scale, gains in time, null logits), times that of the rest: at
    the same rate they barely move in a short run. At 1 they are as the rest, and gains decay as matrices do."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", tuple(self.start))
        _require_one_of(self.kind, BudgetKind, "budget.kind")
        _require_one_of(self.evidence, Evidence, "budget.evidence")
        _require(
            bool(self.start) and all(0 < b < 1 for b in self.start),
            "budget.start",
            self.start,
            "each value must lie strictly between 0 and 1",
        )
        _require(self.gamma > 0, "budget.gamma", self.gamma, "must be positive")
        _require(self.scale > 0, "budget.scale", self.scale, "must be positive")
        _require(self.lr_scale > 0, "budget.lr-scale", self.lr_scale, "must be positive")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the tasks, and of the regularisers added to them."""

    lambda_intra: float = 0.01
    """Weight of the intra-level term: private flows apart from each other and from the shared flow."""
    lambda_inter: float = 0.01
    """Weight of the inter-level terms together."""
    pr: float = 1.0
    """Weight, within lambda_inter, of L_pr: private flows apart between levels."""
    sp: float = 1.0
    """Weight, within lambda_inter, of L_sp: shared and private flows apart between levels."""
    mix: float = 1.0
    """Weight, within lambda_inter, of L_mix: levels that contradict each other are not mixed."""
    align: float = 0.0
    """Weight of 1 - CKA between modalities' shared flows before the exchange, so that shared content is (ours)."""
    unimodal: float = 0.0
    """Weight of the tasks' losses of one more head for each modality, which reads what that modality says by itself
    (clcr, concat); answers do not use it."""
    regularised: Regularised = "summaries"
    """What the terms compare: the summaries that the heads read, or the flows' means over time."""
    correlation: Correlation = "cka"
    """Measure of dependence: debiased linear CKA, or the whitened cross-correlation the paper names."""
    task_weights: tuple[str, ...] = ()
    """name=weight of a task's loss, comma separated; a task that is not named weighs 1."""
    standardise: bool = True
    """Learn numbers in units of their spread over the training labels, so that the unit of the labels does not matter;
    predictions are in the unit of the labels either way. False: as version 1 did."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_weights", tuple(self.task_weights))
        for name, weight in pairs(self.task_weights, "loss.task-weights").items():
            _require(_not_negative(weight), "loss.task-weights", f"{name}={weight}", "must be a number, 0 or more")
        _require(self.lambda_intra >= 0, "loss.lambda-intra", self.lambda_intra, "must not be negative")
        _require(self.lambda_inter >= 0, "loss.lambda-inter", self.lambda_inter, "must not be negative")
        for term in ("pr", "sp", "mix", "align", "unimodal"):
            _require(getattr(self, term) >= 0, f"loss.{term}", getattr(self, term), "must not be negative")
        _require_one_of(self.correlation, Correlation, "loss.correlation")
        _require_one_of(self.regularised, Regularised, "loss.regularised")

    def task_weight(self, task: str) -> float:
        """Weight of a task's loss."""
        return float(pairs(self.task_weights, "loss.task-weights").get(task, 1.0))


def _not_negative(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True)
class MMOrientConfig:
    """What `mm_orient` alone has."""

    linked: float = 0.1
    """Share of the pairs of training clips that a modality's graph links: it sets the least cosine of a link."""
    threshold: float | None = None
    """Instead, one least cosine for every graph, of embeddings as they are stored (the paper: 0.9)."""
    reference: Reference = "bank"
    """What a predicted clip is compared with: a bank of training clips, or the others of its batch (the paper)."""
    bank: int = 128
    """Clips in the bank, a seeded sample of the training split."""
    sage: Sage = "relu"
    """What a graph layer ends with: ReLU, or (the paper's released code) no activation but unit length."""
    attention: Attention = "two_stage"
    """HIMA: weights over a clip's tokens and then over clips (the paper), or (its released code) over tokens alone, by
    one layer with GELU."""
    embeddings: tuple[str, ...] = ()
    """modality=other: the other modality's one vector is the modality's global embedding (image=clip_image)."""
    side: tuple[str, ...] = ()
    """Modalities of one vector that only the heads read, in addition to what was learned (emotion, toxicity)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "embeddings", tuple(self.embeddings))
        object.__setattr__(self, "side", tuple(self.side))
        _require(0 < self.linked < 1, "mm-orient.linked", self.linked, "must lie strictly between 0 and 1")
        fits = self.threshold is None or -1 <= self.threshold < 1
        _require(fits, "mm-orient.threshold", self.threshold, "a cosine, must lie in [-1, 1)")
        _require(self.bank >= 1, "mm-orient.bank", self.bank, "must be 1 or more")
        _require_one_of(self.reference, Reference, "mm-orient.reference")
        _require_one_of(self.sage, Sage, "mm-orient.sage")
        _require_one_of(self.attention, Attention, "mm-orient.attention")
        pairs(self.embeddings, "mm-orient.embeddings")


@dataclass(frozen=True)
class MISAConfig:
    """Weights of the losses of `misa` in addition to the task's."""

    similarity: float = 0.3
    """Central moment discrepancy between the modalities' shared parts."""
    difference: float = 0.03
    """Overlap of shared with private parts, and of private parts with each other."""
    reconstruction: float = 0.3
    """Error of what shared and private part together restore."""

    def __post_init__(self) -> None:
        for name in ("similarity", "difference", "reconstruction"):
            _require(getattr(self, name) >= 0, f"misa.{name}", getattr(self, name), "must not be negative")


@dataclass(frozen=True)
class OGMGEConfig:
    """How `ogm_ge` modulates gradients."""

    alpha: float = 0.8
    """How fast a modality that is ahead is slowed down: 1 - tanh(alpha * how many times it is ahead)."""
    noise: bool = True
    """Add to each of the encoders' weight gradients Gaussian noise of the gradient's own spread (GE)."""

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, "ogm-ge.alpha", self.alpha, "must not be negative")


@dataclass(frozen=True)
class MulTConfig:
    """What `mult` alone has."""

    depth: int = 4
    """Layers of each crossmodal and each self-attention transformer."""

    def __post_init__(self) -> None:
        _require(self.depth >= 1, "mult.depth", self.depth, "must be 1 or more")


@dataclass(frozen=True)
class CLCRConfig:
    """All options of a model."""

    model: ModelConfig = field(default_factory=ModelConfig)
    stem: StemConfig = field(default_factory=StemConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mm_orient: MMOrientConfig = field(default_factory=MMOrientConfig)
    misa: MISAConfig = field(default_factory=MISAConfig)
    ogm_ge: OGMGEConfig = field(default_factory=OGMGEConfig)
    mult: MulTConfig = field(default_factory=MulTConfig)

    def __post_init__(self) -> None:
        _require(
            len(self.budget.start) in (1, self.model.levels),
            "budget.start",
            self.budget.start,
            f"give one value, or one for each of --model.levels {self.model.levels}",
        )

    def budget_start(self, level: int) -> float:
        """Share of tokens admitted at the start at a level."""
        return self.budget.start[level if len(self.budget.start) > 1 else 0]

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> "CLCRConfig":
        """The config that `dataclasses.asdict` (or a JSON file) describes; an unknown name is an error."""
        parts: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        for name in values:
            _require(name in parts, name, "", f"no such group of options; there are {', '.join(parts)}")
        for group, options in values.items():
            known = {f.name for f in dataclasses.fields(parts[group])}
            for option in options:
                _require(option in known, f"{group}.{option}", "", "no such option")
        return cls(**{group: parts[group](**options) for group, options in values.items()})
