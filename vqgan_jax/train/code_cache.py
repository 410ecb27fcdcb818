"""A data set's codes, made once by the first stage and kept in the workdir: what stage 2 reads in place of pictures."""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqgan_jax.config import plain
from vqgan_jax.data.transforms import Transform
from vqgan_jax.evals.runner import encode_all
from vqgan_jax.train.setup import Data, Tree, evaluation_batches
from vqgan_jax.transformer import ImageTransformer

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class CodeSource:
    """Rows of cached arrays ("codes/image" int32 [n, h, w], `label` [n]) as a `Source`."""

    arrays: Arrays
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["codes/image"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.arrays.items()}


def as_is(example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The transform of cached rows: nothing."""
    return {name: np.asarray(value) for name, value in example.items()}


def encode_source(model: ImageTransformer, frozen: Tree, mesh: Mesh, batch: int, data: Data) -> Arrays:
    """Encodes the training split's centre crops, and their mirror images too where the config mirrors.

    Returns:
      {"codes/image": int32 [n or 2n, h, w], "label": int32 [n or 2n] where there are labels}.
    """
    views = [data.val_transform, *([_Mirrored(data.val_transform)] if data.train_transform.flip else [])]
    parts = []
    for number, view in enumerate(views, 1):
        batches = evaluation_batches(batch, mesh, data.train, view, 0)
        parts.append(
            encode_all(model, frozen, batches, mesh, batch, f"encode the data set, view {number}/{len(views)}")
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_cache(
    path: Path, config: ConfigDict, stages: Mapping[str, str], encode: Callable[[], Arrays], *, keep: bool = True
) -> CodeSource:
    """Reads the cache, or makes and writes it; one made by other stages or of other data is made anew.

    Args:
      path: `codes.npz` in the workdir.
      config: the whole config; its data part identifies the cache.
      stages: hashes of the frozen stages.
      encode: makes the arrays. Runs on all hosts.
      keep: write what was made.
    """
    data = {name: value for name, value in plain(config.data).items() if name not in ("threads", "processes")}
    described = json.dumps([data, config.dtype, dict(stages)], sort_keys=True)
    key = hashlib.sha256(described.encode()).hexdigest()
    arrays = _read(path, key)
    if multihost_utils.process_allgather(np.asarray(arrays is not None)).all():
        return CodeSource(arrays)
    arrays = encode()
    if keep and jax.process_index() == 0:
        partial = path.with_name(f"{path.name}.tmp.npz")
        np.savez(partial, key=np.asarray(key), **arrays)
        partial.replace(path)
    return CodeSource(arrays)


def _read(path: Path, key: str) -> Arrays | None:
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if str(arrays.pop("key", "")) == key else None


@dataclasses.dataclass(frozen=True)
class _Mirrored:
    transform: Transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = self.transform(example, rng)
        return {name: value[:, ::-1] if value.ndim >= 2 else value for name, value in row.items()}
