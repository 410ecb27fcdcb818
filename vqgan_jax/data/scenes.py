"""The embedded data set: procedural landscapes, each picture a pure function of (seed, index), with its ground truth.

One scene is a painter's pass from far to near over colours, depth and the id of the thing seen at each pixel;
labels, segmentation, depth and boxes all come from that one pass, so they agree. Lengths are in picture heights: the
same scene is drawn at any resolution, and a wider picture of the same height shows more of the land.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TIMES = ("noon", "sunset", "night", "winter")
GROUNDS = ("lake", "meadow")
CLASSES = tuple(f"{time}_{ground}" for time in TIMES for ground in GROUNDS)
SEGMENTATION_CLASSES = (
    "sky",
    "sun",
    "moon",
    "cloud",
    "far_ridge",
    "near_ridge",
    "meadow",
    "lake",
    "tree",
    "house",
)
BOX_CLASSES = ("sun", "moon", "cloud", "tree", "house")

_Field = np.ndarray | float  # a value a pixel: anything that broadcasts to [h, w]
_Profile = Callable[[np.ndarray | float], np.ndarray]  # the height y of a curve above or below each x


def _rgb(*colours: str) -> np.ndarray:
    """Hex colours to float32 [n, 3] in [0, 1]."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours], np.float32) / 255


SEGMENTATION_PALETTE = np.rint(
    _rgb("8fc1ea", "ffd23f", "f4f1da", "ffffff", "8e9fc0", "5f7f86", "86b553", "2f6fa8", "2f6b35", "b5523b") * 255
).astype(np.uint8)


class Palette(NamedTuple):
    """The colours of one time of day, each float32 [3] in [0, 1]; `leaf` and `leaf_shade` are lit and shaded."""

    zenith: np.ndarray
    horizon: np.ndarray
    orb: np.ndarray
    cloud: np.ndarray
    cloud_shade: np.ndarray
    far: np.ndarray
    near: np.ndarray
    grass_far: np.ndarray
    grass_near: np.ndarray
    water: np.ndarray
    leaf: np.ndarray
    leaf_shade: np.ndarray
    trunk: np.ndarray
    wall: np.ndarray
    roof: np.ndarray
    window: np.ndarray


# fmt: off
_PALETTES = {
    "noon": _rgb("3f86d9", "c4e2f2", "fff0a0", "ffffff", "ccdcea", "8aa6c6", "6a9672", "a6c66c", "4a8a38", "3d7fa8",
                 "5aa648", "2c6a34", "6b4a2f", "ecdcbc", "b5523b", "506680"),
    "sunset": _rgb("5b4a8c", "ffb066", "fff2b4", "ffbe9a", "b8708a", "8a5a86", "5d4660", "a8784a", "4a4430", "5a4a7a",
                   "7a6236", "35332c", "3a2a26", "d79a78", "7a3a3a", "ffd98a"),
    "night": _rgb("0b1430", "35507e", "f4f1da", "46598a", "2a3a60", "263a62", "182a42", "28504e", "10282a", "16284c",
                  "22503f", "0c2424", "15161c", "565a74", "40303f", "ffd873"),
    "winter": _rgb("a3b7ca", "e4eaee", "fff8e0", "f6f8fa", "c3ced8", "aebfd0", "879db0", "f0f4f8", "cfdce8", "547a94",
                   "eef3f7", "466660", "5b4a42", "a06c4e", "f2f5f8", "ffd98c"),
}
# fmt: on


def _mix(a: np.ndarray, b: np.ndarray, share: _Field) -> np.ndarray:
    """Colours [3] to planar colours [3, h, w] (as far as `share` reaches): a where share is 0, b where it is 1."""
    return a[:, None, None] + (b - a)[:, None, None] * share


