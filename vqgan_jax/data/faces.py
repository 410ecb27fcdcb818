"""FFHQ, CelebA-HQ and both together, split as arXiv 2012.09841 does: by lists beside them, else by their numbers."""

import itertools
import posixpath
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from vqgan_jax.config import UserError
from vqgan_jax.data.decoding import IMAGE_SUFFIXES
from vqgan_jax.data.image_files import ImageFiles, decode_at_least
from vqgan_jax.data.source import Example, Source, locate
from vqgan_jax.data.stores import find_store, read_optional, stem

_FFHQ_TRAIN, _CELEBA_TRAIN = 60_000, 25_000  # of 70,000 and of 30,000
_NUMBER = re.compile(r"(\d+)$")


def open_ffhq(data: ConfigDict, split: str) -> ImageFiles:
    """Opens `ffhq`, at any size: numbers below 60,000 are for training, as its makers have it.

    Lists of names in ffhqtrain.txt and ffhqvalidation.txt, where they lie in `path`, split it instead.

    Raises:
      UserError: nothing to read, or a list names a picture that is not there.
    """
    folders = ("images1024x1024", "images1024x1024.zip/images1024x1024", "images256x256", "thumbnails128x128", "")
    layout = "images1024x1024 (or another folder) with 00000.png to 69999.png"
    return _open(data, data.path, split, folders, layout, "ffhq", _FFHQ_TRAIN)


def open_celeba_hq(data: ConfigDict, split: str) -> ImageFiles:
    """Opens `celeba_hq`, PNG, JPEG or .npy: the first 25,000 numbers are for training.

    Lists of names in celebahqtrain.txt and celebahqvalidation.txt, where they lie in `path`, split it instead, which
    the released models need: theirs are no ranges.

    Raises:
      UserError: nothing to read, or a list names a picture that is not there.
    """
    folders = ("CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img", "data1024x1024", "data256x256", "")
    layout = "CelebA-HQ-img (or another folder) with 30,000 numbered pictures"
    return _open(data, data.path, split, folders, layout, "celebahq", _CELEBA_TRAIN)


def open_faceshq(data: ConfigDict, split: str) -> Source:
    """Opens `faceshq`: the folders celeba_hq (or celebahq) and ffhq of `path`, with the classes 0 and 1.

    Raises:
      UserError: as `open_ffhq` and `open_celeba_hq`.
    """
    parts = {}
    for name, folders, opener in (
        ("celeba_hq", ("celeba_hq", "celebahq", "CelebAMask-HQ"), open_celeba_hq),
        ("ffhq", ("ffhq",), open_ffhq),
    ):
        layout = "the folders celeba_hq and ffhq"
        tops = [top for top in folders if _is_there(data.path, top)]
        if not tops:
            raise UserError(f"config.data.path: '{data.path}' has no folder '{folders[0]}'; {layout} belong there")
        one = data.copy_and_resolve_references()
        one.path = posixpath.join(data.path, tops[0])
        parts[name] = opener(one, split)
    return Concatenated(parts)


class Concatenated:
    """Several sources one after another; the label of an example says which it is from.

    Args:
      parts: sources by the name of their class.
    """

    def __init__(self, parts: dict[str, Source]):
        self.classes = tuple(parts)
        self._parts = tuple(parts.values())
        self.names = [name for part in self._parts for name in part.names]
        self._ends = list(itertools.accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part, index = locate(self._ends, index)
        return self._parts[part][index] | {"label": part}

    def encoded(self, index: int) -> Example:
        """The example with its picture's bytes as "image_bytes" in place of "image"."""
        part, index = locate(self._ends, index)
        return self._parts[part].encoded(index) | {"label": part}


def _is_there(root: str, folder: str) -> bool:
    try:
        find_store(root, [folder], "", ())
    except UserError:
        return False
    return True


def _open(
    data: ConfigDict, root: str, split: str, folders: Sequence[str], layout: str, name: str, train: int
) -> ImageFiles:
    store = find_store(root, folders, layout, (*IMAGE_SUFFIXES, ".npy"))
    listed = read_optional(root, [f"{name}{'train' if split == 'train' else 'validation'}.txt"])
    if listed:
        by_stem = {posixpath.basename(stem(found)): found for found in store.names}
        lines = [line.strip() for line in listed[0].decode().splitlines() if line.strip()]
        missing = [line for line in lines if posixpath.basename(stem(line)) not in by_stem]
        if missing:
            raise UserError(f"config.data.path: '{listed[1]}' names '{missing[0]}', which '{store.where('')}' lacks")
        names = [by_stem[posixpath.basename(stem(line))] for line in lines]
    else:
        numbered = [(int(match[1]), found) for found in store.names if (match := _NUMBER.search(stem(found)))]
        names = [found for number, found in sorted(numbered) if (number < train) == (split == "train")]
    if not names:
        side = "below" if split == "train" else "from"
        raise UserError(f"config.data.path: '{store.where('')}' has no pictures {side} number {train}; {layout} belong")
    return ImageFiles(store, names, at_least=decode_at_least(data, split))
