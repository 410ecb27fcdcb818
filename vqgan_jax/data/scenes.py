"""The embedded data set: procedural landscapes, each a pure function of (seed, index), with their ground truth.

A scene is one painter's pass from far to near over colour, depth and the id of the thing seen at each pixel: its
segmentation, depth and boxes come from that same pass, so they agree. Lengths are in picture heights: the same scene
is drawn at any resolution, and a wider picture of the same height shows more of the land.
"""

from collections import namedtuple
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vqgan_jax.data import scene_points


class _Time(NamedTuple):
    """What sets a time of day, or the winter, apart besides its colours."""

    orb: str | None  # what stands in the sky
    radius: tuple[float, float] = (0.0, 0.0)  # of the orb: smallest, largest
    glow: tuple[float, float] = (0.0, 0.0)  # around the orb: reach, strength
    snow: bool = False  # on the far ridge


_TIMES = {
    "noon": _Time("sun", radius=(0.07, 0.085), glow=(0.2, 0.35), snow=True),
    "sunset": _Time("sun", radius=(0.085, 0.11), glow=(0.3, 0.55)),
    "night": _Time("moon", radius=(0.07, 0.09), glow=(0.22, 0.3)),
    "winter": _Time(None, snow=True),
}
_GROUNDS = ("lake", "meadow")
CLASSES = tuple(f"{time}_{ground}" for time in _TIMES for ground in _GROUNDS)
BOX_CLASSES = ("sun", "moon", "cloud", "tree", "house")

_Profile = Callable[[np.ndarray | float], np.ndarray]  # the height y of a curve at each x


def _rgb(colours: str) -> np.ndarray:
    """Hex colours parted by spaces to float32 [n, 3] in [0, 1]."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.float32) / 255


_SEGMENTATION = {
    "sky": "8fc1ea",
    "sun": "ffd23f",
    "moon": "f4f1da",
    "cloud": "ffffff",
    "far_ridge": "8e9fc0",
    "near_ridge": "5f7f86",
    "meadow": "86b553",
    "lake": "2f6fa8",
    "tree": "2f6b35",
    "house": "b5523b",
}
SEGMENTATION_CLASSES = tuple(_SEGMENTATION)
SEGMENTATION_PALETTE = np.rint(_rgb(" ".join(_SEGMENTATION.values())) * 255).astype(np.uint8)


_COLOURS = {  # one column a time, in the order of _TIMES
    "zenith": _rgb("3f86d9 5b4a8c 0b1430 a3b7ca"),
    "horizon": _rgb("c4e2f2 ffb066 35507e e4eaee"),
    "orb": _rgb("fff0a0 fff2b4 f4f1da fff8e0"),
    "cloud": _rgb("ffffff ffbe9a 46598a f6f8fa"),
    "cloud_shade": _rgb("ccdcea b8708a 2a3a60 c3ced8"),
    "far_ridge": _rgb("8aa6c6 8a5a86 263a62 aebfd0"),
    "near_ridge": _rgb("6a9672 5d4660 182a42 879db0"),
    "grass_far": _rgb("a6c66c a8784a 28504e f0f4f8"),
    "grass_near": _rgb("4a8a38 4a4430 10282a cfdce8"),
    "water": _rgb("3d7fa8 5a4a7a 16284c 547a94"),
    "leaf": _rgb("5aa648 7a6236 22503f eef3f7"),
    "leaf_shade": _rgb("2c6a34 35332c 0c2424 466660"),
    "wood": _rgb("6b4a2f 3a2a26 15161c 5b4a42"),
    "wall": _rgb("ecdcbc d79a78 565a74 a06c4e"),
    "roof": _rgb("b5523b 7a3a3a 40303f d3deec"),
    "window": _rgb("506680 ffd98a ffd873 ffd98c"),
}
_TABLE = np.stack(list(_COLOURS.values()), 1)  # [times, colours, 3]
_Palette = namedtuple("_Palette", _COLOURS)  # the colours of one scene, float32 [3] in [0, 1]


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Two colours [3] to a planar one [3, h or 1, w or 1]: a where the share [h or 1, w or 1] is 0, b where it is 1."""
    return a[:, None, None] + (b - a)[:, None, None] * share


