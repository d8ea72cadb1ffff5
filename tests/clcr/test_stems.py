"""Stems: every kind of token becomes a vector, masked, standardised, robust to broken values."""

import pytest
import torch

from clcr.batches import Features, FeatureSpec
from clcr.config import ModelConfig, StemConfig
from clcr.errors import ConfigError
from clcr.hierarchy import TemporalHierarchy
from clcr.stems import VectorStem, build_stem, patch_means, random_shift

VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)


def frames(height=20, width=24):
    return torch.randint(0, 256, (2, 4, height, width, 3), dtype=torch.uint8)


def frame_stem(**options):
    return build_stem(FeatureSpec((20, 24, 3), 12.5, "uint8"), StemConfig(**options), 16).eval()


@pytest.mark.parametrize("video", ["patches", "trunk", "resnet18"])
@pytest.mark.parametrize("motion", [True, False])
def test_frames_of_any_size_become_tokens_that_padding_does_not_change(video, motion):
    stem, clip = frame_stem(video=video, motion=motion), frames()
    tokens = stem(clip, VALID)
    assert tokens.shape == (2, 4, 16) and not tokens[1, 2:].any()
    garbage = clip.clone()
    garbage[1, 2:] = 255
    assert torch.allclose(stem(garbage, VALID), tokens, atol=1e-5)
    assert torch.allclose(stem(clip[1:, :2], VALID[1:, :2]), tokens[1:, :2], atol=1e-5)


@pytest.mark.parametrize("video", ["patches", "trunk"])
def test_what_moves_little_is_seen_under_bfloat16_autocast(video):
    stem, clip = frame_stem(video=video), torch.full((1, 75, 20, 24, 3), 200, dtype=torch.uint8)
    clip += torch.randint(0, 2, clip.shape, dtype=torch.uint8)
    valid = torch.ones(1, 75, dtype=torch.bool)
    exact, _ = stem._split(stem._average(clip), valid)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stem._split(stem._average(clip), valid)[0], exact)


def test_a_static_colour_can_be_learned_although_the_mean_frame_is_removed():
    stem, classify = frame_stem(), torch.nn.Linear(16, 2)
    clips = torch.zeros(2, 4, 20, 24, 3, dtype=torch.uint8)
    clips[0, ..., 0], clips[1, ..., 2] = 200, 200
    valid = torch.ones(2, 4, dtype=torch.bool)
    optimizer = torch.optim.AdamW([*stem.parameters(), *classify.parameters()], lr=0.01)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(classify(stem(clips, valid).mean(1)), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_a_still_image_keeps_its_detail():
    stem = frame_stem()
    checks = torch.zeros(1, 1, 20, 24, 3, dtype=torch.uint8)
    checks[:, :, ::2] = 255
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert (stem(checks, valid) - stem(checks.flip(2), valid)).abs().max() > 0.05  # equal at 4 x 4, not in detail


def test_what_does_not_move_leaves_no_motion_features():
    stem = frame_stem()
    clip = frames()[:, :1].expand(-1, 4, -1, -1, -1)
    tokens = stem(clip, VALID)
    assert torch.allclose(tokens[0], tokens[0, :1].expand(4, -1), atol=1e-5)


def test_fitted_vectors_have_mean_0_and_spread_1_over_valid_tokens():
    stem = VectorStem(3, 8, motion=False)
    values = torch.randn(2, 4, 3) * torch.tensor([5.0, 0.01, 0.0]) + torch.tensor([100.0, 0.0, 7.0])
    values[1, 2:] = 1e6  # padding
    stem.observe(values, VALID)
    stem.fit()
    rows = stem.standardise(values)[VALID]
    assert rows.mean(0).abs().max() < 1e-2
    assert torch.allclose(rows[:, :2].std(0, correction=0), torch.ones(2), atol=1e-2)
    assert rows[:, 2].abs().max() < 1e-3  # a constant feature stays harmless


def test_what_moves_in_vectors_is_of_unit_size_beside_any_offset_of_the_clip():
    """A rhythm a thousandth the size of what tells the clips apart is as large in the tokens' input as any other."""
    stem = VectorStem(2, 8, motion=True)
    rhythm = torch.sin(torch.arange(20.0) / 3)[None, :, None] * torch.tensor([1e-3, 1.0])
    values, valid = rhythm + torch.randn(64, 1, 2), torch.ones(64, 20, dtype=torch.bool)
    stem.observe(values, valid)
    stem.fit()
    before = stem(values, valid)
    assert torch.allclose(before[0], before[1], atol=1e-4)  # the offset is not used until it pays
    spread = (stem.moving_std * stem.standardise.std)[1].item()
    assert spread == pytest.approx(rhythm[0, :, 1].std(correction=0).item(), rel=1e-3)
    stem.scene.weight.data.normal_()
    assert not torch.allclose(stem(values, valid)[0], stem(values, valid)[1], atol=1e-2)


def test_differences_reach_from_one_token_of_the_shallow_level_to_the_next():
    """Log-mel at 100 Hz, merged four to one: what repeats within those 40 ms is no change, what goes on is."""
    model = ModelConfig(width=8, max_rate=25)
    hierarchy = TemporalHierarchy(FeatureSpec((1,), 100.0, "float32"), model, StemConfig(), read=[2])
    shown = {}
    hierarchy.stem.project.register_forward_pre_hook(lambda _, given: shown.update(given=given[0]))
    jitter, ramp = torch.randn(4).repeat(6), torch.arange(24.0) / 8
    hierarchy(Features(torch.stack([jitter, ramp])[..., None], torch.ones(2, 24, dtype=torch.bool)))
    steps = shown["given"][..., 1]
    assert steps[0].abs().max() < 1e-5
    assert not steps[1, :4].any() and torch.allclose(steps[1, 4:], torch.tensor(0.5))


def test_a_clip_shorter_than_a_difference_has_none():
    stem = VectorStem(2, 8, motion=True, lag=4)
    values, valid = torch.randn(3, 2, 2), torch.ones(3, 2, dtype=torch.bool)
    stem.observe(values, valid)
    stem.fit()
    assert stem(values, valid).shape == (3, 2, 8) and stem(values, valid).isfinite().all()


def test_a_lone_vector_is_kept():
    stem = VectorStem(2, 8, motion=True)
    lone = torch.tensor([[True, False, False, False]])
    values = torch.randn(2, 4, 2)
    assert not torch.allclose(stem(values[:1], lone)[0, 0], stem(values[1:], lone)[0, 0])


def test_lone_vectors_are_standardised_and_do_not_count_as_clips_that_stand_still():
    stem, scale = VectorStem(3, 8, motion=True), torch.tensor([0.01, 1.0, 1000.0])
    values = torch.randn(64, 20, 3) * scale
    valid = torch.arange(20) < torch.tensor([1, 20]).repeat(32)[:, None]
    stem.observe(values, valid)
    stem.fit()
    assert torch.allclose(stem.moving_std, torch.ones(3), atol=0.1)
    shown = {}
    stem.project.register_forward_pre_hook(lambda _, given: shown.update(given=given[0]))
    stem(values, valid)
    assert torch.allclose(shown["given"][::2, 0, :3].std(dim=0), torch.ones(3), atol=0.4)


def test_vectors_without_a_time_and_those_asked_not_to_do_not_move():
    timed, untimed = (FeatureSpec((3,), rate, "float32") for rate in (50.0, 0.0))
    assert build_stem(timed, StemConfig(), 8).motion and not build_stem(untimed, StemConfig(), 8).motion
    assert not build_stem(timed, StemConfig(motion=False), 8).motion


@pytest.mark.parametrize("motion", [False, True])
def test_broken_values_neither_spoil_the_statistics_nor_the_tokens(motion):
    stem = VectorStem(2, 8, motion)
    values = torch.randn(2, 4, 2)
    values[0, 0, 0], values[0, 1, 1] = torch.nan, torch.inf
    values[1, 3] = torch.nan  # padding
    stem.observe(values, VALID)
    stem.fit()
    assert stem.standardise.mean.isfinite().all() and stem.standardise.std.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in stem.buffers())
    assert stem(values, VALID).isfinite().all()


