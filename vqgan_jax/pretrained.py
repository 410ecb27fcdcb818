"""The front door: trained models from our workdirs and portable stages, ready to use."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqgan_jax.config import UserError, upgrade
from vqgan_jax.convert import names
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.torch_files import open_tensors
from vqgan_jax.train import checkpoints
from vqgan_jax.train.setup import CHECKPOINTS

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
