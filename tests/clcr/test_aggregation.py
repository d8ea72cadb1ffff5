"""Aggregation: uniform level weights at the start, missing modalities out of every weight."""

import torch

from clcr.aggregation import CoAggregation, LevelWeights, TimePooling, masked_softmax


def test_a_softmax_over_nothing_is_zero_and_has_a_finite_gradient():
    scores = torch.randn(2, 3, requires_grad=True)
    weights = masked_softmax(scores, torch.tensor([[True, False, True], [False, False, False]]))
    weights.square().sum().backward()
    assert torch.allclose(weights.sum(-1), torch.tensor([1.0, 0.0])) and weights[0, 1] == 0
    assert scores.grad.isfinite().all()


def test_level_weights_start_uniform_and_learn_to_differ_between_samples():
    weights = LevelWeights(3, 8)
    shared, present = torch.randn(5, 2, 3, 2, 8), torch.ones(5, 2, 2, dtype=torch.bool)
    assert torch.allclose(weights(shared, present), torch.tensor(1 / 3))
    optimizer = torch.optim.AdamW(weights.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (weights(shared, present)[..., 0] * torch.linspace(-1, 1, 5)[:, None]).sum().backward()
        optimizer.step()
    assert weights(shared, present)[..., 0].std() > 0.01


def test_a_missing_modality_is_out_of_beta_eta_and_the_context():
    aggregation = CoAggregation(8, LevelWeights(2, 8))
    shared, private = torch.randn(2, 3, 1, 2, 2, 8)
    present = torch.tensor([[[True, False]], [[True, True]], [[False, False]]])
    mask = present[:, :, None, :, None]
    out = aggregation(shared * mask, private * mask, present)
    assert out.beta[0, 0].tolist() == [1.0, 0.0] and out.eta[0, 0, 1] == 0
    assert torch.allclose(out.beta[1].sum(), torch.tensor(1.0))
    assert not out.shared[2].any() and not out.private[2].any() and out.private.isfinite().all()


def test_attention_pooling_starts_as_the_mean_and_finds_the_token_that_matters():
    pooling, basis = TimePooling(1, 8, "attention"), torch.eye(8)
    tokens, valid = torch.randn(16, 10, 8), torch.ones(16, 10, dtype=torch.bool)
    valid[:, 8:] = False
    tokens[:, 3, 0] = 4.0
    shares, task = valid[:, None].float(), torch.tensor([0])
    assert torch.allclose(pooling(shares, task, (tokens, basis))[..., :8], torch.tensor(1 / 8))
    assert not pooling(shares, task, (tokens, basis))[..., 8:].any()
    optimizer = torch.optim.AdamW(pooling.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (-pooling(shares, task, (tokens, basis))[..., 3].mean()).backward()
        optimizer.step()
    assert pooling(shares, task, (tokens, basis))[..., 3].mean() > 0.9


def test_mean_pooling_is_the_mean_over_the_time_of_a_window_and_has_no_parameters():
    pooling = TimePooling(2, 8, "mean")
    shares = torch.tensor([[[1.0, 1.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]])
    weights = pooling(shares, torch.tensor([0, 1, 1]), (torch.randn(1, 3, 8), torch.eye(8)))
    assert weights.tolist() == [[[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]]
    assert not list(pooling.parameters())


def test_attention_weighs_a_token_by_its_share_of_the_window_too():
    pooling, shares = TimePooling(1, 8, "attention"), torch.tensor([[[0.25, 0.75, 0.0]]])
    weights = pooling(shares, torch.tensor([0]), (torch.randn(1, 3, 8), torch.eye(8)))  # zero queries: the mean
    assert torch.allclose(weights, shares)


@torch.no_grad()
def test_every_window_is_asked_by_the_query_of_its_own_task():
    pooling, tokens = TimePooling(2, 8, "attention"), torch.eye(8)[None, :3]
    pooling.queries.copy_(torch.eye(8)[[0, 2]] * 20)
    weights = pooling(torch.ones(1, 3, 3), torch.tensor([0, 1, 1]), (tokens, torch.eye(8)))
    assert weights.argmax(dim=-1).tolist() == [[0, 2, 2]]


def test_pooled_statistics_tell_what_varies_within_a_window_from_what_does_not():
    pooling = TimePooling(1, 8, "statistics")
    still, task = torch.randn(2, 1, 8).expand(-1, 10, -1), torch.tensor([0])
    moving = still + torch.tensor([1.0, -1.0]).repeat(5)[:, None]  # the same mean
    shares = torch.ones(2, 1, 10)
    shares[1] = 0
    quiet, loud = pooling.summary(still, shares, task), pooling.summary(moving, shares, task)
    assert torch.allclose(quiet[0], still[0, :1], atol=0.01) and (loud - quiet)[0].norm() > 0.5
    assert not loud[1].any()  # no token in the window
    loud.sum().backward()
    assert all(p.grad.isfinite().all() for p in pooling.parameters())
