"""Both ways between uint8 pictures and float images in [-1, 1], grids of pictures, and PNG files."""

import io
import math
import os

import numpy as np
from PIL import Image, ImageDraw

from vqgan_jax import storage


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., c] in 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    out = pixels.astype(np.float32)  # in place from here: the pipeline spends a tenth of its time here otherwise
    out /= np.float32(127.5)
    out -= np.float32(1)
    return out


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [-1, 1] (clipped) to uint8, rounded to nearest; truncating moves FID."""
    scaled = (np.asarray(images, np.float32) + 1) * np.float32(127.5)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def centre_crop(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture [h, w, c]: [height, width, c]."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def grid(pixels: np.ndarray, columns: int | None = None, pad: int = 2) -> np.ndarray:
    """Lays uint8 pictures [n, h, w, c] out in rows: one picture [rows * h + gaps, columns * w + gaps, 3].

    One channel is shown as grey. `columns` is about the square root of n unless given.
    """
    n, h, w, c = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + pad) - pad, columns * (w + pad) - pad, 3), 255, np.uint8)
    for k, picture in enumerate(pixels):
        y, x = k // columns * (h + pad), k % columns * (w + pad)
        sheet[y : y + h, x : x + w] = picture if c == 3 else picture[..., :1]
    return sheet


def labelled_rows(rows: dict[str, np.ndarray], pad: int = 2) -> np.ndarray:
    """Rows of uint8 pictures [n, h, w, c], each row under its name: one picture [., ., 3]."""
    sheets = []
    for name, pictures in rows.items():
        sheet = grid(pictures, columns=len(pictures), pad=pad)
        strip = Image.new("RGB", (sheet.shape[1], 14), "white")
        ImageDraw.Draw(strip).text((2, 1), name, fill="black")
        sheets += [np.asarray(strip), sheet]
    width = max(sheet.shape[1] for sheet in sheets)
    padded = [np.pad(x, ((0, pad), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in sheets]
    return np.concatenate(padded)


def png_bytes(pixels: np.ndarray) -> bytes:
    """One uint8 picture [h, w, 3], [h, w, 1] or [h, w] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def save_png(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Writes one uint8 picture [h, w, 3], [h, w, 1] or [h, w] as PNG, making the folder where it is missing."""
    storage.write_bytes(path, png_bytes(pixels))
