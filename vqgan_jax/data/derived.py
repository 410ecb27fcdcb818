"""Conditions that follow from a picture alone, computed on what is seen: its edges, and the picture without details."""

import numpy as np
from PIL import Image

EDGE_SIGMA = 2.0  # pixels of the smoothing before edges are looked for, as in the released code


def canny_edges(pixels: np.ndarray) -> np.ndarray:
    """Canny edges of the grey picture: uint8 [h, w, 3] to float32 [h, w, 1], 1 on an edge and -1 elsewhere."""
    from skimage.feature import canny  # here, for it takes half a second and few runs need it

    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255
    return np.where(canny(grey, sigma=EDGE_SIGMA), np.float32(1), np.float32(-1))[..., None]


def low_resolution(pixels: np.ndarray, factor: int) -> np.ndarray:
    """A picture that has lost its details: shrunk by `factor` to the means of areas, and enlarged again bicubically:
    uint8 [h, w, 3] both times."""
    height, width = pixels.shape[:2]
    small = max(1, round(width / factor)), max(1, round(height / factor))
    shrunk = Image.fromarray(pixels).resize(small, Image.Resampling.BOX)
    return np.asarray(shrunk.resize((width, height), Image.Resampling.BICUBIC))
