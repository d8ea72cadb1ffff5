"""Pictures to vectors: the regions of a still image, and the frames of a video, by their pixels or by ResNet-18.

The mean of an image's regions is its global vector (for ResNet-18 exactly what its own last pooling gives), so none is
stored as well.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn

from features.decode.media import open_source
from features.decode.specs import Encoded, ImageSpec
from features.errors import FeaturesError, MediaError, one_line

CHUNK = 16  # pictures that go through the network at once on a CPU
BATCH = 128  # and on a GPU
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, which torchvision's weights expect


def encode_image(uri: str, spec: ImageSpec) -> Encoded:
    """An image's regions, row by row: (grid * grid, 3 * region ** 2) uint8 pixels, or (grid * grid, 512) float16.

    The image is turned as its camera was held, laid on white where it is transparent, and scaled to a square. Raises
    MediaError (stage open or image).
    """
    pixels = decode_image(uri, spec.size)
    if spec.encoder == "patches":
        regions = rearrange(pixels, "(gh h) (gw w) c -> (gh gw) (h w c)", gh=spec.grid, gw=spec.grid)
        return Encoded(np.ascontiguousarray(regions), 0.0, {})
    maps = F.adaptive_avg_pool2d(_feature_maps(pixels[None], load_resnet18(spec.weights)), spec.grid)
    return Encoded(rearrange(maps, "1 d h w -> (h w) d").half().numpy(), 0.0, {})


def decode_image(uri: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB of any file that Pillow reads; of moving ones the first picture.

    Raises MediaError (stage open or image), also for pixels of 32 bits, whose range no file states.
    """
    source = open_source(uri)
    try:
        with Image.open(source) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode in ("I", "F"):
                raise MediaError("image", f"{uri}: no telling which value is white (mode {image.mode}); save it as PNG")
            if image.mode.startswith("I;16"):  # Pillow would cut every number off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    except (MemoryError, MediaError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them raise
        raise MediaError("image", f"{uri} is not an image that Pillow reads: {one_line(error)}") from error


def embed_frames(frames: np.ndarray, weights: str) -> np.ndarray:
    """(T, H, W, 3) uint8 to (T, 512) float16, each frame by itself."""
    net = load_resnet18(weights)
    chunks = [frames[first : first + CHUNK] for first in range(0, len(frames), CHUNK)]
    return torch.cat([_vectors(chunk, net) for chunk in chunks]).numpy()


def embed_clips(clips: Sequence[np.ndarray], net: nn.Module) -> list[np.ndarray]:
    """Frames of several clips, each (T, H, W, 3), to their vectors, on the device that the network is on.

    A batch always has the same size, filled up where need be: so a frame's vector does not depend on its neighbours.
    """
    frames, vectors = [frame for clip in clips for frame in clip], []
    for first in range(0, len(frames), BATCH):
        batch = frames[first : first + BATCH]
        filling = batch[-1:] * (BATCH - len(batch))
        vectors.append(_vectors(np.stack(batch + filling), net)[: len(batch)].cpu())
    ends = np.cumsum([len(clip) for clip in clips])
    return np.split(torch.cat(vectors).numpy(), ends[:-1])


def _vectors(pictures: np.ndarray, net: nn.Module) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 512) float16."""
    return _feature_maps(pictures, net).mean(dim=(2, 3)).half()


@torch.inference_mode()
def _feature_maps(pictures: np.ndarray, net: nn.Module) -> Tensor:
    """(N, H, W, 3) uint8 to the last feature maps, (N, 512, H / 32, W / 32)."""
    device = next(net.parameters()).device
    x = rearrange(torch.from_numpy(pictures.copy()).to(device).float() / 255, "n h w c -> n c h w")
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return net((x - mean) / std)


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
        elif weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
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