class _Canvas:
    """What has been painted so far: planar colour [3, h, w], depth [h, w], and the id of the thing at each pixel."""

    def __init__(self, height: int, width: int):
        self.height, self.width, self.aspect = height, width, width / height
        self.y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
        self.x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / height
        self.colour = np.zeros((3, height, width), np.float32)
        self.depth = np.ones((height, width), np.float32)
        self.things = np.zeros((height, width), np.int32)
        self.kinds = ["sky"]

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """The share of a pixel that lies inside, from the signed distance to the edge (positive inside)."""
        return np.clip(distance * self.height + 0.5, 0, 1)

    def window(self, x: float, y: float, reach: float, rise: float, drop: float) -> tuple[slice, slice]:
        """Rows and columns of the box from x - reach to x + reach and from y - rise to y + drop, a pixel wider."""

        def span(low: float, high: float, size: int) -> slice:
            return slice(*(min(max(int(edge * self.height), 0), size) for edge in (low - 1 / self.height, high)))

        edge = 2 / self.height
        return span(y - rise, y + drop + edge, self.height), span(x - reach, x + reach + edge, self.width)

    def add(self, kind: str) -> int:
        """A new thing of this kind; its id."""
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def paint(
        self, thing: int, coverage: np.ndarray, colour: np.ndarray, depth: _Field, window: tuple = (slice(None),) * 2
    ):
        """Lays a colour, [3] or planar, over the window as far as coverage goes; above a half the thing owns the pixel."""
        colour = colour[:, None, None] if colour.ndim == 1 else colour
        under = self.colour[:, *window]
        under += coverage * (colour - under)
        own = coverage > 0.5
        np.copyto(self.things[window], thing, where=own)
        np.copyto(self.depth[window], depth, where=own)

    def ground_truth(self) -> dict:
        """Segmentation from the ids, and a box around what can be seen of each thing that has a box class."""
        codes = np.array([SEGMENTATION_CLASSES.index(kind) for kind in self.kinds], np.uint8)
        boxes, box_classes = [], []
        for thing, kind in enumerate(self.kinds):
            if kind not in BOX_CLASSES:
                continue
            seen = self.things == thing
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            if rows.size:
                top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
                boxes.append(
                    (left / self.width, top / self.height, (right - left) / self.width, (bottom - top) / self.height)
                )
                box_classes.append(BOX_CLASSES.index(kind))
        return {
            "segmentation": codes[self.things],
            "depth": self.depth,
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "box_classes": np.array(box_classes, np.int32),
        }


def _profile(rng: np.random.Generator, base: float, rise: float, pitch: float, sharp: bool) -> _Profile:
    """A fractal skyline: octaves of triangle (sharp) or sine waves at random phases, up to `rise` above `base`."""
    octaves = np.arange(4, dtype=np.float32)[:, None]
    phases, frequencies = rng.random((4, 1), np.float32) * 2, pitch * 2.1**octaves
    weights = (0.5 if sharp else 0.36) ** octaves[:, 0]
    weights /= weights.sum()

    def height(x: np.ndarray | float) -> np.ndarray:
        turns = frequencies * np.asarray(x, np.float32).reshape(1, -1) + phases
        waves = np.abs(turns % 2 - 1) if sharp else 0.5 + 0.5 * np.sin(np.pi * turns)
        return base - rise * (weights @ waves)

    return height


