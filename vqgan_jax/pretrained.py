"""The front door: trained models from our workdirs and portable stages, ready to use."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vqgan_jax.config import UserError, upgrade
from vqgan_jax.convert import names
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.torch_files import open_tensors
from vqgan_jax.train import checkpoints
from vqgan_jax.train.setup import CHECKPOINTS, COND_STAGE, FIRST_STAGE
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

Tree = Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a workdir or stage holds: the record, and parameters and collections by network; EMA where there is one."""

    record: dict[str, Any]
    params: Tree
    collections: Tree
    ema: Tree

    @property
    def model_config(self) -> Mapping[str, Any]:
        """`config.model` of the run."""
        return self.record["config"]["model"]

    def variables(self, network: str) -> dict[str, Any]:
        """What a network's `apply` takes, with EMA parameters where there are some."""
        params = self.ema.get(network) or self.params[network]
        return {"params": params, **self.collections.get(network, {})}


def load_trained(path: str | Path, *, key: str, kind: str, best: bool = False) -> Trained:
    """Reads a run's newest whole checkpoint, or a portable stage.

    Args:
      path: a workdir of ours, or a folder with `stage.json`.
      key: the flag or config key that named it, for the error's text.
      kind: "vqgan" or "transformer", what it must be.
      best: the best checkpoint by the run's metric instead of the newest.

    Raises:
      UserError: nothing there, another kind, or damaged.
    """
    path = Path(path)
    if (path / checkpoints.STAGE_RECORD).exists():
        tree, record = checkpoints.read_stage(path)
    elif (path / CHECKPOINTS).is_dir():
        tree, record = checkpoints.load(path / CHECKPOINTS, only=("params", "collections", "ema"), best=best)
    else:
        raise UserError(f"{key}={path}: no workdir there (no checkpoints/ and no {checkpoints.STAGE_RECORD})")
    record = upgrade(record)
    if record["kind"] != kind:
        raise UserError(f"{key}={path}: holds a {record['kind']}, a {kind} is needed")
    return Trained(record, tree.get("params", {}), tree.get("collections", {}), tree.get("ema", {}))


def load_tokenizer(path: str | Path, *, key: str, dtype: Any = jnp.float32) -> tuple[Tokenizer, Tree, Trained]:
    """A trained VQGAN as tokenizer, its variables (numpy), and what it was read from."""
    trained = load_trained(path, key=key, kind="vqgan")
    config = VQGANConfig.from_config(trained.model_config, key=f"{path}: model")
    return Tokenizer(VQGAN(config, dtype)), trained.variables("generator"), trained


def write_stage(directory: Path, trained: Trained, network: str) -> None:
    """Copies one sampled network of a run as a portable stage: EMA parameters as the parameters, and its statistics."""
    variables = trained.variables(network)
    params = variables.pop("params")
    tree = {"params": {network: params}}
    if variables:
        tree["collections"] = {network: variables}
    checkpoints.write_stage(directory, tree, trained.record)


def load_lpips(vgg: str | Path, heads: str | Path) -> Tree:
    """LPIPS's variables from torchvision's VGG16 and the `lpips` package's linear heads.

    Raises:
      UserError: a file that is not what its name says.
    """
    params: dict[str, Any] = {}
    with open_tensors(vgg) as trunk, open_tensors(heads) as linear:
        for stage, (depth, layers) in enumerate(zip(LPIPS().config.depths, names.VGG_LAYERS, strict=True)):
            for k, layer in zip(range(depth), layers, strict=True):
                weight, bias = (_tensor(trunk, f"features.{layer}.{leaf}", vgg) for leaf in ("weight", "bias"))
                params[f"stage_{stage}_conv_{k}"] = {"kernel": names.to_ours(weight, "conv"), "bias": bias}
            params[f"linear_{stage}"] = names.to_ours(_tensor(linear, f"lin{stage}.model.1.weight", heads), "channel")
    return {"params": params}


def _tensor(tensors: Any, name: str, path: str | Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{path}: has no tensor '{name}'")
    return tensors.read(name)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The frozen stages of a stage-2 workdir. `frozen` holds their variables by name, `digest` what identifies them."""

    first: Tokenizer
    cond: Tokenizer | None
    frozen: Tree
    digest: dict[str, str]


def adopt_stages(config: ConfigDict, workdir: Path, dtype: Any) -> Stages:
    """Copies the VQGANs that a stage-2 config names into its workdir, unless they are there, and opens the copies.

    Raises:
      UserError: no first stage named, or one that is not what the workdir was started with.
    """
    wanted = {FIRST_STAGE: ("config.vqgan", config.vqgan)}
    if config.model.condition.name == "image":
        wanted[COND_STAGE] = ("config.cond_vqgan", config.cond_vqgan)
    for name, (key, path) in wanted.items():
        folder = workdir / name
        if (folder / checkpoints.STAGE_RECORD).exists():
            continue
        if not path:
            raise UserError(f"{key}: name the workdir of a trained VQGAN")
        trained = load_trained(path, key=key, kind="vqgan")
        if jax.process_index() == 0:
            write_stage(folder, trained, "generator")
        multihost_utils.sync_global_devices(f"copied {name}")
    return open_stages(workdir, dtype)


def open_stages(workdir: Path, dtype: Any) -> Stages:
    """Opens the copies of the frozen stages in a stage-2 workdir."""
    folder = workdir / FIRST_STAGE
    first, variables, _ = load_tokenizer(folder, key="--workdir", dtype=dtype)
    frozen, digest, cond = {"first_stage": variables}, {FIRST_STAGE: _digest(folder)}, None
    folder = workdir / COND_STAGE
    if folder.exists():
        cond, variables, _ = load_tokenizer(folder, key="--workdir", dtype=dtype)
        frozen[f"cond/{cond.config.input_key}"] = variables
        digest[COND_STAGE] = _digest(folder)
    return Stages(first, cond, frozen, digest)


def _digest(folder: Path) -> str:
    return json.loads((folder / checkpoints.STAGE_RECORD).read_text())["sha256"]


@dataclasses.dataclass(frozen=True)
class TrainedTransformer:
    """A stage-2 workdir, open: the model, its parameters for the sampler (`split`) and as trained (`params`)."""

    model: ImageTransformer
    params: Tree
    frozen: Tree
    stages: Stages
    record: dict[str, Any]

    @functools.cached_property
    def split(self) -> Tree:
        """The parameters with layers apart, as the sampler takes them."""
        return split_layers(jax.tree.map(jnp.asarray, self.params))


def open_transformer(
    workdir: str | Path, *, key: str, best: bool = True, dtype: Any = jnp.float32
) -> TrainedTransformer:
    """Opens a stage-2 workdir for sampling and scoring, by default its best checkpoint."""
    workdir = Path(workdir)
    trained = load_trained(workdir, key=key, kind="transformer", best=best)
    stages = open_stages(workdir, dtype)
    config = TransformerConfig.from_config(trained.model_config, key=f"{workdir}: model")
    model = ImageTransformer(config, stages.first, stages.cond, dtype)
    return TrainedTransformer(model, trained.variables("transformer")["params"], stages.frozen, stages, trained.record)
