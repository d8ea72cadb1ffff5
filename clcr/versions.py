"""Old files keep their meaning: an option that a file does not name has the value with which its version behaved.

Files written by `clcr.save` and by the jobs carry the number of the version that wrote them; those without one are of
version 1. An option that changes what models did without it gets a new VERSION and a line in EARLIER; a new buffer of a
model a line in NEUTRAL; a new name a line in RENAMED; and nothing else has to be done.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # jobs that load no model read how options are called
    from torch import Tensor

VERSION = 5
# {version: {option: how all files of earlier versions behave}}, by dotted name.
EARLIER: dict[int, dict[str, Any]] = {
    2: {"loss.standardise": False, "score": "skill"},  # numbers were learned in the labels' own unit
    3: {  # the exchange is bounded by its budget, private subspaces differ, levels share a space
        "model.private_share": 0.5,
        "model.space": "coordinates",
        "model.null_key": False,
        "model.nearest": 2.0,
        "model.farthest": 0.0,
        "model.by_index": False,
        "model.alike": False,
        "model.drop_answer": 0.0,
        "model.synchronise": False,
        "model.absent": "reweighted",
        "budget.evidence": "norm",
        "budget.threshold": -1.0,
        "budget.scale": 4.0,
        "budget.lr_scale": 1.0,
        "loss.align": 0.0,
        "loss.unimodal": 0.0,
        "loss.regularised": "means",
        "mm_orient.sage": "relu",
        "mm_orient.attention": "two_stage",
    },
    4: {"stem.layers": "levels"},  # whatever has several layers
    5: {"model.untimed": "far"},
}
# Options that have another name since: {old: new}, by dotted name. Old names are read wherever options are given.
RENAMED = {"model.depth": "mult.depth"}
# Buffers that weights of an earlier version lack, and the value with which the model behaves as it did then.
NEUTRAL: dict[str, float] = {"units.center": 0.0, "units.spread": 1.0}
# Options that every config.yaml and best.yaml of version 1 names, which did not carry their version.
VERSION_1_NAMES = frozenset(
    {
        "model.width",
        "model.levels",
        "model.heads",
        "model.pooling",
        "model.min_rate",
        "stem.video",
        "budget.kind",
        "budget.gamma",
        "loss.lambda_intra",
        "loss.lambda_inter",
        "loss.correlation",
        "mm_orient.bank",
        "misa.similarity",
        "ogm_ge.alpha",
        "model",
        "seed",
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "warmup",
        "precision",
        "loader.cache_gb",
    }
)


def version_of(options: Mapping[str, Any]) -> int:
    """The version of a file of options by dotted name: the one that it says, 1 for what a job of version 1 wrote.

    A file that a person wrote, which names some options, means the defaults of today.
    """
    written = options.get("version", 1 if options.keys() >= VERSION_1_NAMES else VERSION)
    return int(written)


def later_options(version: int) -> dict[str, Any]:
    """Options that came, or whose default changed, after a version, with the value by which it behaved."""
    earlier: dict[str, Any] = {}
    for newer in sorted(EARLIER):
        if newer > version:
            earlier = {**EARLIER[newer], **earlier}  # what the oldest change says of it came first
    return earlier


def completed(options: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Options by dotted name, as a file of this version gives them, with those that came later as it behaves."""
    return {**later_options(version), **renamed(options)}


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by today's dotted names."""
    return {RENAMED.get(name, name): value for name, value in options.items()}


def completed_weights(weights: Mapping[str, "Tensor"], model: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Weights by name with those of NEUTRAL that they lack and `model`, a fresh model's, has."""
    missing: Collection[str] = NEUTRAL.keys() & model.keys() - weights.keys()
    return {**weights, **{name: model[name].new_full(model[name].shape, NEUTRAL[name]) for name in missing}}
