"""Co-exchange: only shared content travels, refused tokens neither ask nor answer, gradients stay finite."""

import math

import pytest
import torch

from clcr.exchange import CoExchange, Nearness, attend, places

EDGES = {"a": torch.arange(4) * 0.4, "b": torch.arange(5) * 0.3}
SPANS = {m: torch.stack([edges[:-1], edges[1:]], dim=1) for m, edges in EDGES.items()}


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
    near = torch.randn(3, 5, 2), torch.randn(3, 6, 2)
    scores = scores * (near[0] @ near[1].mT).exp()
    expected = scores / scores.sum(-1, keepdim=True) @ v
    assert torch.allclose(attend(q, k, v, weight, near), expected, atol=1e-6)


def test_the_answer_of_nothing_is_weighed_against_all_that_a_head_could_hear():
    """By the formula in the module's docstring, for any pool length and with some tokens padded."""
    exchange = CoExchange(8, heads=2, dropout=0.0)
    exchange.null.data = torch.tensor([-1.0, 0.5])
    shared, alpha, valid = random_tokens()
    valid["b"][0, 2:] = False
    heard = exchange(shared, alpha, valid, SPANS)["a"] - shared["a"]
    q, k, v = (
        exchange._split(f(shared[m])) for f, m in ((exchange.query, "a"), (exchange.key, "b"), (exchange.value, "b"))
    )
    near = exchange.nearness(SPANS["a"]) @ exchange.nearness(SPANS["b"]).mT
    weights = (q @ k.mT / 2 + near).exp() * (alpha["b"] * valid["b"])[:, None, None]
    null = exchange.null.exp()[:, None] * (near.exp() * valid["b"][:, None, None]).sum(-1)
    answer = (weights / (weights.sum(-1) + null)[..., None]) @ v
    expected = alpha["a"][..., None] * exchange.out(answer.transpose(1, 2).flatten(2))
    assert torch.allclose(heard, expected, atol=1e-5)


def test_nearness_is_a_sum_of_cosines_of_the_distance_in_time():
    nearness = Nearness(heads=3)
    nearness.gain.data.uniform_(0.5, 1.5)
    a, b = nearness(SPANS["a"]), nearness(SPANS["b"])
    distance = SPANS["a"].mean(1)[:, None] - SPANS["b"].mean(1)
    expected = (nearness.gain.square()[:, None, None] * (distance[..., None] * nearness.frequencies).cos()).sum(-1)
    assert torch.allclose(a @ b.mT, expected, atol=1e-5)


UNTIMED = torch.tensor([-math.inf, math.inf])


def test_tokens_without_a_time_are_as_near_as_any_and_have_finite_gradients():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    out = exchange(shared, alpha, valid, {"a": SPANS["a"], "b": UNTIMED.expand(4, 2)})
    without = exchange(shared, alpha, valid)
    assert all(torch.allclose(out[m], without[m], atol=1e-5) for m in out)
    sum(h.square().sum() for h in out.values()).backward()
    assert exchange.nearness.gain.grad.isfinite().all()


def beside_a_timed_one(gain, seconds=4):
    """A picture of 5 tokens, sound of so many seconds at 10 Hz, and 20 words, all alike, of indifferent content."""
    exchange = CoExchange(8, heads=2, dropout=0.0, mixed=True)
    exchange.nearness.gain.data.fill_(gain)
    exchange.query.weight.data.zero_()
    tokens = {"picture": 5, "sound": 10 * seconds, "words": 20}
    begin = torch.arange(10.0 * seconds)[:, None] / 10
    sound = torch.cat([begin, begin + 0.1], dim=1)
    spans = {"picture": sound[:5], "sound": sound, "words": UNTIMED.expand(20, 2)}
    values = {m: torch.ones(2, n, 8) for m, n in tokens.items()}
    valid = {m: torch.ones(2, n, dtype=torch.bool) for m, n in tokens.items()}
    return exchange, values, {m: x.float() for m, x in valid.items()}, valid, spans


@pytest.mark.parametrize("gain", [0.0, 1.0, 2.0, 5.0])
@torch.no_grad()
def test_words_beside_sound_are_heard_by_their_number_however_near_in_time_a_head_listens(gain):
    exchange, values, alpha, valid, spans = beside_a_timed_one(gain)
    whole = (exchange(values, alpha, valid, spans)["picture"] - 1)[..., 0]
    assert torch.allclose(whole, torch.tensor(1 / (1 + math.exp(-1))), atol=1e-4)  # of all that it could hear
    marked = {**values, "words": 2 * values["words"]}
    words = (exchange(marked, alpha, valid, spans)["picture"] - 1)[..., 0] - whole
    assert torch.allclose(words / whole, torch.tensor(20 / 60), atol=1e-4)
    if gain >= 1:  # before version 5
        exchange.mixed = False
        words = exchange(marked, alpha, valid, spans)["picture"] - exchange(values, alpha, valid, spans)["picture"]
        assert (words[..., 0] / whole).max() < 0.04
        exchange.mixed = True
    valid["sound"][1] = False  # a clip without sound: the words are all that there is
    assert torch.allclose((exchange(values, alpha, valid, spans)["picture"] - 1)[1], whole[1, :, None], atol=1e-4)


