"""Conditions that a person names: one file, a folder of files or a glob, read as the data's own sources read them.

Each file becomes a raw example of `data/source.py` (of JSON perhaps several), so that the data's own transform brings
it to size. Every mistake in a file is one line that names it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vqgan_jax import drawing, storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.data.decoding import IMAGE_SUFFIXES, decode_image
from vqgan_jax.data.pairs import Ids, decode_depth
from vqgan_jax.data.source import CorruptExample, Example
from vqgan_jax.data.stores import is_listed, read_file
from vqgan_jax.images import from_uint8, to_uint8
from vqgan_jax.object_tokens import FLAGS

JSON = (".json",)
_EDGE = 64  # of 255: from here on a pixel of a drawn edge map counts, so that lines survive being shrunk
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the model can take.

    Attributes:
      size: height and width of its pictures.
      segments: ids of segmentation masks are below this; 0: any.
      unlabelled: masks are COCO-Stuff's, where 255 is unlabelled and all ids are one lower than the model's.
      objects: of a layout at most so many.
      names: of the classes of boxes, as far as known.
      box_classes: how many there are.
      flags: of boxes, those that the model tells.
      window: x, y, width and height of the picture in the whole one that `crop_box` and boxes are relative to.
      points: of one person or thing, key points; 0: any number.
    """

    size: tuple[int, int]
    segments: int = 0
    unlabelled: bool = False
    objects: int = 0
    names: Sequence[str] = ()
    box_classes: int = 0
    flags: Sequence[str] = ()
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    points: int = 0


Row = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How files of one batch key are read.

    Attributes:
      suffixes: of the files.
      read: from a file's bytes and its name to raw examples.
      keys: those that the data's transform makes of an example that has a picture's size; others are taken as they are.
      finish: from that to batch arrays.
      resize: the transform's filter for pictures, where it is not the data's.
    """

    suffixes: tuple[str, ...]
    read: Callable[[bytes, str, Expected], list[Example]]
    keys: tuple[str, ...] = ()
    finish: Callable[[Row, Expected], Row] = lambda row, expected: row
    resize: str = ""


class Files:
    """The raw examples of some files, a `Source`; pictures are read when they are asked for, JSON at once and kept.

    Attributes:
      kind: what they are.
      names: of the examples, for people.
      sha256: of all files, in order.
    """

    classes = ()

    def __init__(self, text: str, key: str, kind: Kind, expected: Expected, *, flag: str):
        """Finds and hashes them.

        Args:
          text: a file, a folder or a glob, local or gs://.
          key: the batch key that they give.
          kind: how they are read.
          expected: what the model can take.
          flag: that named them, for errors.

        Raises:
          UserError: there is none, or JSON that is not as it should be.
        """
        self.kind, self._key, self._expected, self._flag = kind, key, expected, flag
        self._items: list[tuple[epath.Path, int]] = []
        self._parsed: dict[epath.Path, list[Example]] = {}
        digest = hashlib.sha256()
        for path in find(text, kind.suffixes, flag):
            digest.update(bytes.fromhex(storage.sha256(path)))
            if path.name.lower().endswith(JSON):
                self._parsed[path] = self._read(path)
            self._items += [(path, number) for number in range(len(self._parsed.get(path, [path])))]
        if not self._items:
            raise UserError(f"{flag}: {text} holds nothing; there is no layout in it")
        self.sha256 = digest.hexdigest()
        many = {path for path, number in self._items if number}
        self.names = [f"{path.name}:{number}" if path in many else path.name for path, number in self._items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        path, number = self._items[index]
        return (self._parsed.get(path) or self._read(path))[number]

    def _read(self, path: epath.Path) -> list[Example]:
        try:
            return self.kind.read(read_file(path), str(path), self._expected)
        except CorruptExample as error:
            raise UserError(f"{self._flag}: {error.path} is no {self._key}: {error.reason}") from None


def find(text: str, suffixes: tuple[str, ...], flag: str) -> list[epath.Path]:
    """The files that a file's name, a folder or a glob means, sorted. Raises UserError that names the flag: none."""
    path = storage.path(text)
    if path.is_dir():
        inside = len(str(path).rstrip("/")) + 1
        found = [file for file in storage.files(path) if is_listed(str(file)[inside:], suffixes)]
    elif path.is_file():
        return [path]
    else:
        parts = str(path).split("/")
        first = next((k for k, part in enumerate(parts) if set(part) & set("*?[")), None)
        if first is None:
            raise UserError(f"{flag}: there is no file and no folder {text}")
        root = storage.path("/".join(parts[:first]) or ("/" if str(path).startswith("/") else "."))
        found = sorted(file for file in root.glob("/".join(parts[first:])) if file.name.lower().endswith(suffixes))
    if not found:
        raise UserError(f"{flag}: no file ({' '.join(suffixes)}) in {text}")
    return found


