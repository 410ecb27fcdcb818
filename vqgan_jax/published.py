"""Published models by name, as working directories in the cache folder: fetched once, and imported once."""

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from vqgan_jax import storage, weights
from vqgan_jax.config import UserError, choose
from vqgan_jax.convert import reference
from vqgan_jax.train.portable import STAGE_RECORD
from vqgan_jax.train.setup import FIRST_STAGE


@dataclasses.dataclass(frozen=True)
class Published:
    """A transformer and its first stage: their names in `weights.REGISTRY`."""

    transformer: str
    first_stage: str


MODELS = {  # class-conditional on ImageNet (MIT; arXiv 2406.06525); the larger ones of 384 pixels
    "llamagen-B": Published("llamagen_b_256", "llamagen_vq16"),
    "llamagen-B-384": Published("llamagen_b_384", "llamagen_vq16"),
    "llamagen-L": Published("llamagen_l_256", "llamagen_vq16"),
    "llamagen-L-384": Published("llamagen_l_384", "llamagen_vq16"),
    "llamagen-XL": Published("llamagen_xl_384", "llamagen_vq16"),
    "llamagen-XXL": Published("llamagen_xxl_384", "llamagen_vq16"),
    "llamagen-3B": Published("llamagen_3b_384", "llamagen_vq16"),
}


def published(name: str, *, flag: str) -> epath.Path:
    """The working directory of a published model; the first time its files are fetched and imported.

    Args:
      name: a key of MODELS.
      flag: the flag that named it, for the error's text.

    Raises:
      UserError: no such model, or a file that cannot be fetched; the text says from where and to where to put it.
    """
    model = choose(flag, name, MODELS)
    folder = weights.cache_folder() / name
    if not (folder / STAGE_RECORD).is_file():
        transformer, first = _fetch_all(model.transformer, model.first_stage)
        _import(transformer, first, folder)
    return epath.Path(folder)


def _fetch_all(*names: str) -> list[epath.Path]:
    """The files of these weights. Raises one UserError for all that cannot be had."""
    found, missing = [], []
    for name in names:
        try:
            found.append(weights.fetch(name, flag=""))
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; and ".join(missing))
    return found


def _import(transformer: epath.Path, first_stage: epath.Path, folder: Path) -> None:
    """Writes the folder whole or not at all: several processes may do it at once."""
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        import_with_stage(transformer, first_stage, storage.path(part))
        os.chmod(part, 0o755)
        try:
            os.replace(part, folder)
        except OSError:
            if not (folder / STAGE_RECORD).is_file():
                raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def import_with_stage(
    transformer: str | os.PathLike, first_stage: str | os.PathLike, out: epath.Path, yaml: str | None = None
) -> list[reference.Checkpoint]:
    """Imports a transformer's file and that of its first stage into one working directory.

    Args:
      transformer: the file.
      first_stage: the file of its VQGAN.
      out: the folder.
      yaml: the transformer's YAML; None takes the file of the same stem beside it, where there is one.

    Returns:
      What was imported: the transformer, the first stage.

    Raises:
      UserError: as `reference.open_checkpoint`; or two that do not belong together.
    """
    with reference.open_checkpoint(transformer, yaml) as opened, reference.open_checkpoint(first_stage) as stage:
        if opened.kind != "transformer" or FIRST_STAGE in opened.stages:
            raise UserError(f"--first_stage: {transformer} is no transformer without a first stage; leave it away")
        if stage.kind != "vqgan":
            raise UserError(f"--first_stage={first_stage}: holds a transformer, a VQGAN is needed")
        codes, there = opened.codes, stage.codes
        if codes != there:
            raise UserError(f"--first_stage={first_stage}: has {there} codes, {transformer} was trained on {codes}")
        stage.write(out / FIRST_STAGE)
        opened.write(out)
        return [opened, stage]
