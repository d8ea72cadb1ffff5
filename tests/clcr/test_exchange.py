"""Co-exchange: only shared content travels, refused tokens neither ask nor answer, gradients stay finite."""

import torch

from clcr.exchange import CoExchange, attend


def random_tokens(dtype=torch.float32, k=8, alpha_min=0.2):
    shared = {"a": torch.randn(2, 3, k, dtype=dtype), "b": torch.randn(2, 4, k, dtype=dtype)}
    alpha = {m: alpha_min + (1 - alpha_min) * torch.rand(h.shape[:2], dtype=dtype) for m, h in shared.items()}
    valid = {m: torch.ones(h.shape[:2], dtype=torch.bool) for m, h in shared.items()}
    return shared, alpha, valid


def test_attention_with_weights_equals_the_formula():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)
    weight = torch.rand(2, 6)
    weight[:, 2] = 0
    scores = (q @ k.mT / 2).exp() * weight[:, None, None]
    expected = scores / scores.sum(-1, keepdim=True) @ v
    assert torch.allclose(attend(q, k, v, weight), expected, atol=1e-6)


def test_gradcheck_of_the_exchange():
    exchange = CoExchange(4, heads=2, dropout=0.0).double()
    shared, alpha, valid = random_tokens(torch.float64, k=4)
    inputs = [x.requires_grad_() for x in (*shared.values(), *alpha.values())]

    def run(a, b, alpha_a, alpha_b):
        return tuple(exchange({"a": a, "b": b}, {"a": alpha_a, "b": alpha_b}, valid).values())

    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_are_finite_where_alpha_is_zero():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    alpha["a"][:, 0] = 0
    alpha["b"][0] = 0  # one sample refuses every token of b
    inputs = [x.requires_grad_() for x in (*shared.values(), *alpha.values())]
    sum(h.square().sum() for h in exchange(shared, alpha, valid).values()).backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert all(p.grad.isfinite().all() for p in exchange.parameters())


def test_an_empty_pool_exchanges_nothing():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    alpha["b"][0] = 0
    valid["b"][1] = False
    assert torch.equal(exchange(shared, alpha, valid)["a"], shared["a"])


def test_a_refused_token_neither_asks_nor_answers():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    alpha["b"][:, 1] = 0
    before = exchange(shared, alpha, valid)
    assert torch.equal(before["b"][:, 1], shared["b"][:, 1])
    moved = {**shared, "b": shared["b"].clone()}
    moved["b"][:, 1] += 5.0
    assert torch.equal(exchange(moved, alpha, valid)["a"], before["a"])


def test_a_token_hears_other_modalities_only():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    before = exchange(shared, alpha, valid)
    moved = {**shared, "a": shared["a"].clone()}
    moved["a"][:, 1] += 5.0
    after = exchange(moved, alpha, valid)
    assert torch.allclose(after["a"][:, 0], before["a"][:, 0])
    assert not torch.allclose(after["b"], before["b"])