class _Canvas:
    """What is painted so far: planar colour [3, h, w], depth [h, w], and the id of the thing seen at each pixel."""

    def __init__(self, height: int, width: int):
        self.height, self.width, self.aspect = height, width, width / height
        self.y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
        self.x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / height
        self.colour = np.zeros((3, height, width), np.float32)
        self.depth = np.ones((height, width), np.float32)
        self.things = np.zeros((height, width), np.int32)
        self.kinds = ["sky"]

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """The share of a pixel that lies inside, from the distance to the edge in picture heights (positive inside)."""
        return np.clip(distance * self.height + 0.5, 0, 1)

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """The rows and columns that hold this box, as far as it lies in the picture."""

        def span(low: float, high: float, size: int) -> slice:
            first, last = int(low * self.height) - 1, int(high * self.height) + 2
            return slice(min(max(first, 0), size), min(max(last, 0), size))

        return span(top, bottom, self.height), span(left, right, self.width)

    def add(self, kind: str) -> int:
        """A new thing of this kind (of SEGMENTATION_CLASSES); its id."""
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def paint(
        self,
        thing: int,
        coverage: np.ndarray,
        colour: np.ndarray,
        depth: np.ndarray | float,
        window: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> None:
        """Lays a colour, [3] or planar, over the window; the thing owns the pixels that it covers more than half."""
        under = self.colour[:, *window]
        under += coverage * ((colour[:, None, None] if colour.ndim == 1 else colour) - under)
        own = coverage > 0.5
        np.copyto(self.things[window], thing, where=own)
        np.copyto(self.depth[window], depth, where=own)

    def ground_truth(self) -> dict[str, np.ndarray]:
        """Segmentation, depth, and a box around what can be seen of each thing that has a box class."""
        codes = np.array([SEGMENTATION_CLASSES.index(kind) for kind in self.kinds], np.uint8)
        boxes, box_classes = [], []
        for thing, kind in enumerate(self.kinds):
            if kind not in BOX_CLASSES:
                continue
            seen = self.things == thing
            rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            if rows.size:
                boxes.append((columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]))
                box_classes.append(BOX_CLASSES.index(kind))
        size = np.array([self.width, self.height] * 2, np.float32)
        return {
            "segmentation": codes[self.things],
            "depth": self.depth,
            "boxes": np.array(boxes, np.float32).reshape(-1, 4) / size,
            "box_classes": np.array(box_classes, np.int32),
        }


def _fractal(rng: np.random.Generator, base: float, rise: float, pitch: float, sharp: bool) -> _Profile:
    """A skyline up to `rise` above `base`: octaves of triangle (sharp) or sine waves at random phases."""
    octaves = np.arange(4, dtype=np.float32)
    phases, frequencies = 2 * rng.random(4, np.float32), pitch * 2.1**octaves
    weights = (0.5 if sharp else 0.36) ** octaves
    weights *= rise / weights.sum()

    def height(x: np.ndarray | float) -> np.ndarray:
        turns = np.asarray(x, np.float32)[..., None] * frequencies + phases
        waves = np.abs(turns % 2 - 1) if sharp else 0.5 + 0.5 * np.sin(np.pi * turns)
        return base - (waves * weights).sum(-1)

    return height


class _Orb(NamedTuple):
    """Where the sun or the moon stands; radius 0 where there is none."""

    x: float
    y: float
    radius: float


def _paint_orb(canvas: _Canvas, time: _Time, colours: _Palette, orb: _Orb, moon: float) -> None:
    """The sun or the moon in its glow; `moon` is how far its shadow, a second disc, is off, in radii."""
    reach, strength = time.glow
    squared = (canvas.x - orb.x) ** 2 + (canvas.y - orb.y) ** 2
    canvas.colour += strength * np.exp(-squared / reach**2) * (colours.orb[:, None, None] - canvas.colour)
    window = canvas.window(orb.x - orb.radius, orb.y - orb.radius, orb.x + orb.radius, orb.y + orb.radius)
    coverage = canvas.cover(orb.radius - np.sqrt(squared[window]))
    if time.orb == "moon":
        away = moon * orb.radius
        shadow = np.hypot(canvas.x[:, window[1]] - orb.x - away, canvas.y[window[0]] - orb.y + 0.4 * away)
        coverage *= 1 - canvas.cover(orb.radius - shadow)
    canvas.paint(canvas.add(time.orb), coverage, colours.orb, 1.0, window)