def _paint_sky(canvas: _Canvas, rng: np.random.Generator, time: str, colours: Palette, level: float, orb: tuple):
    """The sky's gradient and glow, the sun or moon with nothing before it, and clouds that keep clear of it."""
    x, y, radius = orb
    canvas.colour[:] = _mix(colours.zenith, colours.horizon, np.clip(canvas.y / level, 0, 1) ** 1.3)
    if radius:
        squared = (canvas.x - x) ** 2 + (canvas.y - y) ** 2
        reach, strength = {"noon": (0.2, 0.35), "sunset": (0.3, 0.55), "night": (0.22, 0.3)}[time]
        canvas.colour += strength * np.exp(-squared / reach**2) * (colours.orb[:, None, None] - canvas.colour)
    phase = rng.uniform(0.8, 2.4)
    if radius:
        window = canvas.window(x, y, radius, radius, radius)
        coverage = canvas.cover(radius - np.sqrt(squared[window]))
        if time == "night":  # a crescent: the shadow is a second disc
            shadow = np.hypot(
                canvas.x[:, window[1]] - x - phase * radius, canvas.y[window[0]] - y + 0.4 * phase * radius
            )
            coverage *= 1 - canvas.cover(radius - shadow)
        canvas.paint(canvas.add("moon" if time == "night" else "sun"), coverage, colours.orb, 1.0, window)
    for _ in range(max(1, round(rng.integers(2, 5) * canvas.aspect))):
        cx, cy, size = rng.uniform(0, canvas.aspect), rng.uniform(0.07, 0.28), rng.uniform(0.11, 0.2)
        puffs = rng.random((3, 5), np.float32)
        if radius and abs(cx - x) < radius + 1.1 * size and abs(cy - y) < radius + 0.5 * size:
            continue
        window = canvas.window(cx, cy, 1.3 * size, 0.7 * size, 0.4 * size)
        u, v = (canvas.x[:, window[1]] - cx) / size, (canvas.y[window[0]] - cy) / size
        across = np.linspace(-0.75, 0.75, 5, dtype=np.float32) + 0.2 * (puffs[0] - 0.5)
        tall = (0.2 + 0.16 * puffs[1]) * (1.25 - across**2)
        heap = np.exp(-(((v + 0.5 * tall) / tall) ** 2)) @ np.exp(-(((u.T - across) / 0.3) ** 2)).T
        coverage = 0.9 * np.clip((heap - 0.45) * 2.5, 0, 1) * np.clip((0.22 - v) * 5, 0, 1)
        canvas.paint(
            canvas.add("cloud"),
            coverage,
            _mix(colours.cloud, colours.cloud_shade, np.clip(0.6 + 1.6 * v, 0, 1)),
            0.95,
            window,
        )


def _paint_ridge(canvas: _Canvas, kind: str, profile: _Profile, colours: tuple, depth: float, snow: np.ndarray | None):
    """Mountains: lit and shaded by their slope, hazy at the foot, with snow on the highest part where asked."""
    colour, haze = colours
    top = profile(canvas.x)
    below = canvas.y - top
    slope = profile(canvas.x + 0.02) - profile(canvas.x - 0.02)
    body = _mix(colour, haze, np.clip(below * 2.2, 0, 0.75)) * (1 + np.clip(slope * 4, -0.12, 0.12))
    if snow is not None:
        line = top.min() + 0.07 + 0.05 * np.abs(canvas.x * 14 % 2 - 1)
        body += (
            canvas.cover((line - canvas.y) / 3)
            * 0.8
            * (snow[:, None, None] * (1 + np.clip(slope * 4, -0.12, 0.04)) - body)
        )
    canvas.paint(canvas.add(kind), canvas.cover(below), body, depth)


def _paint_ground(canvas: _Canvas, colours: Palette, top: _Profile, level: float, phase: float):
    """Grass or snow from a curve down to the picture's foot, in broad soft rolls; depth falls with nearness."""
    near = np.clip((canvas.y - level) / (1 - level), 0, 1)
    rolls = 1 + 0.05 * np.sin(9 * np.sqrt(near) + 2.5 * canvas.x + phase)
    body = _mix(colours.grass_far, colours.grass_near, near**0.8) * rolls
    canvas.paint(canvas.add("meadow"), canvas.cover(canvas.y - top(canvas.x)), body, 0.6 * (1 - near))


