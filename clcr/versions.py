"""Old files keep their meaning: an option that a file does not name has the value with which its version behaved.

Files written by `clcr.save` and by the jobs carry the number of the version that wrote them; those without one are of
version 1. A new option, or a new default, gets a new VERSION and a line in EARLIER, and nothing else has to be done.
"""

from collections.abc import Mapping
from typing import Any

VERSION = 2
# {version: {option: how all files of earlier versions behave}}, by dotted name.
EARLIER: dict[int, dict[str, Any]] = {
    2: {  # the exchange is bounded by its budget, private subspaces differ, levels share a space
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
        "loss.regularised": "means",
        "mm_orient.sage": "relu",
        "mm_orient.attention": "two_stage",
    },
}


def completed(options: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Options by dotted name, as a file of this version gives them, with those that came later as it behaves."""
    earlier: dict[str, Any] = {}
    for newer in sorted(EARLIER):
        if newer > version:
            earlier = {**EARLIER[newer], **earlier}  # what the oldest change says of it came first
    return {**earlier, **options}
