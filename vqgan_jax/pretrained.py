"""The front door: trained models from our workdirs, portable stages and the reference's checkpoints, ready to use.

`load_vqgan` and `load_transformer` are for notebooks (what they return: front_door.py), the rest for the scripts.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vqgan_jax.config import UserError, upgrade
from vqgan_jax.convert import names, reference
from vqgan_jax.front_door import PretrainedTransformer, PretrainedVQGAN
from vqgan_jax.images import to_uint8
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.models.lpips import LPIPS
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.sampling.sampler import make_sampler
from vqgan_jax.sampling.strategies import Strategy, row_keys
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
    """Reads a run's newest whole checkpoint, a portable stage, or a file of the reference.

    Args:
      path: a workdir of ours, a folder with `stage.json`, or a .ckpt of the reference with its YAML beside it.
      key: the flag or config key that named it, for the error's text.
      kind: "vqgan" or "transformer", what it must be.
      best: the best checkpoint by the run's metric instead of the newest.

    Raises:
      UserError: nothing there, another kind, or damaged.
    """
    path = Path(path)
    if path.is_file():
        return _read_reference(path, key, kind, (reference.ROOT,))[reference.ROOT]
    if (path / checkpoints.STAGE_RECORD).exists():
        tree, record = checkpoints.read_stage(path)
    elif (path / CHECKPOINTS).is_dir():
        tree, record = checkpoints.load(path / CHECKPOINTS, only=("params", "collections", "ema"), best=best)
    else:
        raise UserError(f"{key}={path}: no workdir there (no checkpoints/ and no {checkpoints.STAGE_RECORD})")
    record = upgrade(record)
    _check_kind(path, key, record["kind"], kind)
    return Trained(record, tree.get("params", {}), tree.get("collections", {}), tree.get("ema", {}))


def kind_of(path: str | Path, *, key: str) -> str:
    """Whether `path`, as `load_trained` takes it, holds a "vqgan" or a "transformer". Raises UserError for neither."""
    path = Path(path)
    if path.is_file():
        with reference.open_checkpoint(path) as opened:
            return opened.kind
    if (stage := path / checkpoints.STAGE_RECORD).exists():
        return json.loads(stage.read_text())["record"]["kind"]
    if (config := path / "config.json").exists():
        return "transformer" if "condition" in json.loads(config.read_text())["model"] else "vqgan"
    raise UserError(f"{key}={path}: no trained model there (no config.json and no {checkpoints.STAGE_RECORD})")


def _check_kind(path: Path, key: str, found: str, needed: str) -> None:
    if found != needed:
        use = {
            "vqgan": "a VQGAN alone reconstructs (evaluate.py) and serves train_transformer.py as --config.vqgan",
            "transformer": "its first stage is in its folder first_stage/",
        }[found]
        raise UserError(f"{key}={path}: holds a {found}, a {needed} is needed; {use}")


def _read_reference(path: Path, key: str, kind: str, folders: tuple[str, ...]) -> dict[str, Trained]:
    """The stages of a checkpoint of the reference, as far as it has them."""
    with reference.open_checkpoint(path) as opened:
        _check_kind(path, key, opened.kind, kind)
        trees = {name: opened.read(name) for name in folders if name in opened.stages}
        return {
            name: Trained(opened.stages[name].record, tree["params"], tree.get("collections", {}), {})
            for name, tree in trees.items()
        }


def load_tokenizer(path: str | Path, *, key: str, dtype: Any = jnp.float32) -> tuple[Tokenizer, Tree, Trained]:
    """A trained VQGAN as tokenizer, its variables (numpy), and what it was read from."""
    trained = load_trained(path, key=key, kind="vqgan")
    return make_tokenizer(trained, path, dtype), trained.variables("generator"), trained


def make_tokenizer(trained: Trained, path: str | Path, dtype: Any) -> Tokenizer:
    """The tokenizer of a VQGAN that was read from `path`."""
    return Tokenizer(VQGAN(VQGANConfig.from_config(trained.model_config, key=f"{path}: model"), dtype))


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
      UserError: no first stage named, or none there.
    """
    wanted = {FIRST_STAGE: ("config.vqgan", config.vqgan)}
    if config.model.condition.name == "image":
        wanted[COND_STAGE] = ("config.cond_vqgan", config.cond_vqgan)
    # Before the first checkpoint the config may still change its mind; after it the copies are what was trained on.
    started = any((workdir / CHECKPOINTS).glob("[0-9]*"))
    for name, (key, path) in wanted.items():
        folder = workdir / name
        there = (folder / checkpoints.STAGE_RECORD).exists()
        multihost_utils.sync_global_devices(f"looked for {name}")
        if there and (started or not path):
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
    folders = [name for name in (FIRST_STAGE, COND_STAGE) if name == FIRST_STAGE or (workdir / name).exists()]
    stages = {name: load_trained(workdir / name, key="--workdir", kind="vqgan") for name in folders}
    return _stages(workdir, stages, {name: _digest(workdir / name) for name in folders}, dtype)


