"""The hierarchy: K levels, coarser with depth, blind to padding, aware of time in seconds."""

import pytest
import torch

from clcr.batches import Features, FeatureSpec
from clcr.config import ModelConfig, StemConfig
from clcr.hierarchy import LayersHierarchy, Position, StagedHierarchy, TemporalHierarchy, hierarchy_of, masked_mean


def encoder(rate=50.0, levels=3, stride=2, max_rate=25.0, min_rate=0.0, motion=None):
    model = ModelConfig(
        width=16, levels=levels, heads=2, stride=stride, max_rate=max_rate, min_rate=min_rate, dropout=0.0
    )
    spec = FeatureSpec((5,), rate, "float32")
    return TemporalHierarchy(spec, model, StemConfig(motion=motion), range(levels)).eval()


@pytest.mark.parametrize(("rate", "tokens"), [(12.5, 25), (25.0, 50), (30.0, 30), (50.0, 50), (100.0, 50)])
def test_the_shallow_level_has_at_most_25_tokens_per_second(rate, tokens):
    values = torch.randn(1, int(2 * rate), 5)
    levels = encoder(rate)(Features(values, torch.ones(values.shape[:2], dtype=torch.bool)))
    assert levels[0].values.shape[1] == tokens <= 50


@pytest.mark.parametrize(
    ("rate", "min_rate", "tokens"), [(25.0, 0.0, [50, 25, 13]), (25.0, 12.0, [50, 25, 25]), (12.5, 12.0, [25, 25, 25])]
)
def test_later_levels_get_coarser_down_to_the_lowest_rate(rate, min_rate, tokens):
    values = torch.randn(1, int(2 * rate), 5)
    levels = encoder(rate, min_rate=min_rate)(Features(values, torch.ones(values.shape[:2], dtype=torch.bool)))
    assert [t.values.shape[1] for t in levels] == tokens


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_a_clip_has_the_same_tokens_alone_and_padded(length):
    net = encoder()
    clip = torch.randn(1, length, 5)
    alone = net(Features(clip, torch.ones(1, length, dtype=torch.bool)))
    padded = torch.cat([clip, torch.randn(1, 33, 5)], dim=1)
    valid = torch.arange(length + 33)[None] < length
    for short, long in zip(alone, net(Features(padded, valid)), strict=True):
        n = short.values.shape[1]
        assert long.valid.sum() == n == short.valid.sum()
        assert torch.allclose(long.values[:, :n], short.values, atol=1e-5)
        assert not long.values[:, n:].any()


def test_stages_start_by_letting_through_what_came():
    """Else the deep level learns so slowly that only the shallow one is ever used."""
    encoder = TemporalHierarchy(FeatureSpec((4,), 25.0, "float32"), ModelConfig(width=8), StemConfig(), read=[2])
    x = torch.randn(2, 10, 8)
    assert all(torch.equal(stage.enter(x), x) for stage in encoder.stages)


def test_the_receptive_field_grows_stage_by_stage():
    net = encoder(rate=25.0, stride=1, motion=False)  # a clip's mean is made of all of it
    values = torch.randn(1, 80, 5, requires_grad=True)
    levels = net(Features(values, torch.ones(1, 80, dtype=torch.bool)))
    seen = []
    for level in levels:
        (gradient,) = torch.autograd.grad((level.values[0, 40] * torch.randn(16)).sum(), values, retain_graph=True)
        seen.append(int((gradient.abs().sum(-1) > 0).sum()))
    assert seen[0] < seen[1] < seen[2]


def language(layers, levels, read=None):
    spec = FeatureSpec((layers, 5), 0.0, "float16")
    read = range(levels) if read is None else read
    return LayersHierarchy(spec, ModelConfig(width=16, heads=2, levels=levels), StemConfig(), read).eval()


@pytest.mark.parametrize(
    ("layers", "levels", "read", "expected"),
    [(3, 3, None, [0, 1, 2]), (3, 3, [2], [2]), (3, 1, None, [2]), (7, 3, None, [0, 3, 6]), (1, 3, None, [0, 0, 0])],
)
def test_a_level_of_language_is_one_layer_of_its_encoder_and_the_deepest_the_last(layers, levels, read, expected):
    values = torch.randn(1, 6, layers, 5, requires_grad=True)
    tokens = language(layers, levels, read)(Features(values, torch.ones(1, 6, dtype=torch.bool)))
    for level, layer in zip(tokens, expected, strict=True):
        (gradient,) = torch.autograd.grad((level.values * torch.randn(16)).sum(), values, retain_graph=True)
        assert gradient.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [layer]
        assert level.spans.isinf().all(), "words have no time"


