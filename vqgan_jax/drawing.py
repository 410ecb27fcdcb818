"""Conditions as a person sees them: arrays go in, uint8 pictures [h, w, 3] come out, for `images.py` to lay out."""

import colorsys
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqgan_jax.images import to_uint8

_FONT_SIZE = 11
LINE = 14  # pixels a line of text
# From far (dark) to near (bright) for depths that grow towards the viewer; even steps of lightness.
_DEPTH_STOPS = np.array(
    [[0, 0, 4], [51, 10, 94], [120, 28, 109], [187, 55, 84], [237, 105, 37], [252, 181, 25], [252, 255, 164]],
    np.float32,
)
# Bones between the 18 joints of pose estimation (keypoints.JOINTS): (from, to).
BONES = (
    *((1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)


@functools.cache
def palette(count: int) -> np.ndarray:
    """Colours uint8 [count, 3] that tell ids apart, the same for an id whatever `count` is."""
    steps = 1.2207440846 ** -np.arange(1.0, 4)  # spread any number of points over a cube evenly (Roberts, 2018)
    spread = (np.arange(count)[:, None] + 1) * steps % 1
    colours = [colorsys.hsv_to_rgb(h, 0.45 + 0.55 * s, 0.4 + 0.6 * v) for h, s, v in spread]
    table = np.rint(np.array(colours).reshape(count, 3) * 255).astype(np.uint8)
    table.flags.writeable = False
    return table


def segmentation(ids: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """Ids int [h, w] by a palette uint8 [n, 3] (`palette` unless given); ids outside it are black."""
    colours = palette(max(256, int(ids.max()) + 1)) if colours is None else colours
    inside = (ids >= 0) & (ids < len(colours))
    return np.where(inside[..., None], colours[np.where(inside, ids, 0)], np.uint8(0))


def depth(values: np.ndarray) -> np.ndarray:
    """Depth float [h, w] or [h, w, 1] in [-1, 1] by a colour map from dark (-1) to bright (1)."""
    values = np.asarray(values, np.float32).reshape(values.shape[:2])
    at = (np.clip(values, -1, 1) + 1) / 2 * (len(_DEPTH_STOPS) - 1)
    low = np.minimum(at.astype(np.intp), len(_DEPTH_STOPS) - 2)
    share = (at - low)[..., None]
    return np.rint(_DEPTH_STOPS[low] * (1 - share) + _DEPTH_STOPS[low + 1] * share).astype(np.uint8)


def coords(places: np.ndarray) -> np.ndarray:
    """Coordinates float [h, w, 2], (y, x) in [0, 1]: red grows downwards, green to the right."""
    blue = np.full((*places.shape[:2], 1), 0.5, np.float32)
    return np.rint(np.clip(np.concatenate([places, blue], axis=-1), 0, 1) * 255).astype(np.uint8)


def coloured(values: np.ndarray) -> np.ndarray:
    """A picture float [h, w, 3 or 1] in [-1, 1] as it is; one channel as grey."""
    pixels = to_uint8(values)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def overlay(picture: np.ndarray, colours: np.ndarray, share: float = 0.5) -> np.ndarray:
    """Colours laid over a picture of the same shape."""
    mixed = picture.astype(np.float32) * (1 - share) + colours.astype(np.float32) * share
    return np.rint(mixed).astype(np.uint8)


def boxes(
    picture: np.ndarray,
    rectangles: np.ndarray,
    classes: np.ndarray,
    names: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> np.ndarray:
    """Rectangles with their names on a picture.

    Args:
      picture: uint8 [h, w, 3].
      rectangles: float [n, 4] (x, y, width, height), relative to the picture; one without extent is drawn as a point.
      classes: int [n], -1 for none.
      names: of the classes; an id without one is drawn as a number.
      flags: a text for each box, such as "group", or none at all.
    """
    height, width = picture.shape[:2]
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    shown = [k for k in range(len(classes)) if classes[k] >= 0]
    taken: list[tuple[float, float, float]] = []
    for k in sorted(shown, key=lambda k: -rectangles[k, 2] * rectangles[k, 3]):  # small ones on top
        x, y, w, h = (float(n) for n in rectangles[k])
        colour = tuple(int(n) for n in palette(int(classes[k]) + 1)[-1])
        left, top = x * (width - 1), y * (height - 1)
        right, bottom = (x + w) * (width - 1), (y + h) * (height - 1)
        if w > 0 or h > 0:
            draw.rectangle([left, top, right, bottom], outline=colour, width=2)
        else:
            draw.ellipse([left - 3, top - 3, left + 3, top + 3], fill=colour)
        name = name_of(int(classes[k]), names) + (f" ({flags[k]})" if len(flags) and flags[k] else "")
        _label(draw, (left, top), name, colour, (width, height), taken)
    return np.asarray(canvas)


def seen_boxes(
    rectangles: np.ndarray, classes: np.ndarray, crop_box: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles float [n, 4], relative to a whole picture, as they are seen in a crop of it.

    Args:
      rectangles: (x, y, width, height).
      classes: int [n], -1 for none.
      crop_box: of the crop, float [4], also relative to the whole picture; None where that is what is seen.

    Returns:
      the rectangles relative to the crop and cut to it, and the classes, -1 for those that lie outside.
    """
    if crop_box is None:
        return rectangles, classes
    start = (rectangles[:, :2] - crop_box[:2]) / crop_box[2:]
    end = (rectangles[:, :2] + rectangles[:, 2:] - crop_box[:2]) / crop_box[2:]
    low, high = np.clip(start, 0, 1), np.clip(end, 0, 1)
    outside = ((high <= low) & (end > start) | (start < 0) & (end <= start) | (start > 1)).any(axis=1)
    return np.concatenate([low, high - low], axis=1), np.where(outside, -1, classes)


def keypoints(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Points float [n, 3] (x, y relative to the picture, seen) on black; 18 of them as a skeleton."""
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    colours = [tuple(int(n) for n in colour) for colour in palette(max(len(points), len(BONES)))]
    at = [(float(x) * width, float(y) * height) for x, y, _ in points]
    thick = max(1, round(min(height, width) / 64))
    for k, (start, end) in enumerate(BONES if len(points) == 18 else ()):
        if points[start, 2] > 0 and points[end, 2] > 0:
            draw.line([at[start], at[end]], fill=colours[k], width=thick)
    for k, (x, y) in enumerate(at):
        if points[k, 2] > 0:
            draw.ellipse([x - thick, y - thick, x + thick, y + thick], fill=colours[k])
    return np.asarray(canvas)


def legend(entries: Mapping[str, Sequence[int]], width: int, lines: int) -> np.ndarray:
    """Names, each beside its colour, as far as they fit into so many lines: uint8 [lines * LINE, width, 3]."""
    canvas = Image.new("RGB", (width, lines * LINE), "white")
    draw = ImageDraw.Draw(canvas)
    x = y = 0
    for name, colour in entries.items():
        extent = 12 + round(draw.textlength(name, font=_font())) + 6
        if x and x + extent > width:
            x, y = 0, y + LINE
        if y + LINE > canvas.height:
            break
        draw.rectangle([x + 1, y + 3, x + 9, y + 11], fill=tuple(int(n) for n in colour))
        draw.text((x + 12, y), name, fill="black", font=_font())
        x += extent
    return np.asarray(canvas)


def segmentation_legend(ids: np.ndarray, names: Sequence[str], width: int, lines: int) -> np.ndarray:
    """The legend of a map int [h, w] coloured by `palette`, its largest areas first."""
    found, counts = np.unique(ids[ids >= 0], return_counts=True)
    order = found[np.argsort(-counts, kind="stable")]
    colours = palette(max(256, int(ids.max()) + 1))
    return legend({name_of(int(i), names): colours[i] for i in order}, width, lines)


def picture(key: str, values: np.ndarray) -> np.ndarray:
    """A batch key's map of one picture, [h, w] or [h, w, c] in the form of the data, as a person sees it."""
    return {"segmentation": segmentation, "depth": depth, "coords": coords}.get(key, coloured)(values)


def text(words: str, height: int, width: int) -> np.ndarray:
    """Words in the middle of a white picture: uint8 [height, width, 3]."""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    lines = [words]
    if draw.textlength(words, font=_font()) > width - 4:
        lines = words.split()
    top = (height - LINE * len(lines)) / 2
    for k, line in enumerate(lines):
        left = max(2.0, (width - draw.textlength(line, font=_font())) / 2)
        draw.text((left, top + k * LINE), line, fill="black", font=_font())
    return np.asarray(canvas)


def captioned(picture: np.ndarray, text: str) -> np.ndarray:
    """A picture with one line of text under it, cut where it does not fit: [h + LINE, w, 3]."""
    strip = Image.new("RGB", (picture.shape[1], LINE), "white")
    ImageDraw.Draw(strip).text((2, 0), text, fill="black", font=_font())
    return np.concatenate([picture, np.asarray(strip)])


def enlarged(picture: np.ndarray, at_least: int) -> np.ndarray:
    """A picture whose pixels are repeated until its short side has so many."""
    times = -(-at_least // min(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture at another size: pixels are repeated where it grows, averaged where it shrinks."""
    grows = height >= picture.shape[0] and width >= picture.shape[1]
    method = Image.Resampling.NEAREST if grows else Image.Resampling.BOX
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), method))


def name_of(index: int, names: Sequence[str]) -> str:
    """A class by its name, or its number where it has none."""
    return names[index] if 0 <= index < len(names) else str(index)


def _label(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    colour: tuple[int, ...],
    size: tuple[int, int],
    taken: list[tuple[float, float, float]],
) -> None:
    """Text on a patch of `colour` inside the picture, moved down past the labels in `taken` (left, top, right)."""
    extent = draw.textlength(text, font=_font()) + 4
    x, top = max(0.0, min(at[0], size[0] - extent)), max(0.0, min(at[1], size[1] - LINE))
    rows = np.arange(top, size[1] - LINE + 1, LINE)
    free = (y for y in rows if all(x >= r or x + extent <= left or abs(y - t) >= LINE - 2 for left, t, r in taken))
    y = next(free, top)
    taken.append((x, y, x + extent))
    draw.rectangle([x, y, x + extent, y + LINE - 2], fill=colour)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
    draw.text((x + 2, y - 1), text, fill="black" if bright else "white", font=_font())


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_SIZE)
