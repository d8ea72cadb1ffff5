"""A learning rate by part: every weight moves by its own factor, and by none where none is asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clcr.errors import ConfigError
from clcr.schedule import scale_parts
from clcr.training import OptimConfig


def toy():
    inner = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    return nn.ModuleDict({"encoder": inner, "encoders": nn.Linear(2, 2), "heads": nn.Linear(2, 2)})


def groups_of(model):
    of = list(model.parameters())
    return [
        {"params": [p for p in of if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in of if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 10.0},
    ]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["encoder", "encoder.a", "encoder.a.bias", "heads"]), st.floats(0.01, 100)))
def test_every_parameter_is_in_one_group_with_the_factor_of_its_innermost_part(scales):
    model = toy()
    before = {p: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups_of(model) for p in g["params"]}
    split = scale_parts(model, groups_of(model), [f"{part}={factor!r}" for part, factor in scales.items()])
    assert sorted(map(id, before)) == sorted(id(p) for group in split for p in group["params"])
    assert all(group["params"] for group in split)
    names = {p: name for name, p in model.named_parameters()}
    for group in split:
        for p in group["params"]:
            inner = [part for part in scales if names[p] == part or names[p].startswith(part + ".")]
            factor = scales[max(inner, key=len)] if inner else 1.0
            decay, scale = before[p]
            assert group["weight_decay"] == decay and group.get("lr_scale", 1.0) == pytest.approx(scale * factor)


def test_without_factors_groups_are_as_they_were():
    model = toy()
    assert scale_parts(model, groups_of(model), ()) == groups_of(model)


def test_what_is_no_part_or_no_factor_is_named():
    for entry in ("encoder", "encoder=0", "encoder=-1", "encoder=fast", "=1", "encoder=inf", "encoder=nan"):
        with pytest.raises(ConfigError, match=f"--lr-scale {entry}: write PART=FACTOR, above 0"):
            OptimConfig(lr_scale=(entry,))
    with pytest.raises(ConfigError, match="--lr-scale encode: this model has encoder, encoders, heads"):
        scale_parts(toy(), (), ["encode=.1"])
