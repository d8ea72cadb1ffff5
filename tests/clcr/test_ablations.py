"""Ablations: each switch changes what it says and nothing else, at any K and with any modalities missing."""

import pytest
import torch

import clcr
from clcr.batches import collate

VARIANTS = {
    "full": {},
    "deepest": {"hierarchy": "deepest"},
    "mixed": {"hierarchy": "mixed"},
    "dense": {"exchange": "dense"},
    "whole": {"exchange": "whole"},
    "no exchange": {"exchange": "none"},
    "even levels": {"aggregation": "even_levels"},
    "mean": {"aggregation": "mean"},
    "no regularisers": {"loss": {"lambda_intra": 0.0, "lambda_inter": 0.0}},
    "fixed budget": {"budget": {"kind": "fixed"}},
    "whitened": {"loss": {"correlation": "whitened"}},
    "mean pooling": {"pooling": "mean"},
}


def holey_batch(make, n=8):
    """Three modalities; one sample has them all, the others lack one, two or three."""
    samples = make.samples(n, features=make.three)
    for i, missing in enumerate(
        (["audio"], ["video"], ["text"], ["video", "audio"], ["audio", "text"], list(make.three))
    ):
        for m in missing:
            del samples[i]["features"][m]
    return collate(samples, make.three, make.tasks)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_trains_every_parameter_at_any_depth_with_modalities_missing(make, options, levels):
    model, batch = make.model(features=make.three, levels=levels, **options), holey_batch(make)
    loss = make.loss(model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    out = model(batch)
    used = 1 if options.get("hierarchy") == "deepest" else levels
    assert out.omega.shape == (8, used) and len(out.alpha) == len(out.shared) == used
    assert torch.allclose(out.omega.sum(1), torch.ones(8))
    assert torch.allclose(out.beta.sum(1), torch.tensor([1.0] * 5 + [0.0] + [1.0] * 2))
    assert not out.beta[0, 1] and not out.eta[0, 1] and not out.alpha[0]["audio"][0].any()
    assert all(value.shape == (8,) for value in model.diagnostics(out, batch).values())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_comes_back_from_its_folder(make, options, tmp_path):
    batch = make.batch()
    model = make.train(make.model(**options), batch, steps=2).eval()
    clcr.save(model, tmp_path, {})
    again = clcr.load(tmp_path)
    assert again.config == model.config
    for task in make.tasks:
        assert torch.equal(again(batch).logits[task], model(batch).logits[task])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_a_variant_changes_the_network_and_never_its_encoder_or_heads(make, options):
    full, variant = make.model(), make.model(**options)
    kept = ("encoder", "heads") if options.get("hierarchy") != "deepest" else ("heads",)  # unread levels are not built
    for part in kept:
        shapes = [{n: p.shape for n, p in getattr(m, part).state_dict().items()} for m in (full, variant)]
        assert shapes[0] == shapes[1]


def exchanged_after_moving(model, batch, modality, level, direction):
    """Largest change of the other modalities' exchanged tokens, per level, when one level's tokens move."""
    hierarchy = model.encoder(batch)
    valid = [{m: t.valid for m, t in tokens.items()} for tokens in hierarchy]
    tokens = [{m: t.values for m, t in tokens.items()} for tokens in hierarchy]
    moved = [dict(by_modality) for by_modality in tokens]
    moved[level][modality] = tokens[level][modality] + 3 * direction
    before, after = (model.exchange(x, valid, batch.present) for x in (tokens, moved))
    return [
        max((a.shared[n] - b.shared[n]).abs().max().item() for n in a.shared if n != modality)
        for a, b in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("hierarchy", ["levels", "mixed"])
@torch.no_grad()
def test_only_the_full_mix_lets_levels_hear_each_other_and_its_private_flows_stay_private(make, hierarchy):
    model, batch = make.model(features=make.three, hierarchy=hierarchy).eval(), make.batch(features=make.three)
    for level in range(3):
        u_sh, u_pr = model.bases(level)
        changes = exchanged_after_moving(model, batch, "audio", level, u_sh[:, 0])
        assert [change > 1e-4 for change in changes] == [hierarchy == "mixed" or k == level for k in range(3)]
        assert max(exchanged_after_moving(model, batch, "audio", level, u_pr["audio"][:, 0])) <= 1e-5


def test_the_full_mix_has_one_basis_and_one_budget_for_all_levels(make):
    model, batch = make.model(hierarchy="mixed", budget={"start": (0.5, 0.6, 0.7)}), make.batch()
    assert all(torch.equal(model.bases(0)[0], model.bases(level)[0]) for level in (1, 2))
    out = model(batch)
    for m in make.features:
        total = sum(alpha[m].sum(dim=1) for alpha in out.alpha)
        tokens = sum(valid[m].sum(dim=1) for valid in out.valid)
        assert torch.allclose(total / tokens, torch.tensor(0.6), atol=1e-5)  # the mean of the levels' starts
        assert (out.participation[0][m] - 0.6).abs().max() > 1e-3  # spent where the evidence is


@torch.no_grad()
def test_the_order_in_which_levels_are_mixed_means_nothing(make):
    model, batch = make.model(hierarchy="mixed").eval(), make.batch()
    hierarchy = model.encoder(batch)
    valid = [{m: t.valid for m, t in tokens.items()} for tokens in hierarchy]
    tokens = [{m: t.values for m, t in tokens.items()} for tokens in hierarchy]
    forth = model.exchange(tokens, valid, batch.present)
    back = model.exchange(tokens[::-1], valid[::-1], batch.present)[::-1]
    for a, b in zip(forth, back, strict=True):
        assert all(torch.allclose(a.shared[m], b.shared[m], atol=1e-5) for m in make.features)


@torch.no_grad()
def test_without_hierarchy_only_the_deepest_level_is_read(make):
    deepest, full = make.model(hierarchy="deepest").eval(), make.model().eval()
    batch = make.batch()
    (tokens,) = deepest.encoder(batch)
    own = {n.replace("levels.0", "levels.2"): p for n, p in deepest.encoder.state_dict().items()}
    full.encoder.load_state_dict(own, strict=False)
    assert all(torch.allclose(tokens[m].values, full.encoder(batch)[-1][m].values) for m in make.features)


def admits_every_token(out):
    levels = zip(out.alpha, out.valid, strict=True)
    return all(torch.equal(alpha[m], valid[m].float()) for alpha, valid in levels for m in alpha)


def test_whole_features_are_exchanged_without_subspaces_or_budget(make):
    batch = make.batch()
    model = make.train(make.model(exchange="whole"), batch, steps=2)
    u_sh, u_pr = model.bases(1)
    assert torch.equal(u_sh, torch.eye(32)) and all(torch.equal(u, torch.eye(32)) for u in u_pr.values())
    out = model(batch)
    assert admits_every_token(out)
    assert not any(out.losses[name].any() for name in ("intra", "inter_private", "inter_shared_private"))
    assert out.losses["inter_mix"] > 0
    names = [name for name, _ in model.named_parameters()]
    assert not any("subspaces" in name or "budget" in name for name in names)
    with torch.no_grad():  # every direction of a token reaches the others
        for direction in torch.eye(32)[:4]:
            assert exchanged_after_moving(model.eval(), batch, "video", 1, direction)[1] > 1e-3


def test_dense_exchange_keeps_the_subspaces_and_admits_every_token(make):
    model, batch = make.model(exchange="dense"), make.batch()
    out = model(batch)
    assert admits_every_token(out)
    assert all(share[m].tolist() == [1.0] * 6 for share in out.participation for m in share)
    assert model.bases(0)[0].shape == (32, 16)


@torch.no_grad()
def test_no_exchange_leaves_every_token_as_it_was(make):
    model, batch = make.model(exchange="none").eval(), make.batch()
    for direction in (model.bases(1)[0][:, 0], model.bases(1)[1]["video"][:, 0]):
        assert max(exchanged_after_moving(model, batch, "video", 1, direction)) == 0


def test_mean_aggregation_has_uniform_weights_over_levels_and_present_modalities(make):
    batch = holey_batch(make)
    model = make.train(make.model(features=make.three, aggregation="mean"), batch, steps=2)
    out = model(batch)
    assert torch.allclose(out.omega, torch.tensor(1 / 3))
    present = torch.stack([batch.present[m] for m in make.three], dim=1).float()
    assert torch.equal(out.eta, present)
    assert torch.allclose(out.beta, present / present.sum(1, keepdim=True).clamp(min=1))
    assert not list(model.inter.parameters())


def test_even_levels_fix_omega_and_leave_beta_and_eta_learned(make):
    batch = make.batch()
    model = make.train(make.model(aggregation="even_levels"), batch, steps=10)
    out = model(batch)
    assert torch.allclose(out.omega, torch.tensor(1 / 3))
    assert out.beta.std(dim=0).max() > 1e-4 and out.eta.std(dim=0).max() > 1e-4


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_only_a_learned_budget_moves_and_both_keep_their_threshold_and_scale_learned(make, kind):
    model, batch = make.model(width=64, budget={"kind": kind}), make.batch()
    before = [(b.rho.item(), b.scale.item(), b.threshold.item()) for b in (intra.budget for intra in model.intra)]
    make.train(model, batch, steps=3)
    for (rho, scale, threshold), budget in zip(before, (intra.budget for intra in model.intra), strict=True):
        assert (budget.rho.item() != rho) == (kind == "learned") == budget.rho.requires_grad
        assert budget.scale.item() != scale and budget.threshold.item() != threshold


@pytest.mark.parametrize(
    ("term", "name"), [("pr", "inter_private"), ("sp", "inter_shared_private"), ("mix", "inter_mix")]
)
def test_each_inter_level_term_has_its_own_weight(make, term, name):
    batch = make.batch(12)
    once = make.model(stem={"shift": 0.0})
    twice = make.model(stem={"shift": 0.0}, loss={term: 2.0})
    twice.load_state_dict(once.state_dict())
    first, second = once(batch).losses, twice(batch).losses
    assert first[name] > 0
    assert all(torch.allclose(second[n], first[n] * (2 if n == name else 1)) for n in first)
