"""CLCR as a whole: what may and may not change a prediction, and that it learns."""

from dataclasses import replace

import pytest
import torch

from clcr.batches import Features, collate


def largest_difference(first, second):
    return max((first.logits[t] - second.logits[t]).abs().max().item() for t in first.logits)


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


@pytest.mark.parametrize("name", ["clcr", "concat", "mult", "video", "audio"])
@torch.no_grad()
def test_padding_order_and_neighbours_never_change_a_clips_logits(make, name):
    batch, samples = make.batch(), make.samples()
    model = make.train(make.model(name), batch, steps=5).eval()
    together = model(batch)
    reordered = model(collate(samples[::-1], make.features, make.tasks))
    for task in make.tasks:
        assert (reordered.logits[task].flip(0) - together.logits[task]).abs().max() <= 1e-5
    for i, sample in enumerate(samples):
        alone = model(collate([sample], make.features, make.tasks))
        for task in make.tasks:
            assert (alone.logits[task][0] - together.logits[task][i]).abs().max() <= 1e-5
    longer = replace(batch, features={m: padded(f) for m, f in batch.features.items()})
    assert largest_difference(model(longer), together) <= 1e-5


def padded(features, extra=13):
    values, valid = features.values, features.valid
    tail = torch.full((len(values), extra, *values.shape[2:]), 7, dtype=values.dtype)
    return Features(torch.cat([values, tail], dim=1), torch.cat([valid, torch.zeros(len(valid), extra) > 0], dim=1))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["clcr", "concat", "mult", "audio"])
def test_missing_modalities_give_no_nan_and_no_weight(make, name, mode):
    samples = make.samples(8)
    del samples[0]["features"]["audio"]
    del samples[1]["features"]["video"]
    samples[2]["features"] = {}
    batch = collate(samples, make.features, make.tasks)
    model = make.model(name, features=make.features)
    getattr(model, mode)()
    loss = make.loss(model, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    out = model(batch)
    assert all(x.isfinite().all() for x in out.logits.values())
    if name == "clcr":
        assert out.beta[0].tolist() == [1.0, 0.0] and out.eta[0, 1] == 0
        assert not out.alpha[0]["audio"][0].any() and out.participation[0]["audio"][0] == 0
        assert not model.diagnostics(out, batch)["participation/0/video"][[0, 3]].isnan().any()


@torch.no_grad()
def test_what_stands_in_for_a_missing_modality_is_never_read(make):
    samples = make.samples(3)
    batch = collate(samples, make.features, make.tasks)
    model = make.model().eval()
    absent = {**batch.present, "audio": torch.tensor([False, True, True])}
    other = {**batch.features, "audio": Features(batch.features["audio"].values + 3, batch.features["audio"].valid)}
    first = model(replace(batch, present=absent))
    second = model(replace(batch, present=absent, features=other))
    assert all(torch.equal(first.logits[t][0], second.logits[t][0]) for t in make.tasks)


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


@pytest.mark.parametrize("name", ["clcr", "concat", "mult", "text"])
def test_three_modalities_one_of_them_language(make, name):
    batch = make.batch(features=make.three)
    model = make.model(name, features=make.three)
    make.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("name", ["clcr", "concat", "mult", "video", "audio"])
def test_every_model_can_learn_a_batch_by_heart(make, name):
    batch = make.batch(6)
    model = make.model(name, width=32, loss={"lambda_intra": 0.0, "lambda_inter": 0.0})
    first = make.loss(model, batch).item()
    last = make.loss(make.train(model, batch, steps=60, lr=5e-3), batch).item()
    assert last < 0.2 * first


def test_vectors_and_scalars_bases_anchors_and_queries_do_not_decay(make):
    model = make.model()
    decayed, undecayed = ({id(p) for p in group["params"]} for group in model.parameter_groups(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed | undecayed == set(names) and not decayed & undecayed
    free = {names[p] for p in undecayed}
    ends = ("subspaces.shared", "subspaces.private", "rho", "raw_scale", "threshold", "anchors", "queries", "bias")
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


@pytest.mark.parametrize("name", ["clcr", "concat", "mult"])
@torch.no_grad()
def test_bfloat16_autocast_changes_a_prediction_little(make, name):
    batch = make.batch()
    model = make.train(make.model(name), batch, steps=5).eval()
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    scale = max(logits.abs().max().item() for logits in expected.logits.values())
    assert 0 < largest_difference(out, expected) <= 0.05 * scale


@pytest.mark.parametrize("name", ["clcr", "concat", "mult"])
def test_a_model_compiles_as_one_graph(make, name):
    model, batch = make.model(name, levels=2, stem={"shift": 0.0}), make.batch()  # no augmentation: comparable
    expected = model(batch)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    assert largest_difference(out, expected) <= 1e-5
    assert all(torch.allclose(out.losses[k], expected.losses[k], atol=1e-5) for k in expected.losses)