def _stages(path: Path, trained: Mapping[str, Trained], digest: dict[str, str], dtype: Any) -> Stages:
    first, cond = (
        make_tokenizer(trained[name], path / name, dtype) if name in trained else None
        for name in (FIRST_STAGE, COND_STAGE)
    )
    frozen = {"first_stage": trained[FIRST_STAGE].variables("generator")}
    if cond is not None:
        frozen[f"cond/{cond.config.input_key}"] = trained[COND_STAGE].variables("generator")
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

    def samples(
        self, labels: np.ndarray, grid: tuple[int, int], *, seed: int, batch: int, strategy: Strategy
    ) -> Iterator[np.ndarray]:
        """Draws one picture a label, `batch` at a time: uint8 [up to batch, h, w, c]. Picture i depends on the seed and
        on i, not on the batch. One compiled shape: the last batch is filled up and cut."""
        draw, decode = make_sampler(self.model, grid), jax.jit(self.model.decode)
        for start in range(0, len(labels), batch):
            indices = np.arange(start, start + batch)
            rows = {"label": jnp.asarray(labels[indices % len(labels)])}
            condition = self.model.condition.tokens(self.frozen, rows)
            ids = draw(self.split, condition, row_keys(seed, jnp.asarray(indices)), strategy, None)
            yield to_uint8(np.asarray(decode(self.frozen, ids)))[: len(labels) - start]


def open_transformer(
    workdir: str | Path, *, key: str, best: bool = True, dtype: Any = jnp.float32
) -> TrainedTransformer:
    """Opens a stage-2 workdir for sampling and scoring, by default its best checkpoint; or a file of the reference."""
    workdir = Path(workdir)
    if workdir.is_file():
        read = _read_reference(workdir, key, "transformer", (reference.ROOT, FIRST_STAGE, COND_STAGE))
        trained = read.pop(reference.ROOT)
        stages = _stages(workdir, read, dict.fromkeys(read, trained.record["imported"]["sha256"]), dtype)
    else:
        trained = load_trained(workdir, key=key, kind="transformer", best=best)
        stages = open_stages(workdir, dtype)
    config = TransformerConfig.from_config(trained.model_config, key=f"{workdir}: model")
    model = ImageTransformer(config, stages.first, stages.cond, dtype)
    return TrainedTransformer(model, trained.variables("transformer")["params"], stages.frozen, stages, trained.record)


def load_vqgan(path: str | Path) -> PretrainedVQGAN:
    """A trained VQGAN from a workdir, an imported directory, or a .ckpt of the reference (YAML of the same stem)."""
    tokenizer, variables, _ = load_tokenizer(path, key="path")
    return PretrainedVQGAN(tokenizer, variables)


def load_transformer(path: str | Path) -> PretrainedTransformer:
    """A trained transformer with its stages, from the same kinds of places as `load_vqgan`."""
    trained = open_transformer(path, key="path")
    return PretrainedTransformer(trained.model, trained.params, trained.frozen)
