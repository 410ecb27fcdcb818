"""Key points of an embedded scene, a slot each: the sun or moon, both ridges' peaks, the corners of the house, and the
tops and feet of the trees, whose slots go from left to right."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

_FIXED = ("orb", "far_ridge", "near_ridge", "house left", "house right", "house top")  # slots before the trees'


class Stand(Protocol):
    """A tree or a house that stands at (x, foot), `size` high; lengths in picture heights."""

    x: float
    foot: float
    size: float
    kind: str  # "house", or one of tree


def slots(aspect: float) -> int:
    """Equal parts of a picture's width, of which each holds at most one tree or house."""
    return max(2, round(4.5 * aspect))


def names(slots: int) -> tuple[str, ...]:
    """What each point is."""
    return _FIXED + tuple(f"tree {slot} {end}" for end in ("top", "foot") for slot in range(slots))


def of_scene(
    segmentation: np.ndarray,
    kinds: Sequence[str],
    *,
    orb: tuple[float, float],
    ridges: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    stands: Iterable[Stand],
    slots: int,
) -> np.ndarray:
    """The points of a scene.

    Args:
      segmentation: uint8 [h, w] into `kinds`.
      kinds: of things.
      orb: (x, y) of the centre of the sun or moon, if there is one.
      ridges: the height y of their skylines at each x.
      stands: at most one in each of `slots` equal parts of the picture's width.
      slots: parts.

    Returns:
      float32 [6 + 2 * slots, 3]: x and y relative to the picture and 1, or zeros where it does not show that thing.
    """
    height, width = segmentation.shape
    points = np.zeros((len(_FIXED) + 2 * slots, 3), np.float32)

    def put(slot: int, kind: str, x: float, y: float, inside: tuple[float, float]) -> None:
        """The point (x, y), if the picture shows its thing at `inside`, which is not at the thing's edge."""
        column, row = (int(n * height) for n in inside)
        inside_picture = 0 <= row < height and 0 <= column < width and 0 <= x * height <= width and 0 <= y <= 1
        if inside_picture and kinds[segmentation[row, column]] == kind:
            points[slot] = x * height / width, y, 1

    if np.isin(segmentation, [kinds.index("sun"), kinds.index("moon")]).any():  # a crescent's centre is dark
        points[0] = orb[0] * height / width, orb[1], 1
    across = (np.arange(width) + 0.5) / height
    for slot, (kind, top) in enumerate(ridges.items(), 1):
        peak = int(top(across).argmin())
        x, y = float(across[peak]), float(top(across)[peak])
        put(slot, kind, x, y, (x, y + 0.02))
    for stand in stands:
        x, foot, size = stand.x, stand.foot, stand.size
        low, high = foot - 0.1 * size, foot - 0.7 * size
        if stand.kind == "house":
            put(3, "house", x - 0.62 * size, foot, (x - 0.5 * size, low))
            put(4, "house", x + 0.62 * size, foot, (x + 0.5 * size, low))
            put(5, "house", x, foot - size, (x, high))
        else:
            slot = len(_FIXED) + int(x * slots * height / width)
            put(slot, "tree", x, foot - size, (x, high))
            put(slot + slots, "tree", x, foot, (x, low))
    return points


def mirrored(slots: int) -> np.ndarray:
    """Which point each is in a mirrored picture, int32 [6 + 2 * slots]."""
    backwards = np.arange(slots)[::-1]
    return np.concatenate([[0, 1, 2, 4, 3, 5], 6 + backwards, 6 + slots + backwards]).astype(np.int32)
