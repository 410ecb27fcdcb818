"""Where examples come from: random access to raw numpy examples, by the name in `config.data.source`.

`scenes` renders the embedded landscapes, cached on disk; `folder` reads a tree of image files, one class a folder.
A further source is one class that follows `Source`, and one entry of `SOURCES`.
"""

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageOps
from tqdm import tqdm

from vqgan_jax.config import UserError, choose, suggest
from vqgan_jax.data import scenes

Example = dict[str, Any]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VAL_START = 1 << 30  # the first scene of the validation split: no training split reaches it
CACHE_LIMIT = 2 << 30  # bytes of scenes worth keeping on disk
_CHUNK = 64  # scenes a rendering task


class Source(Protocol):
    """Random access to raw examples; picklable, and `__getitem__` may run in several threads at once.

    An example is a dict of: image uint8 [h, w, 3]; and, where the source knows them, label int; segmentation uint8 or
    int32 [h, w] and depth float32 [h, w] in [0, 1] (0 near), of the image's size; boxes float32 [n, 4] (x, y, width,
    height, relative to the picture); box_classes int32 [n]; box_flags int32 [n].
    Reading an unreadable example raises `CorruptExample`.
    """

    classes: tuple[str, ...]  # the names of the labels, () where examples have none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class CorruptExample(Exception):
    """An example that cannot be read: `path` names it, `reason` says why. The pipeline replaces it and counts it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def open_source(data: ConfigDict, split: str) -> Source:
    """Opens the split "train" or "val" of the source that `config.data` names.

    Raises:
      UserError: an unknown source or split, or nothing to read under `config.data.path`.
    """
    choose("split", split, dict.fromkeys(("train", "val")))
    return choose("config.data.source", data.source, SOURCES)(data, split)


class ScenesSource:
    """`count` rendered landscapes [size, size, 3] with labels, segmentation, depth and boxes.

    Training and validation scenes are disjoint index ranges of one seed. They are rendered once to memory-mapped files
    under `$VQGAN_JAX_CACHE` (or ~/.cache/vqgan_jax); where that cannot be written, or more than `CACHE_LIMIT` bytes
    would be, each scene is rendered when it is read.

    Args:
      count: number of scenes of the split.
      size: height and width in pixels.
      seed: the seed of the whole world of scenes, shared by both splits.
      split: "train" or "val".
    """

    classes = scenes.CLASSES

    def __init__(self, count: int, size: int, seed: int, split: str):
        if not 0 < count <= VAL_START:
            raise UserError(f"config.data.{split}_examples: takes 1 to {VAL_START} scenes, got {count}")
        self.count, self.size, self.seed = count, size, seed
        self.start = VAL_START if split == "val" else 0
        self._folder = self._cached_folder(split)
        self._arrays = _open_arrays(self._folder)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self._arrays is None:
            return scenes.render(self.seed, self.start + index, self.size, self.size)
        example = {key: np.array(array[index]) for key, array in self._arrays.items()}
        real = example["box_classes"] >= 0
        return example | {
            "label": int(example["label"]),
            "boxes": example["boxes"][real],
            "box_classes": example["box_classes"][real],
        }

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is a full copy of its file: a worker process opens the files itself.
        return self.__dict__ | {"_arrays": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._arrays = _open_arrays(self._folder)

    def _cached_folder(self, split: str) -> Path | None:
        """The folder that holds this split, rendered if it was missing; None where it is not kept on disk."""
        if self.count * self.size**2 * 8 > CACHE_LIMIT:  # image 3, segmentation 1, depth 4 bytes a pixel
            logging.info("scenes: too many to keep on disk, rendered while training")
            return None
        renderer = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()[:12]
        root = Path(os.environ.get("VQGAN_JAX_CACHE") or "~/.cache/vqgan_jax").expanduser() / "scenes"
        folder = root / f"{renderer}-seed{self.seed}-{self.size}px-{split}-{self.count}"
        if folder.is_dir():
            return folder
        try:
            root.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=root))
        except OSError as error:
            logging.log_first_n(logging.WARNING, "scenes: rendered while training, for want of a cache: %s", 1, error)
            return None
        try:
            self._write_arrays(unfinished)
            unfinished.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # otherwise another process was faster, and its files are as good
                logging.log_first_n(logging.WARNING, "scenes: rendered while training, cache failed: %s", 1, error)
                return None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    def _write_arrays(self, folder: Path) -> None:
        """Renders all scenes into one .npy file a key, boxes padded with class -1."""
        # Plain writes, not a writable memory map: a full disk is then an OSError and not a SIGBUS.
        rows: dict[str, list[np.ndarray]] = {"label": [], "boxes": [], "box_classes": []}
        files = {key: open(folder / f"{key}.npy", "wb") for key in ("image", "segmentation", "depth")}
        try:
            with tqdm(total=self.count, desc="rendering scenes", unit="image", disable=self.count < 512) as bar:
                for scene in self._render_all():
                    for key, file in files.items():
                        if file.tell() == 0:
                            _write_header(file, scene[key], self.count)
                        file.write(np.ascontiguousarray(scene[key]).tobytes())
                    for key in rows:
                        rows[key].append(np.asarray(scene[key]))
                    bar.update()
        finally:
            for file in files.values():
                file.close()
        most = max(len(classes) for classes in rows["box_classes"])
        boxes = np.zeros((self.count, most, 4), np.float32)
        box_classes = np.full((self.count, most), -1, np.int32)
        for i, classes in enumerate(rows["box_classes"]):
            boxes[i, : len(classes)], box_classes[i, : len(classes)] = rows["boxes"][i], classes
        for key, array in {
            "label": np.array(rows["label"], np.int32),
            "boxes": boxes,
            "box_classes": box_classes,
        }.items():
            np.save(folder / f"{key}.npy", array)

    def _render_all(self) -> Iterator[Example]:
        size, seed = itertools.repeat(self.size), itertools.repeat(self.seed)
        stop = self.start + self.count
        ranges = [range(first, min(first + _CHUNK, stop)) for first in range(self.start, stop, _CHUNK)]
        workers = min(_cores(), len(ranges) // 8)  # starting a process costs as much as a few hundred scenes
        if workers < 2:
            yield from itertools.chain.from_iterable(map(_render_range, ranges, size, seed))
            return
        # Spawned, because forking a process in which JAX runs threads can hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from itertools.chain.from_iterable(pool.map(_render_range, ranges, size, seed))


def _render_range(indices: range, size: int, seed: int) -> list[Example]:
    return [scenes.render(seed, index, size, size) for index in indices]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_arrays(folder: Path | None) -> dict[str, np.ndarray] | None:
    """Memory maps of the .npy files in `folder`; None without a folder."""
    if folder is None:
        return None
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: damaged cache of scenes ({error}), delete the folder") from None


def _write_header(file: Any, row: np.ndarray, count: int) -> None:
    header = {"descr": row.dtype.str, "fortran_order": False, "shape": (count, *row.shape)}
    np.lib.format.write_array_header_1_0(file, header)


class FolderSource:
    """Image files (`IMAGE_SUFFIXES`, any case) in any nesting under `path`, in the order of their relative names.

    The class of an image is the folder directly under `path` that it lies in; with images directly in `path` there are
    no classes. Hidden files are skipped, links are followed, grey, palette, CMYK, 16-bit and transparent (on white)
    pictures become RGB, and the camera's EXIF rotation is applied.

    Args:
      path: the folder.
      classes: names of the classes in order of their ids, where another split decides them.
      keep: says of a relative name whether it belongs to this split; None keeps all.
      decode_at_least: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size while their short side stays at least this
        many pixels, which is faster; None decodes them whole.

    Raises:
      UserError: no such folder, no image in it, or a folder that is none of `classes`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: tuple[str, ...] | None = None,
        keep: Callable[[str], bool] | None = None,
        decode_at_least: int | None = None,
    ):
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(f"config.data.path: there is no folder '{self.path}'")
        names = sorted(_image_names(self.path, "", frozenset()))
        if not names:
            raise UserError(f"config.data.path: no images ({' '.join(IMAGE_SUFFIXES)}) under '{self.path}'")
        if classes is None:
            flat = any("/" not in name for name in names)
            classes = () if flat else tuple(sorted({name.split("/", 1)[0] for name in names}))
        self.classes = classes
        self.names = [name for name in names if keep is None or keep(name)]
        self._decode_at_least = decode_at_least
        self._labels = {name: label for label, name in enumerate(classes)}
        for name in self.names:
            folder = name.split("/", 1)[0]
            if classes and folder not in self._labels:
                raise UserError(
                    f"config.data.path: '{self.path / name}' is in no class of training{suggest(folder, classes)}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        example: Example = {"image": read_image(self.path / name, self._decode_at_least)}
        if self.classes:
            example["label"] = self._labels[name.split("/", 1)[0]]
        return example


def _image_names(folder: Path, prefix: str, above: frozenset[str]) -> Iterator[str]:
    """Relative names of the images under `folder`; `above` holds the real paths of its parents."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _image_names(folder / entry.name, f"{prefix}{entry.name}/", above | {real})
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                yield prefix + entry.name  # a broken link too: a file that is missing shall be counted


def read_image(path: Path, decode_at_least: int | None = None) -> np.ndarray:
    """Decodes an image file to uint8 RGB [h, w, 3], upright.

    Args:
      path: the file.
      decode_at_least: see `FolderSource`.

    Raises:
      CorruptExample: the file is missing or no readable image.
    """
    try:
        with Image.open(path) as image:
            if decode_at_least:
                image.draft(None, (decode_at_least, decode_at_least))
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except Exception as error:  # decoders raise anything at all on damaged bytes
        raise CorruptExample(str(path), f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.rint(np.clip(np.asarray(image, np.float32), 0, 65535) / 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _open_scenes(data: ConfigDict, split: str) -> ScenesSource:
    return ScenesSource(data[f"{split}_examples"], data.image_size, data.seed, split)


def _open_folder(data: ConfigDict, split: str) -> FolderSource:
    if not data.path:
        raise UserError("config.data.path: name the folder that holds the images")
    root = Path(data.path).expanduser()
    train = root / data.train_split
    decode_at_least = None
    if split == "train" and data.resize != "bilinear_no_antialias":
        # Twice what the crop needs, so that the filter that was asked for still does the last halving.
        share = data.crop_scale[0] if data.crop == "random_resized" else 1.0
        decode_at_least = int(np.ceil(2 * data.image_size / np.sqrt(share)))
    if data.val_split == "":
        source = FolderSource(
            train,
            keep=lambda name: _held_out(name, data.val_share) == (split == "val"),
            decode_at_least=decode_at_least,
        )
        if not len(source):
            raise UserError(
                f"config.data.val_share: {data.val_share} leaves no image of '{train}' for the split '{split}'"
            )
        return source
    val = root / data.val_split
    inside, outside = sorted((train.resolve(), val.resolve()), key=lambda path: len(path.parts), reverse=True)
    if inside.is_relative_to(outside):
        raise UserError(f"config.data.val_split: '{val}' and the training folder '{train}' overlap; name two folders")
    if split == "train":
        return FolderSource(train, decode_at_least=decode_at_least)
    return FolderSource(val, classes=_class_folders(train))


def _class_folders(path: Path) -> tuple[str, ...]:
    """The classes that `FolderSource(path)` has, found without walking the whole tree where that can be helped."""
    if not path.is_dir():
        raise UserError(f"config.data.path: there is no folder '{path}'")
    names: list[str] = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            if entry.name.lower().endswith(IMAGE_SUFFIXES):
                return ()
        elif next(_image_names(entry, "", frozenset({os.path.realpath(path)})), None):
            names.append(entry.name)
    return tuple(names)


def _held_out(name: str, share: float) -> bool:
    """Whether the hash of a relative name puts it into the share that is held out for validation."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


SOURCES: dict[str, Callable[[ConfigDict, str], Source]] = {"scenes": _open_scenes, "folder": _open_folder}