@torch.no_grad()
def test_sound_beside_words_is_heard_at_its_own_instant_all_the_same():
    exchange, values, alpha, valid, spans = beside_a_timed_one(2.0)
    values["sound"] = torch.zeros(2, 40, 8)
    values["sound"][:, 2] = 1.0
    heard = (exchange(values, alpha, valid, spans)["picture"] - 1)[0, :, 0]
    values["sound"][:, 2] = 0.0
    heard = heard - (exchange(values, alpha, valid, spans)["picture"] - 1)[0, :, 0]
    assert heard.argmax() == 2 and heard[2] > 3 * heard[0]


def test_gradients_are_finite_where_times_are_mixed_and_missing():
    exchange, values, alpha, valid, spans = beside_a_timed_one(1.0)
    valid["sound"][0] = False
    valid["words"][1] = False
    out = exchange({m: x.requires_grad_() for m, x in values.items()}, alpha, valid, spans)
    sum(h.square().sum() for h in out.values()).backward()
    assert all(x.grad.isfinite().all() for x in (*values.values(), *exchange.parameters()))


def lengths(*counts):
    return {m: (torch.arange(9) < n)[None] for m, n in zip("abc", counts, strict=True)}


def test_a_place_counts_among_the_modalities_that_a_clip_has():
    spans = {m: UNTIMED.expand(9, 2) for m in "abc"}
    for counts, placed in (((9, 9, 9), True), ((9, 9, 0), True), ((9, 8, 0), False), ((1, 1, 0), False)):
        found = places(spans, lengths(*counts), ["a", "b", "c"])["a"]
        assert found.isfinite().all() == placed, counts
    assert not places(spans, lengths(9, 9, 0), ["a", "b", "c"], missing=False)["a"].isfinite().any()  # before version 5


def test_from_the_start_a_token_hears_what_sounds_at_its_own_instant():
    """16 instants a tenth of a second apart, each with a content of its own in b: a, which is silent, takes that up."""
    exchange = CoExchange(16, heads=1, dropout=0.0, null_logit=None)
    spans = torch.stack([torch.arange(16) * 0.1, torch.arange(1, 17) * 0.1], dim=1)
    shared = {"a": torch.zeros(1, 16, 16), "b": torch.eye(16)[None]}
    alpha = {m: torch.ones(1, 16) for m in shared}
    valid = {m: torch.ones(1, 16, dtype=torch.bool) for m in shared}
    heard = exchange(shared, alpha, valid, {"a": spans, "b": spans})["a"][0]
    assert torch.equal(heard.argmax(dim=1), torch.arange(16)) and heard.diagonal().min() > 0.9


def test_gradcheck_of_the_exchange():
    exchange = CoExchange(4, heads=2, dropout=0.0).double()
    shared, alpha, valid = random_tokens(torch.float64, k=4)
    exchange.nearness.gain.data.uniform_(0.2, 0.5)
    gain = exchange.nearness.gain
    inputs = [x.requires_grad_() for x in (*shared.values(), *alpha.values())]

    def run(a, b, alpha_a, alpha_b, gain):
        return tuple(exchange({"a": a, "b": b}, {"a": alpha_a, "b": alpha_b}, valid, SPANS).values())

    assert torch.autograd.gradcheck(run, [*inputs, gain])


def test_gradients_are_finite_where_alpha_is_zero():
    exchange = CoExchange(8, heads=2, dropout=0.0)
    shared, alpha, valid = random_tokens()
    alpha["a"][:, 0] = 0
    alpha["b"][0] = 0  # one sample refuses every token of b
    inputs = [x.requires_grad_() for x in (*shared.values(), *alpha.values())]
    sum(h.square().sum() for h in exchange(shared, alpha, valid, SPANS).values()).backward()
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


def test_reach_is_how_much_a_head_hears_and_from_how_far_in_time():
    starts = torch.arange(10.0)
    spans = dict.fromkeys("ab", torch.stack([starts, starts + 1], dim=1))
    shared, valid = {m: torch.randn(2, 10, 8) for m in "ab"}, dict.fromkeys("ab", torch.ones(2, 10, dtype=torch.bool))
    full = {m: mask.float() for m, mask in valid.items()}
    close, blind = (CoExchange(8, 2, 0.0, nearest=gain, farthest=gain) for gain in (3.0, 0.0))
    share, far = close.reach(shared, full, valid, spans)["a"]
    assert share.shape == far.shape == (2, 2, 10) and 0.5 < share.mean() < 0.95
    assert far.mean() < 0.5 < 2 < blind.reach(shared, full, valid, spans)["a"][1].mean()
    quiet, _ = close.reach(shared, {**full, "b": full["b"] * 0.01}, valid, spans)["a"]
    assert quiet.mean() < 0.1
    ten = {**shared, "b": shared["b"] * 0 + shared["b"][:, :1]}  # what is heard is the same wherever it comes from
    assert torch.allclose(blind.reach(ten, full, valid, spans)["a"][1][0, 0, 0], (starts**2).mean().sqrt(), rtol=1e-3)
