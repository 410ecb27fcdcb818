"""The portable form of a trained stage: `params.safetensors` and `stage.json`, which holds its record and its hash."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from vqgan_jax import storage
from vqgan_jax.config import UserError

Record = dict[str, Any]

STAGE_ARRAYS, STAGE_RECORD = "params.safetensors", "stage.json"


def write_stage(directory: str | os.PathLike, arrays: Mapping[str, Any], record: Record) -> None:
    """Writes a trained stage, local or in a bucket.

    Args:
      directory: made where it is missing; a stage that lies there is replaced.
      arrays: nested dict of arrays; nested names are joined as "a/b/c", so no name may hold a slash.
      record: plain JSON data.
    """
    directory = storage.path(directory)
    for path in traverse_util.flatten_dict(arrays):
        if any("/" in name for name in path):
            raise ValueError(f"a name of a stage's array may not hold a slash: {path}")
    flat = traverse_util.flatten_dict(arrays, sep="/")
    # The record is the commit mark: while the arrays change, there is none.
    (directory / STAGE_RECORD).unlink(missing_ok=True)
    with storage.staged(directory / STAGE_ARRAYS) as partial:
        save_file({name: np.asarray(array, order="C") for name, array in flat.items()}, partial)
        digest = storage.sha256(partial)
    storage.write_json(directory / STAGE_RECORD, {"record": record, "sha256": digest})


def read_stage(directory: str | os.PathLike) -> tuple[dict[str, Any], Record]:
    """Reads what `write_stage` wrote: (nested dict of numpy arrays, record).

    Raises:
      UserError: the stage is missing, or its arrays are not those that were written.
    """
    directory = storage.path(directory)
    try:
        stage = json.loads((directory / STAGE_RECORD).read_text())
        with storage.fetched(directory / STAGE_ARRAYS) as arrays:
            if storage.sha256(arrays) != stage["sha256"]:
                name = directory / STAGE_ARRAYS
                raise UserError(f"{name}: damaged, its SHA-256 is not the one in {STAGE_RECORD}")
            return traverse_util.unflatten_dict(load_file(arrays), sep="/"), stage["record"]
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{directory}: no whole stage there ({reason})") from None
