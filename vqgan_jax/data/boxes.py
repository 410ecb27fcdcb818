"""Pictures with boxes of named objects: COCO (things and stuff) and Open Images, as layouts are drawn from them.

Class ids follow the released models (arXiv 2105.06458): categories in the order of their ids as texts.
"""

import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.data.image_files import ImageFiles, decode_at_least
from vqgan_jax.data.source import Example
from vqgan_jax.data.stores import Store, find_file, find_store, read_optional, warn_left_out
from vqgan_jax.data.tables import select
from vqgan_jax.object_tokens import FLAGS

_PERSON = "/m/01s55n"  # of Open Images, the class that the released model has last
_COCO = "{train,val}2017 with the photographs and annotations/{instances,stuff}_{train,val}2017.json"
_OPEN_IMAGES = (
    "{train,validation} with the photographs, class-descriptions-boxable.csv, oidv6-train-annotations-bbox.csv and "
    "validation-annotations-bbox.csv"
)


class Rows:
    """Boxes of many pictures in flat arrays, in any order: what `Boxes` is made from."""

    def __init__(self):
        self.picture, self.box, self.category, self.flags = array("l"), array("f"), array("i"), array("b")

    def add(self, picture: int, box: Iterable[float], category: int, flags: int) -> None:
        """One box (x, y, width, height, relative to the picture) of the picture with this index."""
        self.picture.append(picture)
        self.box.extend(box)
        self.category.append(category)
        self.flags.append(flags)


class Boxes:
    """Pictures with their boxes, clipped to the picture; boxes of which nothing is left are dropped.

    Args:
      store: what holds the pictures.
      names: of the pictures.
      rows: the boxes, by indices of `names`.
      objects: the names of the box classes.
      min_area: share of the picture up to which a box is dropped.
      min_objects: pictures with fewer boxes are left out.
      at_least: see `decode_image`.

    Raises:
      UserError: no picture is left.
    """

    classes = ()

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        rows: Rows,
        objects: tuple[str, ...],
        *,
        min_area: float,
        min_objects: int,
        at_least: int | None,
    ):
        boxes = np.asarray(rows.box, np.float32).reshape(-1, 4)
        finite = np.isfinite(boxes).all(axis=1)
        low, high = np.clip(boxes[:, :2], 0, 1), np.clip(boxes[:, :2] + boxes[:, 2:], 0, 1)
        boxes = np.concatenate([low, high - low], axis=1)
        real = finite & (boxes[:, 2:] > 0).all(axis=1)
        if not real.all():
            logging.warning("%d of %d boxes are empty or outside their picture: dropped", (~real).sum(), len(real))
        real &= boxes[:, 2] * boxes[:, 3] > min_area
        picture = np.asarray(rows.picture, np.int64)
        counts = np.bincount(picture[real], minlength=len(names))
        kept = np.flatnonzero(counts >= min_objects)
        left_out = np.flatnonzero(counts < min_objects)
        warn_left_out([names[i] for i in left_out], f"have fewer boxes than config.data.min_objects={min_objects}")
        if not len(kept):
            raise UserError(f"config.data.min_objects: no picture has {min_objects} boxes of the classes")
        order = np.flatnonzero(real & (counts >= min_objects)[picture])
        order = order[np.argsort(picture[order], kind="stable")]
        self.tables = {"box_classes": objects}
        self._pictures = ImageFiles(store, [names[i] for i in kept], at_least=at_least)
        self._boxes = boxes[order]
        self._box_classes = np.asarray(rows.category, np.int32)[order]
        self._box_flags = np.asarray(rows.flags, np.int32)[order]
        self._starts = np.concatenate([[0], np.cumsum(counts[kept])])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        return self._pictures[index] | self._objects(index)

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures."""
        return self._pictures.names

    def encoded(self, index: int) -> Example:
        """The example with its picture's bytes as "image_bytes" in place of "image"."""
        return self._pictures.encoded(index) | self._objects(index)

    def _objects(self, index: int) -> Example:
        index = range(len(self))[index]
        span = slice(self._starts[index], self._starts[index + 1])
        boxes, classes, flags = self._boxes[span], self._box_classes[span], self._box_flags[span]
        return {"boxes": boxes, "box_classes": classes, "box_flags": flags}


