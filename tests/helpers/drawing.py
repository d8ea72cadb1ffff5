"""A drawn face, which a detector takes for one: of nobody."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SKIN, HAIR, LIPS = (224, 180, 150), (60, 40, 30), (170, 70, 70)
MOUTH = 38  # pixels that its mouth lies below its middle, at scale 1


def draw_face(width, height, x, y, scale=1.0):
    """(height, width, 3) uint8: a face with its middle at x, y, 124 pixels high at scale 1."""
    picture = Image.new("RGB", (width, height), (90, 120, 150))
    canvas = ImageDraw.Draw(picture)

    def oval(across, down, wide, high, colour):
        corners = (across - wide, down - high, across + wide, down + high)
        canvas.ellipse([c * scale + (x, y)[n % 2] for n, c in enumerate(corners)], fill=colour)

    oval(0, -12, 52, 64, HAIR)
    oval(0, 5, 45, 60, SKIN)
    for side in (-1, 1):
        oval(18 * side, -22, 12, 3, HAIR)
        oval(18 * side, -10, 10, 5, (245, 245, 245))
        oval(18 * side, -10, 4.5, 4.5, HAIR)
        oval(4 * side, 19, 2.5, 1.5, (120, 80, 70))
    oval(0, 12, 6, 10, (200, 150, 125))
    oval(0, MOUTH, 17, 6, LIPS)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(1.5 * scale)))
