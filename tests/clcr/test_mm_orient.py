"""MM-ORIENT: modalities meet only as neighbourhoods, and a prediction depends on the bank and not on the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import clcr
from clcr.baselines.hima import ClipAttention, TokenAttention
from clcr.baselines.relation import NeighbourMean
from clcr.batches import Features, collate
from clcr.errors import ConfigError
from clcr.training import OptimConfig, Trainer

VIDEO, AUDIO = 0, 1
VECTOR = clcr.FeatureSpec((5,), 0.0, "float32")


def fitted(make, batch, bank=None, **options):
    """A model whose graphs link half of all pairs, so that there is something to relate."""
    model = make.model("mm_orient", mm_orient={"linked": 0.5, **options})
    model.fit_statistics([batch])
    if bank is not None:
        make.train(model, batch, steps=5)
        model.prepare_evaluation(lambda clips: [bank])
    return model


def parts(model, batch):
    """What the forward pass made of a batch: relations (B, M, M, d), and HIMA's vectors (B, M, d)."""
    seen = {"attended": []}
    hooks = [model.relations.register_forward_hook(lambda module, given, result: seen.update(relations=result))]
    for attention in model.clip_attention:
        hooks.append(attention.register_forward_hook(lambda module, given, result: seen["attended"].append(result)))
    model(batch)
    for hook in hooks:
        hook.remove()
    return seen["relations"], torch.stack(seen["attended"], dim=1)


def with_audio(batch, values):
    return replace(batch, features={**batch.features, "audio": Features(values, batch.features["audio"].valid)})


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_noise_in_one_modality_never_enters_what_another_says_of_itself(make, training):
    batch = make.batch(8)
    model = fitted(make, batch, bank=make.batch(20, seed=3)).train(training)
    model.encoder.encoders[VIDEO].stem.shift = 0.0
    noisy = with_audio(batch, batch.features["audio"].values + 3 * torch.randn(batch.features["audio"].values.shape))
    (relations, attended), (relations2, attended2) = parts(model, batch), parts(model, noisy)
    assert torch.equal(relations[:, VIDEO, VIDEO], relations2[:, VIDEO, VIDEO])
    assert torch.equal(attended[:, VIDEO], attended2[:, VIDEO])
    for m, n in ((AUDIO, AUDIO), (AUDIO, VIDEO), (VIDEO, AUDIO)):
        assert (relations[:, m, n] - relations2[:, m, n]).abs().max() > 1e-4
    assert (attended[:, AUDIO] - attended2[:, AUDIO]).abs().max() > 1e-4


@torch.no_grad()
def test_another_modality_is_felt_only_as_whose_neighbours_a_clip_has(make):
    batch = make.batch(8)
    model = fitted(make, batch, bank=make.batch(20, seed=3)).eval()
    relations, _ = parts(model, batch)
    sound = batch.features["audio"]
    backwards = torch.stack([
        torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(sound.values, sound.valid.sum(1), strict=True)
    ])  # fmt: skip
    same_graph, _ = parts(model, with_audio(batch, backwards))  # a clip's mean, hence the graph, is what it was
    assert torch.equal(relations[:, VIDEO, AUDIO], same_graph[:, VIDEO, AUDIO])
    assert (relations[:, AUDIO, AUDIO] - same_graph[:, AUDIO, AUDIO]).abs().max() > 1e-4
    other_graph, _ = parts(model, with_audio(batch, -sound.values))
    assert (relations[:, VIDEO, AUDIO] - other_graph[:, VIDEO, AUDIO]).abs().max() > 1e-4


@torch.no_grad()
def test_relations_equal_a_plain_loop_over_neighbours():
    layer, links = NeighbourMean(4), torch.tensor([[True, False, True], [False, False, False]])
    x, others = torch.randn(2, 4), torch.randn(3, 4)
    first = layer.own(x[0]) + layer.around((x[0] + others[0] + others[2]) / 3)
    second = layer.own(x[1]) + layer.around(x[1])
    assert torch.allclose(layer(x, others, links), torch.stack([first, second]).relu(), atol=1e-6)


