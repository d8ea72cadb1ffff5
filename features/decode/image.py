"""A still image: its picture, or the pixels or ResNet-18's features of its regions.

The mean of an image's regions is its global vector (for ResNet-18 exactly what its own last pooling gives), so none is
stored as well.
"""

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps

from features.decode.media import open_source
from features.decode.specs import Encoded, ImageSpec
from features.encoders.resnet18 import feature_maps, load_resnet18
from features.errors import MediaError, one_line


def encode_image(uri: str, spec: ImageSpec) -> Encoded:
    """An image's regions, row by row: (grid * grid, 3 * region ** 2) uint8 pixels, or (grid * grid, 512) float16.

    For a network of the contract the picture itself, (1, size, size, 3) uint8.

    The image is turned as its camera was held, laid on white where it is transparent, and scaled to a square. Raises
    MediaError (stage open or image).
    """
    pixels = decode_image(uri, spec.picture())
    if spec.asked() is not None:
        return Encoded(pixels[None], 0.0, {})
    if spec.encoder == "patches":
        regions = rearrange(pixels, "(gh h) (gw w) c -> (gh gw) (h w c)", gh=spec.grid, gw=spec.grid)
        return Encoded(np.ascontiguousarray(regions), 0.0, {})
    maps = F.adaptive_avg_pool2d(feature_maps(pixels[None], load_resnet18(spec.weights)), spec.grid)
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