def open_coco(data: ConfigDict, split: str) -> Boxes:
    """Opens `coco`: boxes of things and stuff, without the category "other"; a crowd has the flag "group".

    `config.data.classes` keeps "things", "stuff", or categories by name. The released code tells no crowds, for it asks
    whether the number 1 is the value True.

    Raises:
      UserError: something is missing, or is not COCO's JSON.
    """
    year = f"{split}2017"
    store = find_store(data.path, [year, f"{year}.zip/{year}", f"images/{year}"], _COCO)
    groups, categories, annotations, pictures, skipped = {}, {}, [], {}, set()
    for kind, archive in (("instances", "annotations_trainval2017"), ("stuff", "stuff_annotations_trainval2017")):
        group = {"instances": "things", "stuff": "stuff"}[kind]
        if data.classes in ("things", "stuff") and data.classes != group:
            continue
        name = f"annotations/{kind}_{year}.json"
        file, where = find_file(data.path, [name, f"{archive}.zip/{name}"], _COCO)
        content = _json(file, where)
        new = {category["id"]: category["name"] for category in content["categories"] if category["name"] != "other"}
        skipped |= {category["id"] for category in content["categories"] if category["name"] == "other"}
        groups[group] = list(new)
        categories |= new
        annotations += [(annotation, where) for annotation in content["annotations"]]
        pictures |= {picture["id"]: picture for picture in content["images"]}
    ids = sorted(categories, key=str)
    ranks = {group: [ids.index(category) for category in found] for group, found in groups.items()}
    kept = select(data.classes, [categories[i] for i in ids], ranks)
    rank_of = {ids[rank]: new for new, rank in enumerate(kept)}

    there = set(store.names)
    missing = [picture["file_name"] for picture in pictures.values() if picture["file_name"] not in there]
    warn_left_out(missing, f"are described in the annotations and not in '{store.where('')}'")
    pictures = {i: picture for i, picture in pictures.items() if picture["file_name"] in there}
    index_of = {i: index for index, i in enumerate(pictures)}
    rows, unknown = Rows(), []
    for annotation, where in annotations:
        try:
            picture, category = pictures.get(annotation["image_id"]), annotation["category_id"]
            if picture is None or category not in rank_of:
                unknown += [annotation["id"]] * (category not in categories and category not in skipped)
                continue
            sides = (max(picture["width"], 1), max(picture["height"], 1)) * 2
            box = [n / side for n, side in zip(annotation["bbox"], sides, strict=True)]
            rows.add(index_of[picture["id"]], box, rank_of[category], _flags(group=annotation.get("iscrowd") == 1))
        except (KeyError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise UserError(f"config.data.path: '{where}' has an annotation that is none of COCO's ({told})") from None
    if unknown:
        logging.warning("%d annotations, such as %s, are of no category: dropped", len(unknown), unknown[0])
    names = [picture["file_name"] for picture in pictures.values()]
    return _boxes(data, split, store, names, rows, [categories[ids[rank]] for rank in kept])


def open_open_images(data: ConfigDict, split: str) -> Boxes:
    """Opens `open_images` (v6 and v7): boxes with the flags group, occluded, depiction and inside.

    Beside the official files may lie class-allow-list.txt (the names of classes to keep, one a line) and
    class-merges.csv (id, and the id that it is counted as). Pictures that were not downloaded are left out.

    Raises:
      UserError: something is missing, or a table lacks a column.
    """
    folder = {"train": "train", "val": "validation"}[split]
    store = find_store(data.path, [folder, f"{folder}.tar", f"{folder}.zip/{folder}"], _OPEN_IMAGES)
    found = find_file(
        data.path, ["class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv"], _OPEN_IMAGES
    )
    names = {row[0]: row[1] for row in csv.reader(_lines(found[0])) if len(row) > 1 and row[0] != "LabelName"}
    merges = read_optional(data.path, ["class-merges.csv"])
    merged = {row[0]: row[1] for row in csv.reader(_lines(merges[0])) if len(row) > 1} if merges else {}
    allowed = read_optional(data.path, ["class-allow-list.txt"])
    if allowed:
        allow = set(allowed[0].decode().splitlines())
        names = {i: name for i, name in names.items() if name in allow}
    ids = sorted((i for i in names if i not in merged), key=lambda i: (i == _PERSON, i))
    kept = select(data.classes, [names[i] for i in ids], {})
    rank_of = {ids[rank]: new for new, rank in enumerate(kept)}

    pictures = {name.rsplit("/", 1)[-1].rsplit(".", 1)[0]: name for name in store.names}
    index_of = {i: index for index, i in enumerate(pictures)}
    rows = Rows()
    missing: dict[str, None] = {}
    tables = [f"oidv6-{folder}-annotations-bbox.csv", f"{folder}-annotations-bbox.csv"]
    file, where = find_file(data.path, tables, _OPEN_IMAGES)
    for number, row in enumerate(_csv(file, where), start=2):
        name, category = row["ImageID"], row["LabelName"]
        rank = rank_of.get(merged.get(category, category))
        if name not in index_of:
            missing[name] = None
            continue
        if rank is None:
            continue
        try:
            x, y, right, bottom = (float(row[column]) for column in ("XMin", "YMin", "XMax", "YMax"))
        except (TypeError, ValueError):
            raise UserError(f"config.data.path: line {number} of '{where}' has a box that is no number") from None
        told = {flag: row[column] == "1" for flag, column in _COLUMNS.items()}  # -1 is unknown
        rows.add(index_of[name], (x, y, right - x, bottom - y), rank, _flags(**told))
    warn_left_out(list(missing), f"are described in the annotations and not in '{store.where('')}'")
    return _boxes(data, split, store, list(pictures.values()), rows, [names[ids[rank]] for rank in kept])


_COLUMNS = {"group": "IsGroupOf", "occluded": "IsOccluded", "depiction": "IsDepiction", "inside": "IsInside"}


def _boxes(
    data: ConfigDict, split: str, store: Store, names: Sequence[str], rows: Rows, objects: Sequence[str]
) -> Boxes:
    return Boxes(
        store,
        names,
        rows,
        tuple(objects),
        min_area=data.min_box_area,
        min_objects=data.min_objects,
        at_least=decode_at_least(data, split),
    )


def _flags(**told: bool) -> int:
    return sum(told.get(name, False) << bit for bit, name in enumerate(FLAGS))


def _json(data: bytes, where: str) -> Mapping[str, Any]:
    """COCO's annotations. Raises UserError that names the file and what it lacks."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"config.data.path: '{where}' is no JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"config.data.path: '{where}' has no list '{key}'; COCO's annotations belong there")
    return content


def _csv(data: bytes, where: str) -> Iterator[dict[str, str]]:
    """The rows of a table of boxes. Raises UserError that names the file and a column that it lacks."""
    reader = csv.DictReader(_lines(data))
    needed = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", *_COLUMNS.values())
    lacking = [column for column in needed if column not in (reader.fieldnames or ())]
    if lacking:
        raise UserError(f"config.data.path: '{where}' has no column '{lacking[0]}'; Open Images' boxes belong there")
    return reader


def _lines(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