@torch.no_grad()
def test_attention_weighs_tokens_in_a_clip_and_then_clips_against_each_other():
    tokens, valid = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, False, False]])
    inside, across, others = TokenAttention(8), ClipAttention(8), torch.randn(3, 8)
    compared = torch.tensor([[True, True, True], [False, True, False]])
    mean = inside(tokens, valid)
    assert torch.allclose(mean[1], tokens[1, :2].mean(0), atol=1e-6)  # scores start even
    assert torch.allclose(across(mean, others, compared), mean, atol=1e-6)
    for score in (inside.score, across.score):
        score[2].weight.normal_()
    pooled, weights = inside(tokens, valid), inside.score(tokens[1, :2]).softmax(0)
    assert torch.allclose(pooled[1], weights @ tokens[1, :2], atol=1e-6)
    share = torch.stack([across.score(pooled[1:])[0], across.score(others)[1]]).softmax(0)[0]
    assert torch.allclose(across(pooled, others, compared)[1], 2 * share * pooled[1], atol=1e-5)


def links_of(model, batch, modality):
    clips = model._clips(batch)
    return model.embeddings[modality].links(clips.embeddings[modality], clips.embeddings[modality])


@pytest.mark.parametrize("share", [0.05, 0.3])
@torch.no_grad()
def test_a_graph_links_the_chosen_share_of_training_pairs(make, share):
    batch = make.batch(40)
    model = fitted(make, batch, linked=share).eval()
    for modality in (VIDEO, AUDIO):
        links = links_of(model, batch, modality)
        assert links.diagonal().all() and torch.equal(links, links.T)
        assert (links.sum() - 40) / (40 * 39) == pytest.approx(share, abs=0.01)


@torch.no_grad()
def test_the_papers_threshold_is_on_the_cosine_of_vectors_as_they_are_stored(make):
    samples = make.samples(12)
    for i, sample in enumerate(samples):
        sample["features"]["audio"] = (sample["features"]["audio"] * 0.5 + i % 3).astype(np.float16)
    batch = collate(samples, make.features, make.tasks)
    model = fitted(make, batch, threshold=0.9).eval()
    means = torch.stack([torch.from_numpy(s["features"]["audio"].astype(np.float32)).mean(0) for s in samples])
    assert torch.equal(links_of(model, batch, AUDIO), torch.cosine_similarity(means, means[:, None], dim=-1) > 0.9)
    assert links_of(model, batch, VIDEO).all()  # of random frames all are alike, which is what the quantile is for


def test_no_gradient_passes_through_the_graph_and_all_others_are_finite(make):
    model, batch = fitted(make, make.batch(8)), make.batch(8)
    clips = model._clips(batch)
    assert not any(e.requires_grad for e in clips.embeddings) and clips.nodes.requires_grad
    make.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_a_clip_without_anything_changes_no_other_clip_even_in_training(make):
    samples = make.samples(6)
    model = fitted(make, collate(samples, make.features, make.tasks)).train()
    model.encoder.encoders[VIDEO].stem.shift = 0.0
    empty = [{"clip_id": "", "features": {}, "targets": {}}] * 2
    first, second = (model(collate(s, make.features, make.tasks)) for s in (samples, [*samples, *empty]))
    for task in make.tasks:
        assert torch.allclose(first.logits[task], second.logits[task][:6], atol=1e-5)


@torch.no_grad()
def test_with_a_bank_the_batch_has_no_say_and_without_it_has(make):
    samples, bank = make.samples(8), make.batch(20, seed=3)
    batch, alone = (collate(s, make.features, make.tasks) for s in (samples, samples[:1]))
    for reference, largest in (("bank", 1e-5), ("batch", float("inf"))):
        model = fitted(make, batch, bank=bank, reference=reference).eval()
        moved = (model(batch).logits["word"][:1] - model(alone).logits["word"]).abs().max()
        assert moved <= largest and (moved > 1e-3) == (reference == "batch")
    model = fitted(make, batch, bank=bank).eval()
    before = model(alone).logits["word"]
    model.prepare_evaluation(lambda clips: [make.batch(20, seed=4)])
    assert (model(alone).logits["word"] - before).abs().max() > 1e-4


