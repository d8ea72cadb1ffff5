"""`timm:NAME`: the stages of a network of timm's, with weights from a file; the weights `pretrained` are the hub's."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from features.encoders import hub
from features.encoders.contract import Asked
from features.encoders.pyramid import Pyramid
from features.errors import FeaturesError, one_line

HUB = "pretrained"


def pin(asked: Asked) -> Asked:
    """See features.encoders.registry.pinned: `pretrained` becomes pretrained@COMMIT of the hub."""
    place = make(asked).hub_id
    if asked.weights != HUB or not place:
        return asked
    return replace(asked, weights=f"{HUB}@{hub.commit_of(place, None, asked.option)}")


def make(asked: Asked) -> "Timm":
    """See features.encoders.registry."""
    import timm

    try:
        with torch.device("meta"):  # its shape alone
            net = timm.create_model(asked.name.partition(":")[2], features_only=True)
    except Exception as error:  # an unknown name, or a network without stages
        raise FeaturesError(f"{asked.option} is no network of timm's with stages: {one_line(error)}") from error
    return Timm(asked, net)


class Timm(Pyramid):
    """net: the network without weights, for what it says of itself."""

    def __init__(self, asked: Asked, net: Any) -> None:
        super().__init__(asked, net.feature_info.channels())
        said = net.pretrained_cfg
        self.mean, self.std = said["mean"], said["std"]
        self.size = said["input_size"][-1] if said.get("fixed_input_size") else 0
        self.hub_id: str = said.get("hf_hub_id") or ""
        if asked.weights.partition("@")[0] == HUB:
            self.identity = {**self.identity, "tag": self.hub_id or said.get("tag") or ""}

    def load(self, device: str) -> None:
        """See Encoder."""
        import timm

        weights = self.asked.weights
        source, _, commit = weights.partition("@")
        chosen = {"hf_hub_id": f"{self.hub_id}@{commit}", "source": "hf-hub"} if source == HUB else {"file": weights}
        overlay: Any = {} if weights == HUB else {"pretrained_cfg_overlay": chosen}
        name = self.asked.name.partition(":")[2]
        try:
            self.net = timm.create_model(name, features_only=True, pretrained=True, **overlay).eval().to(device)
        except Exception as error:  # torch.load raises whatever damaged bytes make it raise
            problem = f"weights {weights} do not load: {one_line(error)}"
            raise FeaturesError(f"{self.asked.option}: {problem}") from error

    def stages(self, pictures: Tensor) -> Sequence[Tensor]:
        """See Pyramid."""
        maps = self.net(pictures)
        by_row = getattr(getattr(self.net, "output_fmt", None), "value", "") == "NHWC"  # swin and its like
        return [x.movedim(-1, 1) for x in maps] if by_row else maps