def _paint_lake(canvas: _Canvas, colours: Palette, level: float, phase: float):
    """Water from the level down: what stands above it, mirrored, drawn out by ripples and tinted with nearness."""
    first = int(level * canvas.height)
    x, y = canvas.x, canvas.y[first:]
    near = np.clip((y - level) / (1 - level), 0, 1)
    ripple = np.sin(28 * np.sqrt(near + 0.02) + 5 * x + phase + np.sin(7 * x - phase))
    source = np.clip((2 * level - y + 0.05 * near * ripple) * canvas.height - 0.5, 0, max(first - 1, 0))
    row = source.astype(np.int32)
    column = np.arange(canvas.width)
    upper, lower = canvas.colour[:, row, column], canvas.colour[:, np.minimum(row + 1, canvas.height - 1), column]
    mirrored = upper + (source - row) * (lower - upper)
    body = mirrored + (0.25 + 0.3 * near) * (colours.water[:, None, None] - mirrored)
    body *= 1 + 0.05 * ripple * near
    canvas.paint(canvas.add("lake"), canvas.cover(y - level), body, 0.6 * (1 - near), (slice(first, None), slice(None)))


def _paint_tree(
    canvas: _Canvas, colours: Palette, x: float, foot: float, size: float, conifer: bool, light: float, depth: float
):
    """A tree of height `size` that stands at (x, foot): a trunk under three tiers or under a round crown."""
    window = canvas.window(x, foot, 0.4 * size, size, 0.0)
    u, v = (canvas.x[:, window[1]] - x) / size, (foot - canvas.y[window[0]]) / size  # v: 0 at the foot, 1 at the top
    if conifer:
        fall = np.clip((1 - v) / 0.86, 0, 1)  # 0 at the top, 1 at the lowest branches
        tier = fall * 3 % 1
        reach = 0.3 * fall * (0.62 + 0.38 * tier)
        crown = np.minimum((reach - np.abs(u)) * 0.9, np.minimum(v - 0.14, 1 - v))
        lit = 0.55 * tier + 0.25 + 1.2 * light * u
    else:
        crown = np.maximum(0.29 - np.hypot(u, v - 0.7), 0.2 - np.hypot(np.abs(u) - 0.17, v - 0.56))
        lit = 0.5 + 1.3 * light * u + 1.1 * (v - 0.66)
    thing = canvas.add("tree")
    trunk = np.minimum(0.045 - np.abs(u), np.minimum(v, 0.5 - v))
    canvas.paint(thing, canvas.cover(trunk * size), colours.trunk, depth, window)
    canvas.paint(
        thing, canvas.cover(crown * size), _mix(colours.leaf_shade, colours.leaf, np.clip(lit, 0, 1)), depth, window
    )


def _paint_house(canvas: _Canvas, colours: Palette, x: float, foot: float, size: float, light: float, depth: float):
    """A house of height `size` that stands at (x, foot): wall, gabled roof with eaves, a door between two windows."""
    window = canvas.window(x, foot, 0.9 * size, size, 0.0)
    u, v = np.abs(canvas.x[:, window[1]] - x) / size, (foot - canvas.y[window[0]]) / size
    thing = canvas.add("house")

    def part(shape: np.ndarray, colour: np.ndarray):
        canvas.paint(thing, canvas.cover(shape * size), colour, depth, window)

    def box(middle: float, half: float, low: float, high: float) -> np.ndarray:
        return np.minimum(half - np.abs(u - middle), np.minimum(v - low, high - v))

    part(box(0, 0.62, 0, 0.56), colours.wall)
    part(np.minimum(np.minimum(v - 0.5, 1 - v), (0.82 - 0.6 * (v - 0.5) / 0.5 - u) * 0.7), colours.roof)
    part(box(0, 0.12, 0, 0.38), colours.trunk)
    part(box(0.38, 0.1, 0.2, 0.38), colours.window)