@torch.no_grad()
def test_a_bank_holds_the_sample_it_asked_for_and_fewer_where_there_are_fewer(make):
    model, asked = make.model("mm_orient", mm_orient={"bank": 6}), []

    def sample(clips):
        asked.append(clips)
        return [make.batch(4), make.batch(2, seed=1)] if len(asked) == 1 else [make.batch(3)]

    model.train().prepare_evaluation(sample)
    assert model.training and model.bank.present.all()
    model.prepare_evaluation(sample)
    assert asked == [6, 6] and model.bank.present.sum(0).tolist() == [3, 3]
    assert model.bank_nodes[:3].abs().sum() > 0


def test_side_features_reach_the_heads_alone_and_an_embedding_the_graph(make):
    features, rng = {**make.features, "look": VECTOR, "emotion": VECTOR}, np.random.default_rng(0)
    samples = make.samples(10)
    for sample in samples:
        for name in ("look", "emotion"):
            sample["features"][name] = rng.normal(size=(1, 5)).astype(np.float32)
    del samples[0]["features"]["emotion"]
    batch = collate(samples, features, make.tasks)
    options = {"embeddings": ("video=look",), "side": ("emotion",), "linked": 0.3}
    model = clcr.build("mm_orient", make.config(mm_orient=options), features, make.tasks)
    model.fit_statistics([batch])
    make.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert list(model.encoder.modalities) == ["video", "audio"] and list(model.features) == list(features)
    model.eval().prepare_evaluation(lambda clips: [batch])

    def changed(name):
        other = Features(batch.features[name].values.flip(0), batch.features[name].valid)
        return replace(batch, features={**batch.features, name: other})

    with torch.no_grad():
        before, logits = parts(model, batch), model(batch).logits["word"]
        after = parts(model, changed("emotion"))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert (model(changed("emotion")).logits["word"] - logits).abs().max() > 1e-4
        after, _ = parts(model, changed("look"))
        assert torch.equal(before[0][:, AUDIO, AUDIO], after[:, AUDIO, AUDIO])
        assert (before[0][:, VIDEO, VIDEO] - after[:, VIDEO, VIDEO]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"side": ("mood",)}, r"--mm-orient.side: no modality mood; there are video, audio"),
        ({"embeddings": ("video=look",)}, r"--mm-orient.embeddings: no modality look"),
        ({"side": ("video",)}, r"video is no vector but of shape \(16, 16, 3\)"),
        ({"side": ("audio",)}, "two or more"),
    ],
)
def test_what_a_store_does_not_hold_is_said(make, options, said):
    with pytest.raises(ConfigError, match=said):
        make.model("mm_orient", mm_orient=options)


class Planted:
    """Clips whose class is an offset of the sound and of the picture, as a loader."""

    def __init__(self, make, n, seed):
        self.samples, self.make, self.steps = make.samples(n, seed), make, n // 16
        for i, sample in enumerate(self.samples):
            sample["features"]["audio"][:, i % 3] += 1.0
            sample["targets"] = {"word": i % 3}

    def batches(self, epoch, first=0):
        order = np.random.default_rng(epoch).permutation(len(self.samples))
        for rows in np.array_split(order, self.steps):
            yield collate([self.samples[row] for row in rows], self.make.features, {"word": self.make.tasks["word"]})

    def sample_batches(self, clips):
        tasks = {"word": self.make.tasks["word"]}
        yield collate(self.samples[:clips], self.make.features, tasks)


def test_it_learns_what_is_planted_and_the_best_epochs_bank_goes_with_its_weights(make):
    train, val = Planted(make, 96, 0), Planted(make, 48, 1)
    config = make.config(mm_orient={"bank": 32}, stem={"motion": False}, dropout=0.1)
    tasks = {"word": make.tasks["word"]}
    model = clcr.build("mm_orient", config, make.features, tasks)
    model.fit_statistics(train.sample_batches(96))
    trainer = Trainer(model, tasks, OptimConfig(epochs=8, lr=3e-3), train.steps)
    scores = [epoch.metrics["val/accuracy"] for epoch in trainer.fit(train, val)]
    assert max(scores) > 0.7  # chance: 1/3
    stored = trainer.best_weights["bank_nodes"].clone()
    assert model.bank.present.all() and stored.abs().sum() > 0
    trainer.load_best()
    assert torch.equal(model.bank_nodes, stored)
    predictions, _ = trainer.evaluate(val.batches(0))
    accuracy = (predictions["word"].logits.argmax(1) == predictions["word"].targets).float().mean()
    assert accuracy == pytest.approx(max(scores))
