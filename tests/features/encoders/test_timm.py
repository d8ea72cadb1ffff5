"""Networks of timm's whose maps have their channels last are pooled like the others."""

import numpy as np
import pytest
import timm
import torch

from features.encoders import Asked
from features.encoders.resnet18 import pixels
from features.encoders.timm import make
from features.errors import FeaturesError

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)


def with_random_weights(name):
    encoder = make(Asked(f"timm:{name}", "video", "none.pth"))
    torch.manual_seed(0)
    encoder.net = timm.create_model(name, features_only=True).eval()
    return encoder


def test_maps_with_channels_last():
    encoder = with_random_weights("mambaout_femto")
    assert encoder.net.output_fmt.value == "NHWC", "or it tests nothing"
    tokens = encoder(FRAMES)
    with torch.no_grad():
        maps = encoder.net(pixels(FRAMES, torch.device("cpu"), encoder.mean, encoder.std))
    for place, layer in enumerate(encoder.layers):
        expected = maps[layer - 1].mean(dim=(1, 2)).numpy()
        np.testing.assert_allclose(tokens[:, 0, place, : expected.shape[1]], expected, atol=1e-5)


def test_maps_of_other_channels_than_declared_are_refused():
    encoder = with_random_weights("mobilenetv3_small_050")
    encoder.channels[-1] += 1
    with pytest.raises(FeaturesError, match=r"its stages have .* channels, not"):
        encoder(FRAMES)
