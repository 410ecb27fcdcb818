"""Image files of any store as a source: one class a folder, and the two ways to a validation split."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError, suggest
from vqgan_jax.data.decoding import IMAGE_SUFFIXES, decode_image, decode_npy
from vqgan_jax.data.source import Example
from vqgan_jax.data.stores import ListStore, Store, open_store
from vqgan_jax.data.transforms import NO_ANTIALIAS


class ImageFiles:
    """Picture files of a store, with labels where there are any.

    Args:
      store: what holds them.
      names: of the files, in order; those that end in .npy hold pixels, the others are pictures.
      labels: the class of each, or None.
      classes: names of the classes.
      at_least: see `decode_image`.
    """

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        *,
        labels: Sequence[int] | None = None,
        classes: tuple[str, ...] = (),
        at_least: int | None = None,
    ):
        self.store, self.names, self.labels, self.classes = store, names, labels, classes
        self._at_least = at_least

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        example = self.encoded(index)
        if "image_bytes" in example:
            example["image"] = decode_image(example.pop("image_bytes"), example["name"], at_least=self._at_least)
        return example

    def encoded(self, index: int) -> Example:
        """The example with its file's bytes as "image_bytes" in place of "image", but for pixels in .npy files."""
        name = self.names[index]
        data, where = self.store.read(name), self.store.where(name)
        example: Example = {"name": where}
        if name.endswith(".npy"):
            example["image"] = decode_npy(data, where)
        else:
            example["image_bytes"] = data
        if self.labels is not None:
            example["label"] = int(self.labels[index])
        return example


def open_files(data: ConfigDict, split: str) -> ImageFiles:
    """Opens `folder` and `archive`: the folders `train_split` and `val_split` of `path`, in an archive or not.

    The class of a picture is the top folder that it lies in; where one lies in none there are no classes. With
    `val_split=""` a share of the training files is held out by the hash of their names.

    Raises:
      UserError: nothing to read, or training and validation overlap.
    """
    return _open_split(data, split, lambda path: open_store(path, IMAGE_SUFFIXES))


def open_list(data: ConfigDict, split: str) -> ImageFiles:
    """Opens `list`: the text files `train_split` and `val_split` (with or without .txt) in `path`, or `path` itself.

    Raises:
      UserError: as `open_files`.
    """
    root = storage.path(data.path)
    if root.is_file():
        if data.train_split or data.val_split:
            raise UserError(
                f"config.data.path: '{root}' is one list, of which a share can be held out with "
                "config.data.train_split= config.data.val_split= ; or name the folder that holds one list a split"
            )
        root = root.parent

    def open_one(path: str | os.PathLike) -> ListStore:
        text = storage.path(f"{path}.txt")
        return ListStore(text if text.is_file() else path, root)

    return _open_split(data, split, open_one)


def decode_at_least(data: ConfigDict, split: str) -> int | None:
    """The short side in pixels at which a JPEG may be decoded for `config.data`'s crops: `at_least` of decode_image."""
    if split != "train" or data.resize == NO_ANTIALIAS:
        return None
    # Twice what the crop needs, so that the filter that was asked for still does the last halving.
    size = data.image_size if isinstance(data.image_size, int) else max(data.image_size)
    if data.crop == "random_resized":
        return math.ceil(2 * size / math.sqrt(data.crop_scale[0]))
    return 2 * max(data.resize_to, size)


def in_split(name: str, split: str, val_share: float) -> bool:
    """Whether the hash of a relative name puts it into this split, where a share of training is held out."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") < val_share * 2**64) == (split == "val")


def _open_split(data: ConfigDict, split: str, open_one: Callable[[str | os.PathLike], Store]) -> ImageFiles:
    if not data.path:
        raise UserError("config.data.path: name the folder, list or archive that holds the images")
    root = storage.path(data.path)
    train = root / data.train_split if data.train_split else root
    if data.val_split == "":
        store = _open_filled(open_one, train)
        names = [name for name in store.names if in_split(name, split, data.val_share)]
        if not names:
            raise UserError(
                f"config.data.val_share: {data.val_share} leaves no image of '{train}' for the split '{split}'"
            )
        return _classified(store, names, store.folders(), decode_at_least(data, split))
    val = root / data.val_split
    inside, outside = sorted(map(_real, (train, val)), key=len, reverse=True)
    if f"{inside}/".startswith(f"{outside}/"):
        raise UserError(f"config.data.val_split: '{val}' and the training set '{train}' overlap; name two folders")
    store = _open_filled(open_one, train if split == "train" else val)
    classes = (store if split == "train" else open_one(train)).folders()
    return _classified(store, store.names, classes, decode_at_least(data, split))


def _open_filled(open_one: Callable[[str | os.PathLike], Store], path: os.PathLike) -> Store:
    store = open_one(path)
    if not store.names:
        raise UserError(f"config.data.path: no images ({' '.join(IMAGE_SUFFIXES)}) under '{store.where('')}'")
    return store


def _classified(store: Store, names: Sequence[str], classes: tuple[str, ...], at_least: int | None) -> ImageFiles:
    """The files with the classes of training: of each the top folder that it lies in. Raises UserError: it is none."""
    if not classes:
        return ImageFiles(store, names, at_least=at_least)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of.get(name.split("/", 1)[0]) for name in names]
    if None in labels:
        name = names[labels.index(None)]
        raise UserError(
            f"config.data.path: '{store.where(name)}' is in no class of training"
            f"{suggest(name.split('/', 1)[0], classes)}"
        )
    return ImageFiles(store, names, labels=labels, classes=classes, at_least=at_least)


def _real(path: os.PathLike) -> str:
    return os.fspath(path) if storage.is_remote(path) else os.path.realpath(path)
