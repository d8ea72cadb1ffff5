"""CLCR as a whole, beyond what it shares with every model (test_models)."""

import pytest
import torch

from clcr.batches import collate


@pytest.fixture
def trained(make):
    batch = make.batch()
    return make.train(make.model(), batch, steps=5).eval(), batch


@torch.no_grad()
def test_exchange_reports_what_the_forward_pass_did(trained):
    model, batch = trained
    hierarchy, out = model.encoder(batch), model(batch)
    tokens = [{m: t.values for m, t in level.items()} for level in hierarchy]
    valid = [{m: t.valid for m, t in level.items()} for level in hierarchy]
    for level, flows in enumerate(model.exchange(tokens, valid, batch.present)):
        assert all(torch.equal(flows.alpha[m], out.alpha[level][m]) for m in model.features)


def test_a_missing_modality_has_no_weight_in_clcr(make):
    samples = make.samples(8)
    del samples[0]["features"]["audio"]
    samples[2]["features"] = {}
    batch, model = collate(samples, make.features, make.tasks), make.model()
    out = model(batch)
    assert out.beta[0].tolist() == [1.0, 0.0] and out.eta[0, 1] == 0
    assert not out.alpha[0]["audio"][0].any() and out.participation[0]["audio"][0] == 0
    diagnostics = model.diagnostics(out, batch)
    assert not diagnostics["participation/0/video"][[0, 3]].isnan().any()
    assert diagnostics["eta/audio"].isnan().nonzero().flatten().tolist() == [0, 2]  # no gate, not one that is shut


def test_a_budget_that_refuses_every_token_gives_no_nan(make):
    model, batch = make.model(), make.batch()
    for level in model.intra:
        level.budget.rho.data.fill_(-200.0)
    loss = make.loss(model, batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(alpha.any() for level in model(batch).alpha for alpha in level.values())


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels(make, levels):
    model, batch = make.model(levels=levels), make.batch()
    make.loss(model, batch).backward()
    out = model(batch)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert out.omega.shape == (6, levels) and torch.allclose(out.omega.sum(1), torch.ones(6))


@pytest.mark.parametrize(
    "options",
    [
        {"shared_width": 8, "private_width": 12},
        {"stride": 1, "blocks": 1},
        {"stem": {"video": "trunk"}},
        {"budget": {"start": (0.3, 0.5, 0.9)}},
    ],
    ids=str,
)
def test_every_option_trains_every_parameter(make, options):
    model, batch = make.model(**options), make.batch()
    make.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.diagnostics(model(batch), batch)


@torch.no_grad()
def test_diagnostics_are_one_number_per_sample(make):
    model, batch = make.model().eval(), make.batch()
    values = model.diagnostics(model(batch), batch)
    assert {"participation/0/video", "budget_active/2/audio", "omega/1", "beta/audio", "eta/video"} <= set(values)
    assert all(v.shape == (6,) and v.isfinite().all() for v in values.values())


def test_vectors_and_scalars_bases_anchors_and_queries_do_not_decay(make):
    model = make.model()
    groups = model.parameter_groups(weight_decay=0.1)
    decayed, *others = ({id(p) for p in group["params"]} for group in groups)
    undecayed = set.union(*others)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed | undecayed == set(names) and not decayed & undecayed
    free = {names[p] for p in undecayed}
    ends = ("subspaces.shared", "subspaces.private", "rho", "raw_scale", "threshold", "anchors", "queries", "bias")
    ends = (*ends, "gain")
    for name in names.values():
        assert (name in free) == (
            name.endswith(ends) or "norm" in name or dict(model.named_parameters())[name].ndim < 2
        )


def test_training_under_bfloat16_autocast_keeps_bases_orthonormal_and_logits_finite(make):
    model, batch = make.model(), make.batch()
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4), lr=3e-3)
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = make.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for level in range(3):
        u_sh, u_pr = model.bases(level)
        assert u_sh.dtype == torch.float32
        assert (u_sh.T @ u_sh - torch.eye(16)).abs().max() <= 1e-5
        assert all((u_sh.T @ u).abs().max() <= 1e-5 for u in u_pr.values())
