"""`resnet18`: 512 numbers of each frame, or of each region of an image, by weights from a file or of torchvision's."""

import functools

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from features.encoders.contract import Asked, Encoder
from features.errors import FeaturesError, one_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, which torchvision's weights expect


class ResNet18(Encoder):
    """Frames to the means of the last feature maps."""

    shape = (512,)

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.net: nn.Module = nn.Identity()

    def load(self, device: str) -> None:
        """See Encoder."""
        self.net = load_resnet18(self.weights).to(device)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, 512) float16."""
        return feature_maps(windows, self.net).mean(dim=(2, 3)).half().cpu().numpy()


def make(asked: Asked) -> ResNet18:
    """See features.encoders.registry."""
    return ResNet18(asked.weights)


Moments = tuple[float, ...]


def pixels(pictures: np.ndarray, device: torch.device, mean: Moments = MEAN, std: Moments = STD) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32, normalised, as ImageNet's networks expect unless told otherwise."""
    x = rearrange(torch.from_numpy(pictures.copy()).to(device).float() / 255, "n h w c -> n c h w")
    centre, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return (x - centre) / scale


@torch.inference_mode()
def feature_maps(pictures: np.ndarray, net: nn.Module) -> Tensor:
    """(N, H, W, 3) uint8 to the last feature maps, (N, 512, H / 32, W / 32)."""
    return net(pixels(pictures, next(net.parameters()).device))


def read_weights(file: str) -> dict[str, Tensor]:
    """A state dict's file, .safetensors or what torch.save wrote, on the CPU."""
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


@functools.lru_cache(maxsize=2)
def load_resnet18(weights: str) -> nn.Module:
    """ResNet-18 up to its last feature maps, (N, 3, H, W) -> (N, 512, H / 32, W / 32); once per process.

    weights: a state dict's file, or torchvision's name, which downloads them unless they are cached. Raises
    FeaturesError where they do not load.
    """
    from torchvision.models import ResNet18_Weights, resnet18  # heavy, and needed where this encoder is asked for

    try:
        if weights in ResNet18_Weights.__members__:
            state = ResNet18_Weights[weights].get_state_dict(progress=False)
        else:
            state = read_weights(weights)
        net = resnet18(weights=None)
        net.fc = nn.Identity()  # of whatever classes the weights were trained for
        net.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except Exception as error:  # torch.load raises whatever damaged bytes make it raise
        known = ", ".join(ResNet18_Weights.__members__)
        raise FeaturesError(
            f"weights {weights} are none of ResNet-18's: {one_line(error)}; name a state dict's file (.pth, "
            f".safetensors) or {known}"
        ) from error
    return nn.Sequential(*list(net.children())[:-2]).eval()
