"""CIFAR-10 as downloaded: the binary version, or the one for Python, whose pickles are read without running them."""

import io
import pickle
import posixpath
import tarfile
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.source import Example
from vqgan_jax.data.tables import CIFAR10

_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "val": ["test_batch"]}
_ROW = 1 + 3 * 32 * 32
_KINDS = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "cifar-10-batches-py", "cifar-10-python.tar.gz")
_HARMLESS = {  # what the pickled arrays of any NumPy name
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class Cifar10:
    """50,000 or 10,000 pictures [32, 32, 3] of ten classes, held in memory; a worker process reads them anew.

    Args:
      root: the folder that holds one of the four versions, or that version itself.
      split: "train" or "val", which is the test set.

    Raises:
      UserError: none of them is there, or a file is damaged.
    """

    classes = CIFAR10

    def __init__(self, root: str, split: str):
        self._root, self._split = root, split
        parts = [_rows(*found) for found in _read(root, _BATCHES[split])]
        self._labels, self._images = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def __reduce__(self):
        return type(self), (self._root, self._split)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        image = np.ascontiguousarray(self._images[index].transpose(1, 2, 0))
        return {"image": image, "label": int(self._labels[index]), "name": f"{self._split}/{index}"}


def open_cifar10(data: ConfigDict, split: str) -> Cifar10:
    """Opens `cifar10`. Raises UserError: see `Cifar10`."""
    return Cifar10(data.path, split)


def _read(root: str, names: list[str]) -> list[tuple[bytes, str]]:
    """The named batches of the first version that is there, and where each is."""
    for kind in _KINDS:
        for path in (storage.path(posixpath.join(root, kind)), storage.path(root)):
            if path.name != kind or not path.exists():
                continue
            suffix = ".bin" if "bin" in kind else ""
            if path.is_dir():
                files = [path / f"{name}{suffix}" for name in names]
                missing = [file for file in files if not file.is_file()]
                if missing:
                    raise UserError(f"config.data.path: '{missing[0]}' is missing")
                return [(file.read_bytes(), str(file)) for file in files]
            return _members(path, [f"{name}{suffix}" for name in names])
    raise UserError(f"config.data.path: '{root}' holds none of {', '.join(_KINDS)}")


def _members(archive: storage.epath.Path, names: list[str]) -> list[tuple[bytes, str]]:
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as members:
            for member in members:
                name = posixpath.basename(member.name)
                if member.isfile() and name in names:
                    found[name] = (members.extractfile(member).read(), f"{archive}/{name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"config.data.path: '{archive}' is damaged ({error}); download it again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"config.data.path: '{archive}' lacks {missing[0]}; download it again")
    return [found[name] for name in names]


def _rows(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and pictures uint8 [n, 3, 32, 32] of one batch."""
    try:
        if where.endswith(".bin"):
            rows = np.frombuffer(data, np.uint8).reshape(-1, _ROW)
            labels, pixels = rows[:, 0], rows[:, 1:]
        else:
            batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
            labels, pixels = np.asarray(batch[b"labels"], np.uint8), np.asarray(batch[b"data"], np.uint8)
        pixels = pixels.reshape(len(labels), 3, 32, 32)
        if not len(labels) or labels.max() >= len(CIFAR10):
            raise ValueError("labels that are no class")
    except Exception as error:  # whatever a damaged file makes of it
        raise UserError(f"config.data.path: '{where}' is no batch of CIFAR-10 ({error}); download it again") from None
    return labels, pixels


class _Unpickler(pickle.Unpickler):
    """Makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