def _paint_cloud(canvas: _Canvas, rng: np.random.Generator, colours: _Palette, orb: _Orb) -> None:
    """A heap of five soft puffs on a flat base, unless it would hide the sun or the moon."""
    x, y, size = rng.uniform(0, canvas.aspect), rng.uniform(0.07, 0.28), rng.uniform(0.11, 0.2)
    puffs = rng.random((2, 5), np.float32)
    if orb.radius and abs(x - orb.x) < orb.radius + 1.1 * size and abs(y - orb.y) < orb.radius + 0.5 * size:
        return
    window = canvas.window(x - 1.3 * size, y - 0.7 * size, x + 1.3 * size, y + 0.4 * size)
    u, v = (canvas.x[0, window[1]] - x) / size, (canvas.y[window[0]] - y) / size
    middle = np.linspace(-0.75, 0.75, 5, dtype=np.float32) + 0.2 * (puffs[0] - 0.5)
    tall = (0.2 + 0.16 * puffs[1]) * (1.25 - middle**2)
    heap = np.exp(-((v / tall + 0.5) ** 2)) @ np.exp(-(((u - middle[:, None]) / 0.3) ** 2))
    coverage = 0.9 * np.clip((heap - 0.45) * 2.5, 0, 1) * np.clip((0.22 - v) * 5, 0, 1)
    body = _mix(colours.cloud, colours.cloud_shade, np.clip(0.6 + 1.6 * v, 0, 1))
    canvas.paint(canvas.add("cloud"), coverage, body, 0.95, window)


def _paint_ridge(
    canvas: _Canvas,
    kind: str,
    top: _Profile,
    colour: np.ndarray,
    haze: np.ndarray,
    depth: float,
    snow: np.ndarray | None = None,
) -> None:
    """A mountain range, lighter on the slopes that face left, hazy at its foot, with snow on its peaks if given."""
    skyline = top(canvas.x)
    below = canvas.y - skyline
    facing = 1 + np.clip(1.2 * (top(canvas.x + 0.05) - top(canvas.x - 0.05)), -0.1, 0.1)
    body = _mix(colour, haze, np.clip(below * 2.2, 0, 0.75))
    if snow is not None:
        line = skyline.min() + 0.07 + 0.05 * np.abs(canvas.x * 14 % 2 - 1)
        body += 0.8 * canvas.cover((line - canvas.y) / 3) * (snow[:, None, None] - body)  # / 3: a soft edge
    canvas.paint(canvas.add(kind), canvas.cover(below), body * facing, depth)


class _Land(NamedTuple):
    """The ground plane below the horizon; nearness runs from 0 at the horizon to 1 at the picture's lower edge."""

    horizon: float
    phase: float  # of its rolls and ripples

    def nearness(self, y: np.ndarray | float) -> np.ndarray:
        return np.clip((y - self.horizon) / (1 - self.horizon), 0, 1)

    def depth(self, y: np.ndarray | float) -> np.ndarray:
        return 0.6 * (1 - self.nearness(y))


def _paint_meadow(canvas: _Canvas, colours: _Palette, land: _Land, top: _Profile) -> None:
    """Grass, or snow, from a curve down to the lower edge, in broad soft rolls."""
    near = land.nearness(canvas.y)
    rolls = 1 + 0.05 * np.sin(9 * np.sqrt(near) + 2.5 * canvas.x + land.phase)
    body = _mix(colours.grass_far, colours.grass_near, near**0.8) * rolls
    canvas.paint(canvas.add("meadow"), canvas.cover(canvas.y - top(canvas.x)), body, land.depth(canvas.y))


def _paint_lake(canvas: _Canvas, colours: _Palette, land: _Land) -> None:
    """Water below the horizon: what is painted above, mirrored, bent by ripples and tinted the more the nearer."""
    first = int(land.horizon * canvas.height)
    x, y = canvas.x, canvas.y[first:]
    near = land.nearness(y)
    ripple = np.sin(28 * np.sqrt(near + 0.02) + 5 * x + land.phase + np.sin(7 * x - land.phase))
    source = (2 * land.horizon - y + 0.05 * near * ripple) * canvas.height - 0.5
    source = np.clip(source, 0, max(first - 1, 0))
    row, column = source.astype(np.int32), np.arange(canvas.width)
    upper, lower = canvas.colour[:, row, column], canvas.colour[:, np.minimum(row + 1, canvas.height - 1), column]
    body = upper + source % 1 * (lower - upper)
    body += (0.3 + 0.3 * near) * (colours.water[:, None, None] - body)
    body *= 1 + 0.05 * near * ripple
    window = (slice(first, None), slice(None))
    canvas.paint(canvas.add("lake"), canvas.cover(y - land.horizon), body, land.depth(y), window)


class _Stand(NamedTuple):
    """Something that stands on the ground at (x, foot), `size` high; sorted, they come far before near."""

    foot: float
    x: float
    size: float
    kind: str  # "conifer", "broadleaf" or "house"