def test_a_text_has_the_same_tokens_alone_and_padded():
    net, text = language(3, 3), torch.randn(1, 4, 3, 5).half()
    alone = net(Features(text, torch.ones(1, 4, dtype=torch.bool)))
    padded = torch.cat([text, torch.randn(1, 9, 3, 5).half()], dim=1)
    for short, long in zip(alone, net(Features(padded, torch.arange(13)[None] < 4)), strict=True):
        assert torch.allclose(long.values[:, :4], short.values, atol=1e-6) and not long.values[:, 4:].any()


def test_a_position_is_the_time_in_seconds():
    position = Position(16)
    assert torch.allclose(position(8, 0.1)[3], position(50, 0.1)[3])
    fine, coarse = position(10, 0.02), position(2, 0.1)
    assert torch.allclose(fine[2], coarse[0], atol=1e-6)  # both are centred on 0.05 s


def test_the_masked_mean_of_nothing_is_zero():
    values = torch.randn(2, 3, 4)
    valid = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    mean = masked_mean(values, valid)
    assert torch.allclose(mean[0], values[0, :2].mean(0)) and not mean[1].any()


def test_layers_of_sound_are_levels_with_their_own_time():
    """Hidden layers at 50 tokens a second: level l is layer l, and token k lasts from k / 50 to (k + 1) / 50 s."""
    spec = FeatureSpec((3, 5), 50.0, "float16")
    net = LayersHierarchy(spec, ModelConfig(width=16, heads=2, levels=3), StemConfig(), range(3)).eval()
    levels = net(Features(torch.randn(1, 10, 3, 5).half(), torch.ones(1, 10, dtype=torch.bool)))
    for tokens in levels:
        assert tokens.spans[7].tolist() == pytest.approx([7 / 50, 8 / 50])
    assert len(levels) == 3 and not torch.allclose(levels[0].values, levels[2].values)


def layered(mode, layers=3, rate=25.0, **model):
    options = {"width": 16, "heads": 2, "levels": 3, "min_rate": 0.0, "dropout": 0.0, **model}
    spec, stem = FeatureSpec((layers, 5), rate, "float16"), StemConfig(layers=mode, motion=False)
    return hierarchy_of(spec, stem)(spec, ModelConfig(**options), stem, range(3)).eval()


def test_layers_of_what_has_a_time_enter_stages_and_those_of_text_are_levels():
    for layers, of_text, of_sound in (
        (None, LayersHierarchy, StagedHierarchy),
        ("levels", LayersHierarchy, LayersHierarchy),
        ("stages", StagedHierarchy, StagedHierarchy),
    ):
        stem = StemConfig(layers=layers)
        assert hierarchy_of(FeatureSpec((3, 5), 0.0, "float16"), stem) is of_text
        assert hierarchy_of(FeatureSpec((3, 5), 25.0, "float16"), stem) is of_sound
        assert hierarchy_of(FeatureSpec((5,), 25.0, "float16"), stem) is TemporalHierarchy


@pytest.mark.parametrize(("mode", "seen"), [("levels", [[0], [1], [2]]), ("stages", [[0], [0, 1], [0, 1, 2]])])
def test_which_layers_a_level_is_made_of(mode, seen):
    values = torch.randn(1, 12, 3, 5, requires_grad=True)
    for tokens, expected in zip(layered(mode)(Features(values, torch.ones(1, 12).bool())), seen, strict=True):
        (gradient,) = torch.autograd.grad((tokens.values * torch.randn(16)).sum(), values, retain_graph=True)
        assert gradient.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("mode", ["levels", "stages"])
@pytest.mark.parametrize(("length", "layers"), [(1, 3), (7, 1), (10, 4)])
def test_layers_of_a_clip_make_the_same_tokens_alone_and_padded(mode, length, layers):
    net, clip = layered(mode, layers), torch.randn(1, length, layers, 5).half()
    alone = net(Features(clip, torch.ones(1, length).bool()))
    padded = torch.cat([clip, torch.randn(1, 9, layers, 5).half()], dim=1)
    for short, long in zip(alone, net(Features(padded, torch.arange(length + 9)[None] < length)), strict=True):
        n = short.values.shape[1]
        assert torch.allclose(long.values[:, :n], short.values, atol=1e-5) and not long.values[:, n:].any()
        assert long.spans[:n].tolist() == short.spans.tolist()


def test_a_layer_enters_its_stage_at_the_time_that_it_is_of():
    """The deepest level halves the tokens twice: token k of it is made of the last layer's tokens 4 k to 4 k + 3."""
    net, values = layered("stages", blocks=1), torch.randn(1, 16, 3, 5, requires_grad=True)
    (deepest,) = net(Features(values, torch.ones(1, 16).bool()))[2:]
    (gradient,) = torch.autograd.grad(deepest.values[0, 1].square().sum(), values)
    of_last = gradient[0, :, 2].abs().sum(-1)
    assert of_last[4:8].mean() > 2 * of_last[8:].mean() and of_last[4:8].mean() > 2 * of_last[:4].mean()
