"""MulT: equal to a plain loop over the pairs, reads low-level features of what is present, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from clcr.baselines.mult import StackedTransformer
from clcr.batches import Features
from clcr.errors import ConfigError

WIDTH, HEADS, DEPTH = 32, 2, 2


def plain_layer(stacked, i):
    """Transformer i of a stacked layer, of torch's own parts."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    parts = {"in": (stacked.query, stacked.key, stacked.value), "out": (stacked.out,)}
    attention.in_proj_weight.copy_(torch.cat([p.weight[i].T for p in parts["in"]]))
    attention.in_proj_bias.copy_(torch.cat([p.bias[i] for p in parts["in"]]))
    attention.out_proj.weight.copy_(stacked.out.weight[i].T)
    attention.out_proj.bias.copy_(stacked.out.bias[i])
    norms, linears = [], []
    for norm in (stacked.attention_norm, stacked.ffn_norm):
        norms.append(nn.LayerNorm(WIDTH))
        norms[-1].load_state_dict({"weight": norm.gain[i], "bias": norm.bias[i]})
    for linear in (stacked.widen, stacked.narrow):
        linears.append(nn.Linear(*linear.weight.shape[1:]))
        linears[-1].load_state_dict({"weight": linear.weight[i].T, "bias": linear.bias[i]})

    def run(x, source, valid):
        query, source = norms[0](x), norms[0](source)
        x = x + attention(query, source, source, key_padding_mask=~valid)[0]
        return x + linears[1](linears[0](norms[1](x)).relu())

    return run


@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 7, 5), (5, 6, 7)], ids=str)
@pytest.mark.parametrize("crossmodal", [True, False])
@torch.no_grad()
def test_stacked_transformers_equal_a_plain_loop(lengths, crossmodal):
    transformer = StackedTransformer(3, DEPTH, WIDTH, HEADS, dropout=0.0).eval()
    for parameter in transformer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases do not start neutral
    tokens = [torch.randn(4, length, WIDTH) for length in lengths]
    sources = [torch.randn(4, length, WIDTH) for length in reversed(lengths)] if crossmodal else None
    valid = [torch.rand(4, length) > 0.3 for length in (reversed(lengths) if crossmodal else lengths)]
    for mask in valid:
        mask[:, 0] = True
    outputs = transformer(tokens, sources, valid)
    for i, x in enumerate(tokens):
        for layer in transformer.layers:
            x = plain_layer(layer, i)(x, x if sources is None else sources[i], valid[i])
        expected = nn.functional.layer_norm(x, [WIDTH], transformer.norm.gain[i], transformer.norm.bias[i])
        assert (outputs[i] - expected).abs().max() <= 1e-5


def changed(batch, modality):
    features = batch.features[modality]
    return replace(batch, features={**batch.features, modality: Features(features.values.flip(-1) + 1, features.valid)})


@torch.no_grad()
def test_every_layer_reads_the_sources_low_level_tokens(make):
    model, batch, reads = make.model("mult", depth=DEPTH).eval(), make.batch(), []
    for layer in model.crossmodal.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: reads.append(inputs[1]))
    model(batch)
    (low_level,) = model.encoder(batch)
    sources = [low_level["audio"].values] * DEPTH + [low_level["video"].values] * DEPTH  # one pair after the other
    assert all(torch.equal(read[0], source) for read, source in zip(reads, sources, strict=True))


@torch.no_grad()
def test_a_targets_stream_follows_its_source_and_not_where_that_is_missing(make):
    batch, model = make.batch(), make.model("mult").eval()
    streams = []
    model.crossmodal.register_forward_hook(lambda *call: streams.append(call[2][0]))  # of video, from audio
    for present in (True, False):
        here = replace(batch, present={**batch.present, "audio": torch.full((6,), present)})
        model(here), model(changed(here, "audio"))
    follows, ignores = ((streams[i] - streams[i + 1]).abs().amax((1, 2)) for i in (0, 2))
    assert (follows > 1e-3).all() and (ignores == 0).all() and streams[2].isfinite().all()
    for layer in model.crossmodal.layers:
        layer.value.bias.add_(1.0)
    model(here)  # audio is missing: not even a constant is read
    assert torch.equal(streams[-1], streams[2])


def test_a_language_modality_gives_its_last_layer(make):
    encoders = make.model("mult", features=make.three).encoder.encoders
    assert encoders[1].stem.entering == [2] and encoders[2].stem.picks == [2]  # sound enters stages


def test_depth_is_the_number_of_layers_and_other_models_ignore_it(make):
    model = make.model("mult", depth=3)
    assert len(model.crossmodal.layers) == len(model.memory.layers) == 3
    for name in ("clcr", "concat"):
        sizes = [sum(p.numel() for p in make.model(name, depth=depth).parameters()) for depth in (1, 3)]
        assert sizes[0] == sizes[1]


def test_gains_and_biases_do_not_decay(make):
    model = make.model("mult")
    decayed = {id(p) for p in model.parameter_groups(weight_decay=0.1)[0]["params"]}
    for name, parameter in model.crossmodal.named_parameters():
        assert (id(parameter) in decayed) == name.endswith("weight")


def test_what_mult_cannot_do_is_said(make):
    with pytest.raises(ConfigError, match="two or more"):
        make.model("mult", features={"audio": make.features["audio"]})
    with pytest.raises(ConfigError, match=r"--model.heads 3: must divide --model.width 32"):
        make.model("mult", heads=3, shared_width=12)


def test_a_budget_per_level_does_not_hinder_mult(make):
    make.model("mult", budget={"start": (0.3, 0.5, 0.9)})