def _paint_tree(canvas: _Canvas, colours: _Palette, stand: _Stand, depth: float, light: float) -> None:
    """A trunk under the three tiers of a conifer or the round crown of a broadleaf; lit from the side of `light`."""
    foot, x, size, kind = stand
    window = canvas.window(x - 0.4 * size, foot - size, x + 0.4 * size, foot)
    u, v = (canvas.x[:, window[1]] - x) / size, (foot - canvas.y[window[0]]) / size  # v: 0 at the foot, 1 at the top
    if kind == "conifer":
        fall = np.clip((1 - v) / 0.86, 0, 1)  # 0 at the top, 1 at the lowest branches
        tier = fall * 3 % 1
        reach = 0.3 * fall * (0.62 + 0.38 * tier)
        crown = np.minimum((reach - np.abs(u)) * 0.9, np.minimum(v - 0.14, 1 - v))
        lit = 0.25 + 0.55 * tier + 1.2 * light * u
    else:
        crown = np.maximum(0.29 - np.hypot(u, v - 0.7), 0.2 - np.hypot(np.abs(u) - 0.17, v - 0.56))
        lit = 0.5 + 1.1 * (v - 0.66) + 1.3 * light * u
    trunk = np.minimum(0.055 - np.abs(u), np.minimum(v, 0.5 - v))
    leaves = _mix(colours.leaf_shade, colours.leaf, np.clip(lit, 0, 1))
    thing = canvas.add("tree")
    canvas.paint(thing, canvas.cover(trunk * size), colours.wood, depth, window)
    canvas.paint(thing, canvas.cover(crown * size), leaves, depth, window)


def _paint_house(canvas: _Canvas, colours: _Palette, stand: _Stand, depth: float) -> None:
    """A wall with a door between two windows, under a hipped roof with eaves."""
    foot, x, size, _ = stand
    window = canvas.window(x - 0.9 * size, foot - size, x + 0.9 * size, foot)
    u, v = np.abs(canvas.x[:, window[1]] - x) / size, (foot - canvas.y[window[0]]) / size

    def block(middle: float, half: float, low: float, high: float) -> np.ndarray:
        return np.minimum(half - np.abs(u - middle), np.minimum(v - low, high - v))

    thing = canvas.add("house")
    roof = np.minimum(np.minimum(v - 0.5, 1 - v), 0.7 * (0.82 - 1.2 * (v - 0.5) - u))
    for shape, colour in (
        (block(0, 0.62, 0, 0.56), colours.wall),
        (roof, colours.roof),
        (block(0, 0.12, 0, 0.38), colours.wood),
        (block(0.38, 0.1, 0.2, 0.38), colours.window),
    ):
        canvas.paint(thing, canvas.cover(shape * size), colour, depth, window)


def _generator(seed: int, index: int) -> np.random.Generator:
    """Of everything in a scene."""
    return np.random.Generator(np.random.PCG64([seed, index]))


def _draw_label(rng: np.random.Generator) -> int:
    return int(rng.integers(len(CLASSES)))


def label_of(seed: int, index: int) -> int:
    """The label of scene `index`, into CLASSES, without drawing the scene."""
    return _draw_label(_generator(seed, index))


