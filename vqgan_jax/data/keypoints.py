"""DeepFashion's persons with key points: the 18 joints of pose transfer, or the landmarks of the clothes."""

import csv
import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.data.image_files import ImageFiles
from vqgan_jax.data.source import Example
from vqgan_jax.data.stores import find_file, find_store, read_optional, warn_left_out

_LAYOUT = (
    "fasion-resize-annotation-{train,test}.csv with the folders train and test, or Anno/list_landmarks_inshop.txt and "
    "Eval/list_eval_partition.txt with the folder img"
)
JOINTS = (
    "nose, neck, right shoulder, right elbow, right wrist, left shoulder, left elbow, left wrist, right hip, "
    "right knee, right ankle, left hip, left knee, left ankle, right eye, left eye, right ear, left ear"
).split(", ")
LANDMARKS = (
    "left collar, right collar, left sleeve, right sleeve, left waistline, right waistline, left hem, right hem"
).split(", ")
_OF_CLOTHES = {1: (0, 1, 2, 3, 6, 7), 2: (4, 5, 6, 7), 3: tuple(range(8))}  # upper body, lower body, whole


class Keypoints:
    """Pictures with points float32 [n, 3]: x and y relative to the picture, and 1 where the point is seen, else 0.

    Args:
      pictures: the images.
      points: [pictures, n, 3], x and y in pixels of the picture.
      names: of the points.
    """

    classes = ()

    def __init__(self, pictures: ImageFiles, points: np.ndarray, names: tuple[str, ...]):
        self._pictures, self._points = pictures, points
        self.tables = {"keypoints": names}
        self._mirrored = np.array([names.index(_other_side(name)) for name in names], np.int32)

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures."""
        return self._pictures.names

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        example = self._pictures[index]
        height, width = example["image"].shape[:2]
        points = self._points[index] / np.array([width, height, 1], np.float32)
        points[:, 2] *= ((points[:, :2] >= 0) & (points[:, :2] <= 1)).all(axis=1)
        return example | {"keypoints": points * points[:, 2:], "keypoints_mirrored": self._mirrored}

    def encoded(self, index: int) -> Example:
        """The example with its picture's bytes as "image_bytes" in place of "image", which has to be decoded for it."""
        example = self[index]
        del example["image"]
        return example | self._pictures.encoded(index)


def _other_side(name: str) -> str:
    side, _, part = name.partition(" ")
    return {"left": f"right {part}", "right": f"left {part}"}.get(side, name)


def open_deepfashion(data: ConfigDict, split: str) -> Keypoints:
    """Opens `deepfashion`: 18 joints from the tables of pose transfer, or the 8 landmarks of In-shop Clothes Retrieval.

    Raises:
      UserError: neither is there, or one holds a line that is none of its own.
    """
    part = {"train": "train", "val": "test"}[split]
    candidates = [f"fasion-resize-annotation-{part}.csv", f"fashion-resize-annotation-{part}.csv"]
    if found := read_optional(data.path, candidates):
        store = find_store(data.path, [part, f"fashion_resize/{part}", f"fashion/{part}", "img", ""], _LAYOUT)
        rows, names = _joints(*found), JOINTS
    else:
        store = find_store(data.path, ["img", "Img/img", "img.zip/img", "Img/img.zip/img"], _LAYOUT)
        landmarks = find_file(data.path, ["Anno/list_landmarks_inshop.txt", "list_landmarks_inshop.txt"], _LAYOUT)
        parts = find_file(data.path, ["Eval/list_eval_partition.txt", "list_eval_partition.txt"], _LAYOUT)
        wanted = {"train": ("train",), "val": ("query", "gallery")}[split]
        lines = [line.split() for line in parts[0].decode().splitlines()[2:]]
        kept = {words[0] for words in lines if words and words[-1] in wanted}
        rows = ((name, points) for name, points in _clothes(*landmarks) if name in kept)
        names = LANDMARKS
    by_name = {name.removeprefix("img/"): points for name, points in rows}
    there = set(store.names)
    missing = [name for name in by_name if name not in there]
    warn_left_out(missing, f"have key points and are not in '{store.where('')}'")
    kept = [name for name in store.names if name in by_name]
    if not kept:
        raise UserError(f"config.data.path: no picture in '{store.where('')}' has key points; {_LAYOUT} belong")
    points = np.stack([by_name[name] for name in kept])
    # Points are in pixels of the file as it is, so it is decoded whole.
    return Keypoints(ImageFiles(store, kept), points, tuple(names))


def _joints(data: bytes, where: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names with points [18, 3] in pixels, from "name:[y, ...]:[x, ...]", -1 where a joint is not seen."""
    for number, row in enumerate(csv.reader(io.StringIO(data.decode()), delimiter=":"), start=1):
        if number == 1 and row[:1] == ["name"]:
            continue
        try:
            name, y, x = row
            points = np.array([json.loads(x), json.loads(y)], np.float32).T
            if points.shape != (len(JOINTS), 2):
                raise ValueError(f"{len(points)} points")
        except (TypeError, ValueError) as error:
            raise UserError(f"config.data.path: line {number} of '{where}' holds no 18 joints ({error})") from None
        yield name, np.concatenate([points, (points >= 0).all(axis=1, keepdims=True)], axis=1, dtype=np.float32)


def _clothes(data: bytes, where: str) -> Iterator[tuple[str, np.ndarray]]:
    """Names with points [8, 3] in pixels, from "name clothes variation (hidden x y)...", after two lines of header."""
    for number, line in enumerate(data.decode().splitlines()[2:], start=3):
        try:
            name, clothes, _, *numbers = line.split()
            found = np.array(numbers, np.float32).reshape(-1, 3)[:, [1, 2, 0]]
            points = np.zeros((len(LANDMARKS), 3), np.float32)
            found[:, 2] = found[:, 2] == 0  # 1 is hidden, 2 is outside
            places = list(_OF_CLOTHES[int(clothes)])
            points[places] = found[: len(places)]
        except (KeyError, ValueError) as error:
            raise UserError(f"config.data.path: line {number} of '{where}' holds no landmarks ({error})") from None
        yield name, points