def render(seed: int, index: int, height: int = 64, width: int = 64) -> dict:
    """Draws scene `index` of the stream `seed` at any size; the same aspect gives the same scene.

    Returns:
        image: uint8 [h, w, 3].
        label: int into CLASSES, drawn uniformly.
        segmentation: uint8 [h, w] into SEGMENTATION_CLASSES.
        depth: float32 [h, w], 0 (at the viewer) to 1 (sky), ordered by distance but not metric.
        boxes: float32 [n, 4] of (x, y, width, height) relative to the picture, around what is seen of each thing.
        box_classes: int32 [n] into BOX_CLASSES.
    """
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    label = int(rng.integers(len(CLASSES)))
    time, ground = CLASSES[label].split("_")
    base = _PALETTES[time]
    colours = Palette(
        *np.clip(base * rng.uniform(0.92, 1.08) + rng.uniform(-0.03, 0.03, base.shape).astype(np.float32), 0, 1)
    )
    canvas = _Canvas(height, width)

    level = rng.uniform(0.52, 0.6)  # the horizon
    near_side, phase = rng.integers(2), rng.uniform(0, 6)
    far = _profile(rng, level - 0.06, rng.uniform(0.2, 0.36), rng.uniform(1.2, 1.8), sharp=True)
    near = _profile(rng, level, rng.uniform(0.1, 0.18), rng.uniform(0.8, 1.3), sharp=False)

    def nearness(x):  # one side of a square picture is close to the viewer, the other far; it alternates in a panorama
        return 0.5 + 0.5 * np.cos(np.pi * (x - near_side))

    # The sun keeps to the far side, where no tall tree stands.
    orb_x = min(rng.uniform(0.14, 0.86, 3) * canvas.aspect, key=nearness)
    radius = {
        "noon": rng.uniform(0.07, 0.085),
        "sunset": rng.uniform(0.085, 0.11),
        "night": rng.uniform(0.07, 0.09),
        "winter": 0.0,
    }[time]
    skyline = min(far(orb_x)[0], near(orb_x)[0])
    orb_y = skyline - rng.uniform(0, 1) * radius if time == "sunset" else rng.uniform(0.13, 0.2)
    light = 1.0 if orb_x > canvas.aspect / 2 else -1.0

    _paint_sky(canvas, rng, time, colours, level, (orb_x, orb_y, radius))
    snow = colours.cloud if time in ("noon", "winter") else None
    _paint_ridge(canvas, "far_ridge", far, (colours.far, colours.horizon), 0.85, snow)
    _paint_ridge(canvas, "near_ridge", near, (colours.near, 0.5 * (colours.near + colours.grass_far)), 0.7, None)
    _paint_ground(canvas, colours, _profile(rng, level, 0.03, 0.7, sharp=False), level, phase)

    edge = _profile(rng, 0.0, 0.04, 1.1, sharp=False)

    def bank(x):  # where the near shore of a lake begins
        return 0.96 - 0.2 * nearness(x) + edge(x)

    slots = max(2, round(4.5 * canvas.aspect))
    things = []
    homestead = rng.integers(slots) if rng.random() < 0.7 else -1
    for slot in range(slots):
        x = (slot + rng.uniform(0.25, 0.75)) / slots * canvas.aspect
        jitter, stature, kind = rng.random(3)
        if ground == "lake":
            foot = min(bank(x)[0] + 0.02 + 0.06 * jitter, 0.97) if nearness(x) > 0.55 else level
        else:
            foot = level + (1 - level) * (0.06 + 0.6 * nearness(x) + 0.2 * jitter)
        closeness = (foot - level) / (1 - level)
        size = 0.15 + (0.28 + 0.1 * stature) * closeness
        house = slot == homestead
        if house or kind < 0.85 and (abs(x - orb_x) > radius + 0.3 * size):
            things.append((foot, x, size, house, time == "winter" or stature < 0.5))
    things.sort()

    def place(things):
        for foot, x, size, house, conifer in things:
            depth = 0.6 * (1 - (foot - level) / (1 - level))
            if house:
                _paint_house(canvas, colours, x, foot, 0.02 + 0.62 * size, light, depth)
            else:
                _paint_tree(canvas, colours, x, foot, size, conifer, light, depth)

    place([thing for thing in things if thing[0] <= level])
    if ground == "lake":
        _paint_lake(canvas, colours, level, phase)
        _paint_ground(canvas, colours, bank, level, phase)
    place([thing for thing in things if thing[0] > level])

    pixels = np.ascontiguousarray(np.rint(np.clip(canvas.colour, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
    return {"image": pixels, "label": label, **canvas.ground_truth()}