def render(seed: int, index: int, height: int = 64, width: int = 64) -> dict:
    """Draws scene `index` >= 0 of the stream `seed` >= 0 at any size; equal aspects give the same scene.

    Returns a dict of:
        image: uint8 [h, w, 3].
        label: int into CLASSES, drawn uniformly.
        segmentation: uint8 [h, w] into SEGMENTATION_CLASSES.
        depth: float32 [h, w], 0 (at the viewer) to 1 (sky); ordered by distance, not metric.
        boxes: float32 [n, 4], x, y, width and height relative to the picture, around what is seen of each thing.
        box_classes: int32 [n] into BOX_CLASSES.
        keypoints: float32 [n, 3], x, y and whether it is seen, see scene_points.py; keypoints_mirrored: int32 [n].
    """
    rng = _generator(seed, index)
    label = _draw_label(rng)
    name, ground = CLASSES[label].split("_")
    time, table = _TIMES[name], _TABLE[list(_TIMES).index(name)]
    tint = rng.uniform(-0.03, 0.03, table.shape).astype(np.float32)
    colours = _Palette(*np.clip(table * rng.uniform(0.92, 1.08) + tint, 0, 1))
    canvas = _Canvas(height, width)

    land = _Land(rng.uniform(0.52, 0.6), rng.uniform(0, 6))
    far = _fractal(rng, land.horizon - 0.06, rng.uniform(0.18, 0.3), rng.uniform(1.2, 1.8), sharp=True)
    near = _fractal(rng, land.horizon, rng.uniform(0.1, 0.18), rng.uniform(0.8, 1.3), sharp=False)
    shore = _fractal(rng, land.horizon, 0.03, 0.7, sharp=False)
    waver = _fractal(rng, 0.96, 0.04, 1.1, sharp=False)
    near_side = int(rng.integers(2))

    def closeness(x):  # one side of a square picture is near, the other far; a panorama goes back and forth
        return 0.5 + 0.5 * np.cos(np.pi * (x - near_side))

    def bank(x):  # where a lake ends and the near shore begins
        return waver(x) - 0.2 * closeness(x)

    # Sun and moon keep to the far side, where no tall tree stands; the sun sets behind the ridges.
    orb_x = float(min(rng.uniform(0.14, 0.86, 3) * canvas.aspect, key=closeness))
    radius = rng.uniform(*time.radius)
    skyline = float(min(far(orb_x), near(orb_x)))
    low, high = skyline - rng.uniform(0, 1) * radius, min(rng.uniform(0.13, 0.2), skyline - 1.3 * radius)
    orb = _Orb(orb_x, low if name == "sunset" else high, radius)

    canvas.colour[:] = _mix(colours.zenith, colours.horizon, np.clip(canvas.y / land.horizon, 0, 1) ** 1.3)
    moon = (0.85, 1.15, 3.0)[rng.integers(3)]
    if time.orb:
        _paint_orb(canvas, time, colours, orb, moon)
    for _ in range(max(1, round(rng.integers(2, 5) * canvas.aspect))):
        _paint_cloud(canvas, rng, colours, orb)
    snow = colours.cloud if time.snow else None
    _paint_ridge(canvas, "far_ridge", far, colours.far_ridge, colours.horizon, 0.85, snow)
    _paint_ridge(canvas, "near_ridge", near, colours.near_ridge, 0.5 * (colours.near_ridge + colours.grass_far), 0.7)
    _paint_meadow(canvas, colours, land, shore)

    stands = []
    slots = scene_points.slots(canvas.aspect)
    homestead = rng.integers(slots) if rng.random() < 0.7 else None
    for slot in range(slots):
        x = (slot + rng.uniform(0.25, 0.75)) / slots * canvas.aspect
        shift, stature, chance = rng.random(3).tolist()
        if ground == "meadow":
            foot = land.horizon + (1 - land.horizon) * (0.06 + 0.6 * closeness(x) + 0.2 * shift)
        else:
            foot = min(bank(x) + 0.02 + 0.06 * shift, 0.97) if closeness(x) > 0.55 else land.horizon
        size = 0.15 + (0.28 + 0.1 * stature) * float(land.nearness(foot))
        if slot == homestead:
            stands.append(_Stand(float(foot), x, 0.02 + 0.62 * size, "house"))
        elif chance < 0.85 and abs(x - orb.x) > orb.radius + 0.3 * size:
            conifer = name == "winter" or stature < 0.5
            stands.append(_Stand(float(foot), x, size, "conifer" if conifer else "broadleaf"))

    water = ground == "lake"
    light = 1.0 if orb.x > canvas.aspect / 2 else -1.0
    for stand in sorted(stands):
        if water and stand.foot > land.horizon:  # all that the lake mirrors is painted
            _paint_lake(canvas, colours, land)
            _paint_meadow(canvas, colours, land, bank)
            water = False
        depth = float(land.depth(stand.foot))
        if stand.kind == "house":
            _paint_house(canvas, colours, stand, depth)
        else:
            _paint_tree(canvas, colours, stand, depth, light)
    if water:
        _paint_lake(canvas, colours, land)
        _paint_meadow(canvas, colours, land, bank)

    pixels = np.rint(np.clip(canvas.colour, 0, 1) * 255).astype(np.uint8)
    truth = canvas.ground_truth()
    ridges = {"far_ridge": far, "near_ridge": near}
    points = scene_points.of_scene(
        truth["segmentation"], SEGMENTATION_CLASSES, orb=orb[:2], ridges=ridges, stands=stands, slots=slots
    )
    mirrored = scene_points.mirrored(slots)
    image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return {"image": image, "label": label, **truth, "keypoints": points, "keypoints_mirrored": mirrored}
