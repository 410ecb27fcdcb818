"""From the bytes of a file to pixels: JPEGs by simplejpeg where it is installed, by Pillow otherwise, bit-equal."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from vqgan_jax.data.source import CorruptExample

try:
    import simplejpeg
except ImportError:  # the extra in requirements-fast.txt
    simplejpeg = None

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_ORIENTATION = 0x0112  # EXIF


def decode_image(data: bytes, where: str, *, at_least: int | None = None) -> np.ndarray:
    """Decodes a picture to uint8 RGB [h, w, 3], upright by its EXIF rotation, transparency on white.

    Args:
      data: the bytes of a JPEG, PNG, WebP or BMP file.
      where: the name of the file, for the error.
      at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while its short side stays at least this many
        pixels, which is faster; None decodes it whole.

    Raises:
      CorruptExample: no readable picture, or one of so many pixels that Pillow takes it for an attack.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _fast_jpeg(data, image, at_least) if simplejpeg and image.format == "JPEG" else None
            if pixels is None:
                if at_least:
                    image.draft(None, (at_least, at_least))
                pixels = _to_rgb(image)
            return _upright(pixels, image)
    except Exception as error:  # decoders raise anything at all on damaged bytes
        raise _corrupt(where, data, error) from error


def decode_ids(data: bytes, where: str) -> np.ndarray:
    """Decodes a picture of ids to integers [h, w]: uint8, or int32 where it has 16 bits; of a palette the indices.

    Raises:
      CorruptExample: no readable picture, or one in colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "I" or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.int32)
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8)
            if image.mode in ("L", "P", "LA", "PA"):
                return np.array(image.getchannel(0))
            pixels = np.asarray(image)
            if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., :3]).all():  # grey that was saved in colours
                return np.ascontiguousarray(pixels[..., 0])
            raise ValueError(f"a picture in colours ({image.mode}), where one id a pixel is needed")
    except Exception as error:
        raise _corrupt(where, data, error) from error


def decode_float_rgba(data: bytes, where: str) -> np.ndarray:
    """Decodes an RGBA picture whose four bytes a pixel are one little-endian float32: float32 [h, w].

    Raises:
      CorruptExample: no readable picture, or not RGBA.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "RGBA":
                raise ValueError(f"a picture with the mode {image.mode}, where RGBA holds one float32 a pixel")
            return np.ascontiguousarray(image).view("<f4")[..., 0].astype(np.float32)
    except Exception as error:
        raise _corrupt(where, data, error) from error


def decode_npy(data: bytes, where: str) -> np.ndarray:
    """The pixels of a .npy file, uint8 [(1,) 3, h, w] as CelebA-HQ is handed on, or [h, w, 3]: uint8 [h, w, 3].

    Raises:
      CorruptExample: no array, or one that is no picture.
    """
    try:
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises anything at all on damaged bytes
        raise _corrupt(where, data, error) from error
    pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise CorruptExample(where, f"{pixels.dtype} of shape {pixels.shape}, no picture")
    return np.ascontiguousarray(pixels)


def _fast_jpeg(data: bytes, header: Image.Image, at_least: int | None) -> np.ndarray | None:
    """The pixels by simplejpeg, at the scale Pillow's draft would choose; None where Pillow has to look at it."""
    if header.mode not in ("RGB", "L"):
        return None
    width, height = header.size
    reduction = 1
    while at_least and reduction < 8 and min(width, height) // at_least >= 2 * reduction:
        reduction *= 2
    try:
        return simplejpeg.decode_jpeg(
            data, min_width=math.ceil(width / reduction), min_height=math.ceil(height / reduction)
        )
    except ValueError:  # it is stricter than Pillow: the same files shall be readable with and without it
        return None


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.rint(np.clip(np.asarray(image, np.float32), 0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Turns the picture as the camera's EXIF says it was held."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # nonsense beside a readable picture
        return pixels
    if orientation not in range(2, 9):
        return pixels
    if orientation in (2, 4):
        turned = pixels[:, ::-1] if orientation == 2 else pixels[::-1]
    elif orientation in (5, 7):
        turned = pixels.transpose(1, 0, 2) if orientation == 5 else pixels[::-1, ::-1].transpose(1, 0, 2)
    else:
        turned = np.rot90(pixels, {3: 2, 6: -1, 8: 1}[orientation])
    return np.ascontiguousarray(turned)


def _corrupt(where: str, data: bytes, error: Exception) -> CorruptExample:
    if not data:
        return CorruptExample(where, "an empty file")
    if isinstance(error, UnidentifiedImageError):  # its text holds an address in memory, another one each time
        return CorruptExample(where, "no picture, or of an unknown format")
    reason = " ".join(str(error).split())
    return CorruptExample(where, f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