@pytest.mark.parametrize("video", ["patches", "trunk"])
def test_fitted_pixels_have_unit_spread(video):
    stem = frame_stem(video=video)
    clip = (frames().float() * 0.2 + 40).to(torch.uint8)
    stem.observe(clip, VALID)
    stem.fit()
    rows = (clip.float() - stem.mean)[VALID].reshape(-1, 3) / stem.std
    assert rows.mean(0).abs().max() < 1e-3 and (rows.std(0) - 1).abs().max() < 1e-3
    moving = clip[VALID[:, :, None, None, None].expand_as(clip)].float().std()
    assert (stem.moving_std < 2 * moving).all() and (stem.step_std > 0).all()


def test_large_frames_are_averaged_over_patches():
    stem = build_stem(FeatureSpec((64, 50, 3), 12.5, "uint8"), StemConfig(), 16)
    clip = torch.randint(0, 256, (1, 4, 64, 50, 3), dtype=torch.uint8)
    assert stem.moving_std.shape == (22, 17, 3)
    assert stem(clip, VALID[:1]).shape == (1, 4, 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch", [2, 3, 7, 200])
def test_patch_means_are_those_of_a_pooling_that_takes_what_there_is_at_the_edges(patch, dtype):
    clip = torch.full((1, 2, 203, 13, 3), 255) if patch == 200 else frames(20, 23)  # sums beyond 16 bits
    pooled = torch.nn.functional.avg_pool2d(clip.float().flatten(0, 1).movedim(-1, 1), patch, ceil_mode=True)
    expected = pooled.movedim(1, -1).unflatten(0, clip.shape[:2])
    torch.testing.assert_close(patch_means(clip.to(dtype), patch), expected)


def test_an_export_takes_the_same_means_bit_by_bit_and_pads_no_int16(monkeypatch):
    clip, padded, pad = frames(20, 23), [], torch.nn.functional.pad
    means = patch_means(clip, 3)
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    monkeypatch.setattr("torch.nn.functional.pad", lambda x, by: padded.append(x.dtype) or pad(x, by))
    assert torch.equal(patch_means(clip, 3), means) and padded == [torch.float32]


def test_a_shifted_clip_is_moved_as_one_and_repeats_its_edges():
    clip = torch.arange(2 * 3 * 10 * 12 * 3).view(2, 3, 10, 12, 3)
    moved = random_shift(clip, 0.2)
    pad = torch.nn.functional.pad(clip.movedim(-1, 1).double(), (2, 2, 2, 2, 0, 0), mode="replicate").movedim(1, -1)
    windows = [pad[:, :, y : y + 10, x : x + 12].long() for y in range(5) for x in range(5)]
    for got, *candidates in zip(moved, *windows, strict=True):
        assert sum(torch.equal(got, candidate) for candidate in candidates) == 1


def test_an_unknown_frame_stem_is_named():
    with pytest.raises(ConfigError, match=r"--stem\.video"):
        StemConfig(video="vit")
