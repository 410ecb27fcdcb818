"""The embedded landscapes as a source: rendered once, to memory-mapped files in the cache folder."""

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from vqgan_jax.config import UserError
from vqgan_jax.data import scene_points, scenes
from vqgan_jax.data.source import Example
from vqgan_jax.data.tables import select
from vqgan_jax.weights import cache_folder

VAL_START = 1 << 30  # the first scene of the validation split: no training split reaches it
CACHE_LIMIT = 2 << 30  # bytes of scenes worth keeping on disk
_CHUNK = 64  # scenes a rendering task


def open_scenes(data: ConfigDict, split: str) -> "ScenesSource":
    """Opens the split "train" or "val" of the scenes that `config.data` describes, in the size before a crop."""
    size = data.image_size if isinstance(data.image_size, int) else max(data.image_size)
    size = max(size, data.resize_to)
    kept = select(data.classes, scenes.CLASSES, {}) if data.classes else ()
    return ScenesSource(data[f"{split}_examples"], size, data.seed, split, tuple(kept))


class ScenesSource:
    """`count` rendered landscapes [size, size, 3] with labels, segmentation, depth, boxes and key points.

    Training and validation scenes are disjoint index ranges of one seed. They are rendered once to memory-mapped files
    under `$VQGAN_JAX_CACHE` (or ~/.cache/vqgan_jax); where that cannot be written, or more than `CACHE_LIMIT` bytes
    would be, each scene is rendered when it is read.

    Args:
      count: number of scenes of the split.
      size: height and width in pixels.
      seed: the seed of the whole world of scenes, shared by both splits.
      split: "train" or "val".
      kept: labels of the scenes to keep, which stay the same; () keeps all.
    """

    classes = scenes.CLASSES
    tables = {
        "segmentation": scenes.SEGMENTATION_CLASSES,
        "box_classes": scenes.BOX_CLASSES,
        "keypoints": scene_points.names(scene_points.slots(aspect=1)),
    }

    def __init__(self, count: int, size: int, seed: int, split: str, kept: tuple[int, ...] = ()):
        if not 0 < count <= VAL_START:
            raise UserError(f"config.data.{split}_examples: takes 1 to {VAL_START} scenes, got {count}")
        self.count, self.size, self.seed = count, size, seed
        start = VAL_START if split == "val" else 0
        wanted = (n for n in itertools.count(start) if scenes.label_of(seed, n) in kept)
        self._indices = list(itertools.islice(wanted, count)) if kept else range(start, start + count)
        self._kept = kept
        self._folder = self._cached_folder(split)
        self._arrays = _open_arrays(self._folder)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self._arrays is None:
            return scenes.render(self.seed, self._indices[index], self.size, self.size)
        # Views: of a large scene a crop reads its own part of the file alone.
        example = {key: np.asarray(array[index]) for key, array in self._arrays.items()}
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
        code = b"".join(Path(module.__file__).read_bytes() for module in (scenes, scene_points))
        renderer = hashlib.sha256(code).hexdigest()[:12]
        root = cache_folder() / "scenes"
        of = "".join(f"-{label}" for label in self._kept)
        folder = root / f"{renderer}-seed{self.seed}-{self.size}px-{split}-{self.count}{of}"
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
        keys = ("label", "boxes", "box_classes", "keypoints", "keypoints_mirrored")
        rows: dict[str, list[np.ndarray]] = {key: [] for key in keys}
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
        arrays = {
            "label": np.array(rows["label"], np.int32),
            "boxes": boxes,
            "box_classes": box_classes,
            **{key: np.stack(rows[key]) for key in ("keypoints", "keypoints_mirrored")},
        }
        for key, array in arrays.items():
            np.save(folder / f"{key}.npy", array)

    def _render_all(self) -> Iterator[Example]:
        size, seed = itertools.repeat(self.size), itertools.repeat(self.seed)
        chunks = [self._indices[first : first + _CHUNK] for first in range(0, self.count, _CHUNK)]
        workers = min(cores(), len(chunks) // 8)  # starting a process costs as much as a few hundred scenes
        if workers < 2:
            yield from itertools.chain.from_iterable(map(_render_all_of, chunks, size, seed))
            return
        # Spawned, because forking a process in which JAX runs threads can hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from itertools.chain.from_iterable(pool.map(_render_all_of, chunks, size, seed))


def _render_all_of(indices: Sequence[int], size: int, seed: int) -> list[Example]:
    return [scenes.render(seed, index, size, size) for index in indices]


def cores() -> int:
    """Those that this process may use."""
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
