"""Codes in place of pictures: what stage 2 trains on where a data set was encoded once (see encoding.py)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data import records
from vqgan_jax.data.source import Example
from vqgan_jax.train import encoding
from vqgan_jax.train.setup import COND_STAGE, FIRST_STAGE, Data, cond_folders
from vqgan_jax.transformer import ImageTransformer

Tree = Any
FOLDER = "codes"  # in a workdir
_AGAIN = "encode the data again: python -m vqgan_jax.tools.encode"


@dataclasses.dataclass(frozen=True)
class ReadView:
    """Turns a record into a batch row: one of its views, drawn anew each time, or the first.

    Fields:
      keys: batch keys.
      draw: whether to draw the view; the pipeline's generator makes it a function of seed and position, so that an
        epoch has every example once, in a view of its own.
    """

    keys: tuple[str, ...]
    draw: bool

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        view = int(rng.integers(len(example[encoding.IMAGE_CODES]))) if self.draw else 0
        return {key: encoding.unpack(example, key, view) for key in self.keys}


def open_data(
    config: ConfigDict,
    workdir: epath.Path,
    model: ImageTransformer,
    frozen: Tree,
    stages: Mapping[str, str],
    open_images: Callable[[], Data],
) -> Data:
    """What stage 2 trains on: the codes in `config.codes`; with `config.cache_codes` those in the workdir, made where
    they are missing or of something else; or the pictures themselves.

    Args:
      config: the whole config.
      workdir: of the run.
      model: encodes.
      frozen: variables of the frozen networks by name, on every host.
      stages: hashes of the frozen stages.
      open_images: opens the pictures; not called where `config.codes` serves.

    Raises:
      UserError: see `open_codes` and `encoding.write_codes`.
    """
    if config.codes:
        return open_codes(config.codes, model, stages)
    data = open_images()
    if not config.cache_codes:
        return data
    folder = storage.path(workdir) / FOLDER
    views = encoding.CENTER_FLIP if config.data.flip else encoding.CENTER
    encoding.write_codes(
        folder,
        encoding.describe(config, model, stages, data, views),
        model=model,
        frozen=frozen,
        data=data,
        batch=config.batch_size,
        threads=config.data.threads,
        max_corrupt_share=config.data.max_corrupt_share,
        replace=True,
    )
    return open_codes(folder, model, stages)


def open_codes(folder: str | epath.Path, model: ImageTransformer, stages: Mapping[str, str]) -> Data:
    """Opens both splits of a folder of codes.

    Args:
      folder: what `encoding.write_codes` wrote, local or gs://.
      model: what trains on them.
      stages: hashes of its frozen stages.

    Raises:
      UserError: no codes there, or those of another VQGAN, of another grid, or without what the condition needs.
    """
    where = f"config.codes={folder}"
    train, val = (records.Records(folder, split, kind=records.CODES) for split in ("train", "val"))
    manifest = train.manifest
    keys = encoding.cached_keys(model)
    if missing := [key for key in keys if key not in manifest["keys"]]:
        raise UserError(
            f"{where}: has no '{missing[0]}', which config.model.condition needs (it has "
            f"{', '.join(manifest['keys'])}); {_AGAIN}"
        )
    if "boxes" in keys and ("crop_box" in keys) != ("crop_box" in manifest["keys"]):
        kinds = ("what is seen", "the whole picture")
        theirs, ours = (kinds["crop_box" in names] for names in (manifest["keys"], keys))
        raise UserError(f"{where}: its boxes are relative to {theirs}, config.model.condition takes {ours}; {_AGAIN}")
    said = manifest["stages"]
    made_by = [("config.vqgan", said[FIRST_STAGE], stages[FIRST_STAGE])]
    for name, stage in cond_folders([part.key for part in encoding.encoded_parts(model)]).items():
        # The codes may be those of more conditions than this model has, or of fewer.
        theirs = said.get(f"{COND_STAGE}/{name}") or said[COND_STAGE]
        made_by.append(("config.cond_vqgan", theirs, stages[stage]))
    for key, theirs, ours in made_by:
        if theirs != ours:
            raise UserError(f"{where}: was made by another VQGAN ({theirs[:12]}) than {key} ({ours[:12]}); {_AGAIN}")
    if tuple(manifest["grid"]) != tuple(model.config.grid):
        theirs, ours = ("x".join(map(str, grid)) for grid in (manifest["grid"], model.config.grid))
        raise UserError(f"{where}: holds {theirs} codes a picture, config.model.grid is {ours}; set it, or {_AGAIN}")
    if "label" in keys and len(train.classes) > model.condition.labels:
        raise UserError(
            f"config.model.condition.classes: the model has {model.condition.labels}, {where} has "
            f"{len(train.classes)}; raise it"
        )
    return Data(train, val, ReadView(keys, draw=True), ReadView(keys, draw=False))


def open_ready(
    config: ConfigDict, workdir: epath.Path, model: ImageTransformer, stages: Mapping[str, str]
) -> Data | None:
    """The codes that a run was trained on, as `open_codes`; None where it was trained on pictures, or they are gone."""
    try:
        return open_codes(config.get("codes") or storage.path(workdir) / FOLDER, model, stages)
    except UserError:
        return None
