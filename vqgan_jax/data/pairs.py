"""Pictures with a mask or a depth map each, as files of the same name: any such folders, ADE20K, COCO-Stuff, S-FLCKR.

The ids of masks are those that the released segmentation models know (arXiv 2012.09841): what is unlabelled is a class.
"""

import posixpath
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.data import tables
from vqgan_jax.data.decoding import decode_float_rgba, decode_ids
from vqgan_jax.data.image_files import ImageFiles, decode_at_least, in_split
from vqgan_jax.data.source import CorruptExample, Example
from vqgan_jax.data.stores import Store, find_store, matched

_COLOUR_TYPE, _RGBA = 25, 6  # of a PNG: where its header says what a pixel is, and four channels
_WHAT = {"segmentation": "mask", "depth": "depth map"}
_SAME_SHAPE = 0.02  # masks and pictures may differ in size, not in proportions


class Pairs:
    """Pictures with what the files of the same name in other stores say of them.

    Args:
      pictures: the images, perhaps with labels.
      maps: by the example's key ("segmentation", "depth"), the store and its names, in the order of the pictures.
      decode: by the same key, from bytes and the name for errors to the raw array.
      tables: names of ids by key, where they are known.
    """

    def __init__(
        self,
        pictures: ImageFiles,
        maps: Mapping[str, tuple[Store, Sequence[str]]],
        decode: Mapping[str, Callable[[bytes, str], np.ndarray]],
        tables: Mapping[str, tuple[str, ...]] | None = None,
    ):
        self._pictures, self._maps, self._decode = pictures, dict(maps), dict(decode)
        self.classes, self.tables = pictures.classes, dict(tables or {})

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Example:
        example = self._pictures[index] | self._described(index)
        height, width = example["image"].shape[:2]
        for key in self._maps:
            h, w = example[key].shape
            if abs(h * width - w * height) > _SAME_SHAPE * h * width:
                reason = f"its {key} is {w} x {h} pixels, the picture {width} x {height}: other proportions"
                raise CorruptExample(example["name"], reason)
        return example

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures."""
        return self._pictures.names

    def encoded(self, index: int) -> Example:
        """The example with its picture's bytes as "image_bytes" in place of "image"."""
        return self._pictures.encoded(index) | self._described(index)

    def _described(self, index: int) -> Example:
        found = {}
        for key, (store, names) in self._maps.items():
            name = names[index]
            found[key] = self._decode[key](store.read(name), store.where(name))
        return found


class Ids:
    """Decodes masks of a table with so many ids; `shift` adds 1, and what is 255 (unlabelled) becomes 0.

    Args:
      count: ids are 0 to count - 1 after the shift; 0 takes any.
      shift: whether to shift.

    Calling it raises CorruptExample: no mask, or an id outside the table.
    """

    def __init__(self, count: int, shift: bool = False):
        self.count, self.shift = count, shift

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        ids = decode_ids(data, where)
        if self.shift:
            ids = np.where(ids == 255, 0, ids.astype(np.int32) + 1)
        if self.count and (worst := max(int(ids.max()), -int(ids.min()))) >= self.count:
            raise CorruptExample(where, f"the id {worst - self.shift} is outside the table of {self.count} ids")
        return ids


def decode_depth(data: bytes, where: str) -> np.ndarray:
    """A depth map as float32 [h, w] in [0, 1], as the file has it: whether near is 0 or 1 is the file's.

    RGBA holds one float32 a pixel, of which each map's own range becomes [0, 1]; grey of 8 or 16 bits is divided by its
    largest value.

    Raises:
      CorruptExample: no depth map, or one with values that are not finite.
    """
    if len(data) > _COLOUR_TYPE and data[:8] == b"\x89PNG\r\n\x1a\n" and data[_COLOUR_TYPE] == _RGBA:
        depth = decode_float_rgba(data, where)
        if not np.isfinite(depth).all():
            raise CorruptExample(where, "depths that are not finite")
        low, high = float(depth.min()), float(depth.max())
        return (depth - low) / max(high - low, 1e-8)
    grey = decode_ids(data, where)
    return grey.astype(np.float32) / (255 if grey.dtype == np.uint8 else 65535)


def open_pairs(data: ConfigDict, split: str) -> Pairs:
    """Opens `pairs`: the folders `images`, and `masks` or `depths` or both, of `path`, matched by relative name.

    Each holds the folders `train_split` and `val_split`, or with `val_split=""` a share of the pictures is held out.

    Raises:
      UserError: neither masks nor depths are named, something is missing, or no names agree.
    """
    folders = {"segmentation": data.masks, "depth": data.depths}
    if not any(folders.values()):
        raise UserError("config.data.masks: name the folder of the masks, or that of config.data.depths, or both")
    layout = f"'{data.images}' and {' and '.join(repr(name) for name in folders.values() if name)}"
    decode = {"segmentation": Ids(data.segments), "depth": decode_depth}
    return _open(data, split, [data.images], {k: [v] for k, v in folders.items() if v}, decode, layout, {})