def _of_size(height: int, width: int, **described: Any) -> Example:
    """An example that no picture belongs to: a transform looks at the picture's size alone."""
    return {"image": np.broadcast_to(np.uint8(0), (height, width, 3)), **described}


def _picture(data: bytes, where: str, expected: Expected) -> list[Example]:
    return [{"image": decode_image(data, where)}]


def _segmentation(data: bytes, where: str, expected: Expected) -> list[Example]:
    ids = Ids(expected.segments, shift=expected.unlabelled)(data, where)
    return [_of_size(*ids.shape, segmentation=ids)]


def _depth(data: bytes, where: str, expected: Expected) -> list[Example]:
    depth = decode_depth(data, where)
    return [_of_size(*depth.shape, depth=depth)]


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: is no JSON ({error})") from None


def _keypoints(data: bytes, where: str, expected: Expected) -> list[Example]:
    """A picture of a skeleton; or as JSON the points of one person, or a list of such lists."""
    if not where.lower().endswith(JSON):
        return _picture(data, where, expected)
    content = _json(data, where)
    wrong = UserError(
        f"{where}: points are [[x, y], null, ...], relative to the picture, null where unseen; or a list of such lists"
    )
    if not isinstance(content, list) or not content:
        raise wrong
    persons = [content] if any(point is None or _are_numbers(point, 2, 3) for point in content) else content
    found = []
    for person in persons:
        if not isinstance(person, list) or not all(point is None or _are_numbers(point, 2, 3) for point in person):
            raise wrong
        points = np.array([[0, 0, 0] if p is None else [*p, 1][:3] for p in person], np.float32).reshape(-1, 3)
        if ((points[:, :2] < 0) | (points[:, :2] > 1)).any():
            raise UserError(f"{where}: holds a point outside the picture; x and y are shares of its sides, 0 to 1")
        if expected.points and len(points) != expected.points:
            raise UserError(
                f"{where}: holds {len(points)} points, the model's data have {expected.points}; null stands for an "
                "unseen one"
            )
        found.append({"points": points})
    return found


def _layouts(data: bytes, where: str, expected: Expected) -> list[Example]:
    """The objects of one picture, or a list of such lists."""
    content = _json(data, where)
    layouts = content if isinstance(content, list) and content and isinstance(content[0], list) else [content]
    found = []
    for layout in layouts:
        if not isinstance(layout, list) or not layout:
            raise UserError(
                f'{where}: a layout is a list of objects such as {{"class": "sun", "box": [x, y, width, height]}}'
            )
        if len(layout) > expected.objects:
            raise UserError(f"{where}: holds {len(layout)} objects, the model takes at most {expected.objects}")
        boxes, classes, flags = zip(*(_object(entry, where, expected) for entry in layout), strict=True)
        arrays = np.array(boxes, np.float32), np.array(classes, np.int32), np.array(flags, np.int32)
        found.append(dict(zip(("boxes", "box_classes", "box_flags"), arrays, strict=True)))
    return found


