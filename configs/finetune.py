"""Fine-tunes an imported model, or a run of ours, on a folder of one's own images; DIR is what was imported or trained.

    python train_vqgan.py --config=configs/finetune.py:DIR --workdir=runs/tuned --config.data.path=/photos
    python train_transformer.py --config=configs/finetune.py:DIR --workdir=runs/tuned --config.data.path=/photos

The model is DIR's own, so the trainer is that of its kind. `DIR,cca` tunes a conditional transformer, on the data that
it was trained on, to be sampled without guidance at half the cost (CCA, arXiv 2410.09347). `DIR,runlocal` and
`DIR,cca,runlocal` run two steps.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import common
from vqgan_jax import storage
from vqgan_jax.conditioning import condition_config, encoded_keys
from vqgan_jax.config import UserError, upgrade_model
from vqgan_jax.models.vqgan import VQGANConfig
from vqgan_jax.train.setup import cond_folders

RECORDS = ("stage.json", "config.json")  # of an imported model or a portable stage; of a run


def get_config(arg: str | None = None) -> ConfigDict:
    text = arg or ""
    folder = text.removesuffix(",runlocal").removesuffix(",cca")
    if not folder or text == "runlocal":
        raise UserError("--config=configs/finetune.py: name the model's folder after a colon, as in finetune.py:DIR")
    directory = storage.path(folder)
    model = read_model(directory)
    config = fine_transformer(directory, model) if "transformer" in model else fine_vqgan(model)
    config.init_from = str(directory)
    config.steps = "10 epochs"
    if text.removesuffix(",runlocal").endswith(",cca"):
        contrast(config)
    return common.run_local(config) if text.endswith(",runlocal") else config


def contrast(config: ConfigDict) -> None:
    """CCA as published: an epoch of batch 256, without dropout. The end of the run counts: likelihood, which is at its
    best where the run begins, says nothing of it.

    Raises:
      UserError: a model that is no transformer.
    """
    if "transformer" not in config.model:
        raise UserError("--config=configs/finetune.py:DIR,cca: holds a VQGAN; CCA is for transformers")
    config.steps, config.batch_size = "1 epoch", 256
    config.loss.cca.weight = 300.0
    config.checkpoint.keep_best, config.checkpoint.best_metric = 0, ""
    gpt = config.model.transformer
    gpt.embed_dropout = gpt.residual_dropout = gpt.attention_dropout = gpt.drop_path = 0.0


def fine_vqgan(model: dict[str, Any]) -> ConfigDict:
    """Stage 1: a small constant rate, and a discriminator from the first step where the file brings its own."""
    config = common.vqgan()
    trained = model["discriminator"]["enabled"]
    if not trained:  # the fields of a fresh one, for --config.model.discriminator.enabled=True
        model["discriminator"] = config.model.discriminator.to_dict() | model["discriminator"]
    config.model = ConfigDict(model)
    config.data.image_size = model["autoencoder"]["resolution"]
    config.loss.adversarial_start = "0" if trained else config.loss.adversarial_start
    if model["input_key"] == "segmentation":
        config.loss.reconstruction = "bce"
        config.checkpoint.best_metric, config.checkpoint.best_mode = "val/bce", "min"
    config.optimizer = common.adam(1e-5, warmup="1%")
    return config


def fine_transformer(directory: epath.Path, model: dict[str, Any]) -> ConfigDict:
    """Stage 2: the frozen stages are those in the same folder."""
    config = common.transformer()
    config.model = ConfigDict(model)
    config.vqgan = str(directory / "first_stage")
    encoded = encoded_keys(condition_config(model["condition"], f"{directory}: model.condition"))
    config.cond_vqgan = ",".join(str(directory / folder) for folder in cond_folders(encoded).values())
    first = VQGANConfig.from_config(read_model(directory / "first_stage"), key=config.vqgan)
    height, width = (n * first.factor for n in model["grid"])
    with config.data.ignore_type():
        config.data.image_size = height if height == width else (height, width)
    for part in common.condition_parts(config.model.condition):
        config.data.max_boxes = max(config.data.max_boxes, part.get("max_objects", 0))
    config.optimizer = common.adamw(1e-5)
    return config


def read_model(directory: epath.Path) -> dict[str, Any]:
    """`config.model` of the model in a folder, with tuples where JSON has lists.

    Raises:
      UserError: there is none.
    """
    if directory.is_file():
        raise UserError(
            f"--config=configs/finetune.py:{directory}: is a file; make a folder of it first: "
            f"python -m vqgan_jax.tools.convert --checkpoint={directory} --out=DIR"
        )
    path = next((directory / name for name in RECORDS if (directory / name).is_file()), None)
    if path is None:
        raise UserError(
            f"--config=configs/finetune.py:{directory}: no model there (no {' and no '.join(RECORDS)}); name a folder "
            "that vqgan_jax.tools.convert or a trainer wrote"
        )
    try:
        record = json.loads(path.read_text())
        model = record["record"]["config"]["model"] if path.name == RECORDS[0] else record["model"]
        return _tuples(upgrade_model(model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no record of a model ({type(error).__name__}: {error})") from None


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