def open_ade20k(data: ConfigDict, split: str) -> Pairs:
    """Opens `ade20k`, the scene parsing challenge: 151 ids, of which 0 is what is none of the 150 classes.

    Raises:
      UserError: something is missing.
    """
    layout = "images/{training,validation} and annotations/{training,validation} of ADEChallengeData2016"
    folder = {"train": "training", "val": "validation"}[split]
    tops = ("", "ADEChallengeData2016/", "ADEChallengeData2016.zip/ADEChallengeData2016/")
    images, masks = ([f"{top}{kind}/{folder}" for top in tops] for kind in ("images", "annotations"))
    names = {"segmentation": tables.ADE20K}
    return _open_split(data, split, images, {"segmentation": masks}, {"segmentation": Ids(151)}, layout, names)


def open_coco_stuff(data: ConfigDict, split: str) -> Pairs:
    """Opens `coco_stuff`, stuff and things of COCO as PNG files: 183 ids, of which 0 is unlabelled (255 in the files).

    Raises:
      UserError: something is missing.
    """
    layout = "{train,val}2017 with the photographs and stuffthingmaps/{train,val}2017 with the PNG files"
    folder = f"{split}2017"
    images = [folder, f"{folder}.zip/{folder}", f"images/{folder}"]
    maps = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations", "cocostuffthings")
    masks = [*(f"{name}/{folder}" for name in maps), f"stuffthingmaps_trainval2017.zip/{folder}"]
    names = {"segmentation": ("unlabelled", *tables.COCO_STUFF)}
    decode = {"segmentation": Ids(183, shift=True)}
    return _open_split(data, split, images, {"segmentation": masks}, decode, layout, names)


def open_sflckr(data: ConfigDict, split: str) -> Pairs:
    """Opens `sflckr`: landscapes with ids that a network gave them, 182 of COCO-Stuff without a class for unlabelled.

    The pictures are in the folders `images` and `masks` (by default "segmentations") of `path`, split as by `pairs`.

    Raises:
      UserError: something is missing.
    """
    masks = data.masks or "segmentations"
    names = {"segmentation": tables.COCO_STUFF}
    layout = f"'{data.images}' and '{masks}'"
    return _open(data, split, [data.images], {"segmentation": [masks]}, {"segmentation": Ids(182)}, layout, names)


def _open(
    data: ConfigDict,
    split: str,
    images: Sequence[str],
    maps: Mapping[str, Sequence[str]],
    decode: Mapping[str, Callable[[bytes, str], np.ndarray]],
    layout: str,
    names: Mapping[str, tuple[str, ...]],
) -> Pairs:
    """Pairs whose folders hold the split's folders, or all of both splits."""
    if data.val_split:
        folder = {"train": data.train_split, "val": data.val_split}[split]
        images = [posixpath.join(name, folder) for name in images]
        maps = {key: [posixpath.join(name, folder) for name in found] for key, found in maps.items()}
        return _open_split(data, split, images, maps, decode, f"{layout}, in each '{folder}',", names)

    def keep(name: str) -> bool:
        return in_split(name, split, data.val_share)

    return _open_split(data, split, images, maps, decode, layout, names, keep)


def _open_split(
    data: ConfigDict,
    split: str,
    images: Sequence[str],
    maps: Mapping[str, Sequence[str]],
    decode: Mapping[str, Callable[[bytes, str], np.ndarray]],
    layout: str,
    names: Mapping[str, tuple[str, ...]],
    keep: Callable[[str], bool] = lambda name: True,
) -> Pairs:
    store = find_store(data.path, images, layout)
    described = {key: find_store(data.path, candidates, layout) for key, candidates in maps.items()}
    rows = matched(store.names, {_WHAT[key]: maps.names for key, maps in described.items()}, layout)
    rows = [row for row in rows if keep(row[0])]
    if not rows:
        raise UserError(f"config.data.val_share: {data.val_share} leaves no picture for the split '{split}'")
    pictures, *others = zip(*rows, strict=True)
    found = {key: (described[key], other) for key, other in zip(described, others, strict=True)}
    return Pairs(ImageFiles(store, pictures, at_least=decode_at_least(data, split)), found, decode, names)