def _object(entry: Any, where: str, expected: Expected) -> tuple[list[float], int, int]:
    """Box, class and flags of {"class": name or id, "box": [x, y, width, height] or "point": [x, y], "flags": []}."""
    shown = f"{where}: {json.dumps(entry)[:80]}"
    if not isinstance(entry, dict) or "class" not in entry or ("box" in entry) == ("point" in entry):
        raise UserError(f'{shown}: an object has a "class", and a "box" or a "point"')
    if unknown := set(entry) - {"class", "box", "point", "flags"}:
        raise UserError(f"{shown}: unknown key '{min(unknown)}'{suggest(min(unknown), ('class', 'box', 'flags'))}")
    name, box = entry["class"], entry.get("box", entry.get("point"))
    if not _are_numbers(box, 2 if "point" in entry else 4):
        raise UserError(f"{shown}: a box is four numbers x, y, width, height, a point two")
    box = [*map(float, box), 0.0, 0.0][:4]
    if min(box) < 0 or box[0] + box[2] > 1 + _EPSILON or box[1] + box[3] > 1 + _EPSILON:
        raise UserError(f"{shown}: reaches outside the picture; x, y, width, height are shares of its sides, 0 to 1")
    if name in expected.names:
        category = list(expected.names).index(name)
    elif str(name).isdigit() and int(name) < expected.box_classes:
        category = int(name)
    else:
        hint = suggest(str(name), expected.names) if expected.names else ""
        raise UserError(f"{shown}: there is no class '{name}', the ids are 0 to {expected.box_classes - 1}{hint}")
    flags = entry.get("flags", [])
    flags = flags if isinstance(flags, list) else [flags]
    for flag in flags:
        if flag not in expected.flags:
            raise UserError(f"{shown}: this model knows no flag '{flag}'{suggest(str(flag), expected.flags)}")
    return box, category, sum(1 << FLAGS.index(flag) for flag in set(flags))


def _are_numbers(value: Any, *lengths: int) -> bool:
    numbers = isinstance(value, list) and len(value) in lengths
    return numbers and all(isinstance(x, int | float) and not isinstance(x, bool) and np.isfinite(x) for x in value)


def _drawn_edges(row: Row, expected: Expected) -> Row:
    grey = to_uint8(row["image"]).mean(axis=-1, keepdims=True)
    return {"edges": np.where(grey >= _EDGE, np.float32(1), np.float32(-1))}


def _given_points(row: Row, expected: Expected) -> Row:
    pixels = from_uint8(drawing.keypoints(row["points"], *expected.size)) if "points" in row else row["image"]
    return {"keypoints": pixels}


def _given_layout(row: Row, expected: Expected) -> Row:
    """Filled up to as many objects as the model takes, and from the picture that is drawn to the whole one."""
    spare = expected.objects - len(row["boxes"])
    window = np.array(expected.window, np.float32)
    boxes = row["boxes"] * np.tile(window[2:], 2) + np.pad(window[:2], (0, 2))
    return {
        "boxes": np.pad(boxes, ((0, spare), (0, 0))),
        "box_classes": np.pad(row["box_classes"], (0, spare), constant_values=-1),
        "box_flags": np.pad(row["box_flags"], (0, spare)),
        "crop_box": window,
    }


def _mask(row: Row, expected: Expected) -> Row:
    return {"mask": row["image"].mean(axis=-1) > 0}


# What may be given by files, by batch key; "mask" marks in white what is made anew of a given picture.
KINDS = {
    "image": Kind(IMAGE_SUFFIXES, _picture, ("image",)),
    "mask": Kind(IMAGE_SUFFIXES, _picture, ("image",), _mask, "box"),
    "segmentation": Kind(IMAGE_SUFFIXES, _segmentation, ("segmentation",)),
    "depth": Kind(IMAGE_SUFFIXES, _depth, ("depth",)),
    "edges": Kind(IMAGE_SUFFIXES, _picture, ("image",), _drawn_edges, "bilinear"),
    "low_res": Kind(IMAGE_SUFFIXES, _picture, ("image",), lambda row, expected: {"low_res": row["image"]}, "bicubic"),
    "keypoints": Kind((*JSON, *IMAGE_SUFFIXES), _keypoints, ("image",), _given_points),
    "boxes": Kind(JSON, _layouts, (), _given_layout),
}
# And what is derived from photographs, as the data's transform does.
DERIVED = {key: Kind(IMAGE_SUFFIXES, _picture, (key, "image")) for key in ("edges", "low_res")}
