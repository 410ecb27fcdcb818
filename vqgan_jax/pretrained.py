"""The front door: trained models from our workdirs, portable stages and the reference's checkpoints, ready to use.

`load_vqgan` and `load_transformer` are for notebooks (what they return: front_door.py), the rest for the scripts.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vqgan_jax import parallel, storage
from vqgan_jax.conditioning import encoded_keys
from vqgan_jax.config import UserError, plain, upgrade, upgrade_model
from vqgan_jax.convert import reference
from vqgan_jax.front_door import PretrainedTransformer, PretrainedVQGAN
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.train import checkpoints, portable, setup, used_codes
from vqgan_jax.train.setup import CHECKPOINTS, COND_STAGE, FIRST_STAGE, cond_folders
from vqgan_jax.train.transformer_step import REFERENCE
from vqgan_jax.trained_transformer import Stages, TrainedTransformer
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


def load_trained(
    path: str | os.PathLike, *, key: str, kind: str, best: bool = False, step: int | None = None
) -> Trained:
    """Reads a run's newest whole checkpoint, a portable stage, or a file of the reference.

    Args:
      path: a workdir of ours, a folder with `stage.json`, or a .ckpt of the reference with its YAML beside it.
      key: the flag or config key that named it, for the error's text.
      kind: "vqgan" or "transformer", what it must be.
      best: the best checkpoint by the run's metric instead of the newest.
      step: of a run, the checkpoint after so many steps.

    Raises:
      UserError: nothing there, another kind, or damaged.
    """
    path = storage.path(path)
    if path.is_file():
        return _read_reference(path, key, kind, (reference.ROOT,))[reference.ROOT]
    if (path / portable.STAGE_RECORD).exists():
        tree, record = portable.read_stage(path)
    elif (path / CHECKPOINTS).is_dir():
        tree, record = checkpoints.load(path / CHECKPOINTS, step=step, only=("params", "collections", "ema"), best=best)
    else:
        raise UserError(f"{key}={path}: no workdir there (no checkpoints/ and no {portable.STAGE_RECORD})")
    record = upgrade(record)
    _check_kind(path, key, record["kind"], kind)
    return Trained(record, tree.get("params", {}), tree.get("collections", {}), tree.get("ema", {}))


def kind_of(path: str | os.PathLike, *, key: str) -> str:
    """Whether `path`, as `load_trained` takes it, holds a "vqgan" or a "transformer". Raises UserError for neither."""
    path = storage.path(path)
    if path.is_file():
        with reference.open_checkpoint(path) as opened:
            return opened.kind
    if (stage := path / portable.STAGE_RECORD).exists():
        return json.loads(stage.read_text())["record"]["kind"]
    if (config := path / "config.json").exists():
        return "transformer" if "condition" in json.loads(config.read_text())["model"] else "vqgan"
    raise UserError(f"{key}={path}: no trained model there (no config.json and no {portable.STAGE_RECORD})")


def read_model(path: str | os.PathLike, *, key: str) -> Mapping[str, Any]:
    """`config.model` of the VQGAN that `load_trained` would read, without its arrays. Raises UserError as that does."""
    path = storage.path(path)
    _check_kind(path, key, kind_of(path, key=key), "vqgan")
    if path.is_file():
        with reference.open_checkpoint(path) as opened:
            return opened.stages[reference.ROOT].record["config"]["model"]
    if (stage := path / portable.STAGE_RECORD).exists():
        return upgrade(json.loads(stage.read_text())["record"])["config"]["model"]
    return upgrade_model(json.loads((path / "config.json").read_text())["model"])


def _check_kind(path: epath.Path, key: str, found: str, needed: str) -> None:
    if found != needed:
        use = {
            "vqgan": "a VQGAN alone reconstructs (evaluate.py) and serves train_transformer.py as --config.vqgan",
            "transformer": "its first stage is in its folder first_stage/",
        }[found]
        raise UserError(f"{key}={path}: holds a {found}, a {needed} is needed; {use}")


def _read_reference(path: epath.Path, key: str, kind: str, folders: tuple[str, ...]) -> dict[str, Trained]:
    """The stages of a checkpoint of the reference, as far as it has them."""
    with reference.open_checkpoint(path) as opened:
        _check_kind(path, key, opened.kind, kind)
        if FIRST_STAGE in folders:
            check_stages(opened)
        trees = {name: opened.read(name) for name in folders if name in opened.stages}
        return {
            name: Trained(opened.stages[name].record, tree["params"], tree.get("collections", {}), {})
            for name, tree in trees.items()
        }


def load_tokenizer(
    path: str | os.PathLike, *, key: str, dtype: Any = jnp.float32, step: int | None = None
) -> tuple[Tokenizer, Tree, Trained]:
    """A trained VQGAN as tokenizer, its variables (numpy), and what it was read from."""
    trained = load_trained(path, key=key, kind="vqgan", step=step)
    return make_tokenizer(trained, path, dtype), trained.variables("generator"), trained


def check_stages(opened: reference.Checkpoint) -> None:
    """Raises UserError of a transformer's file without the first stage that it needs."""
    if opened.kind == "transformer" and FIRST_STAGE not in opened.stages:
        file = opened.tensors.path
        raise UserError(
            f"{file}: a transformer of LlamaGen, whose tokenizer is a file of its own; import both: "
            f"python -m vqgan_jax.tools.convert --checkpoint={file} --first_stage=vq_ds16_c2i.pt --out=FOLDER"
        )


def make_tokenizer(trained: Trained, path: str | os.PathLike, dtype: Any) -> Tokenizer:
    """The tokenizer of a VQGAN that was read from `path`."""
    return Tokenizer(VQGAN(VQGANConfig.from_config(trained.model_config, key=f"{path}: model"), dtype))


def write_stage(directory: epath.Path, trained: Trained, network: str) -> None:
    """Copies one sampled network of a run as a portable stage: EMA parameters as the parameters, and its statistics."""
    variables = trained.variables(network)
    params = variables.pop("params")
    tree = {"params": {network: params}}
    if variables:
        tree["collections"] = {network: variables}
    portable.write_stage(directory, tree, trained.record)


def adopt_stages(config: ConfigDict, workdir: epath.Path, dtype: Any) -> Stages:
    """Copies the VQGANs that a stage-2 config names into its workdir, unless they are there, and opens the copies.

    Raises:
      UserError: no first stage named, none for an encoded condition, one for nothing, none there, or after the first
        checkpoint another one.
    """
    # Before the first checkpoint the config may still change its mind; after it the copies are what was trained on.
    started = any((workdir / CHECKPOINTS).glob("[0-9]*"))
    for key, names in _needed(config).items():
        there = all((workdir / name / portable.STAGE_RECORD).exists() for name in names)
        multihost_utils.sync_global_devices(f"looked for {key}")
        if there and (started or not config[key]):
            if config[key]:
                _check_adopted(config, workdir, key)
            continue
        for name, trained in _load_named(config, key).items():
            if jax.process_index() == 0:
                write_stage(workdir / name, trained, "generator")
        multihost_utils.sync_global_devices(f"copied {key}")
    return open_stages(workdir, _encoded(config), dtype)


def _check_adopted(config: ConfigDict, workdir: epath.Path, key: str) -> None:
    """Raises UserError where a run that has begun is told of other VQGANs than its copies. Those of the name that it
    began with may have been trained on or be gone."""
    recorded = workdir / "config.json"
    if not recorded.exists() or json.loads(recorded.read_text()).get(key) == config[key]:
        return
    unpruned = config.copy_and_resolve_references()
    unpruned.remap = False
    try:
        named = _load_named(unpruned, key)
    except UserError:  # moved, or gone
        return
    for name, trained in named.items():
        kept = load_trained(workdir / name, key="--workdir", kind="vqgan")
        if different := difference(kept, _pruned_as(kept, trained)):
            raise UserError(
                f"config.{key}={config[key]}: the run in --workdir={workdir} was trained on another one, of which it "
                f"keeps a copy in {name}/ ({different} differs); leave the key out or name another folder, and give a "
                "decoder that was trained on to sample.py as --first_stage"
            )


def adopt_reference(config: ConfigDict, workdir: epath.Path) -> Tree:
    """The parameters of `config.init_from` as CCA contrasts with them, from a copy in the workdir that is made before
    the first checkpoint; the run that they come from may go on, or go away.

    Raises:
      UserError: no transformer there, or the copy is damaged.
    """
    folder = workdir / REFERENCE
    kept = any((workdir / CHECKPOINTS).glob("[0-9]*")) and (folder / portable.STAGE_RECORD).exists()
    multihost_utils.sync_global_devices("looked for the reference")
    if not kept:
        trained = load_trained(config.init_from, key="config.init_from", kind="transformer")
        if jax.process_index() == 0:
            write_stage(folder, trained, "transformer")
        multihost_utils.sync_global_devices("copied the reference")
    return load_trained(folder, key="config.init_from", kind="transformer").params["transformer"]


def open_named_stages(config: ConfigDict, dtype: Any) -> Stages:
    """Opens the VQGANs that a stage-2 config names where they lie. Their hashes are those of their copies in a workdir.

    Raises:
      UserError: as `adopt_stages`.
    """
    trained = {name: stage for key in _needed(config) for name, stage in _load_named(config, key).items()}
    digest = {}
    with tempfile.TemporaryDirectory(prefix="vqgan_jax.") as folder:
        for name, stage in trained.items():
            write_stage(storage.path(folder) / name, stage, "generator")
            digest[name] = _digest(storage.path(folder) / name)
    return _stages(storage.path(config.vqgan), trained, digest, dtype)


def _encoded(config: ConfigDict) -> tuple[str, ...]:
    """The batch keys that the config's condition encodes."""
    return encoded_keys(TransformerConfig.from_config(config.model).condition)


def _needed(config: ConfigDict) -> dict[str, list[str]]:
    """By config key the stages that the config asks for, as folders of a workdir."""
    encoded = cond_folders(_encoded(config))
    return {"vqgan": [FIRST_STAGE]} | ({"cond_vqgan": list(encoded.values())} if encoded else {})


def _load_named(config: ConfigDict, key: str) -> dict[str, Trained]:
    """The VQGANs that `config.vqgan` or `config.cond_vqgan` (several with commas between) names, by folder."""
    flag = f"config.{key}"
    paths = [config[key]] if key == "vqgan" else [path.strip() for path in config[key].split(",")]
    if not all(paths):
        raise UserError(f"{flag}: name the workdir of a trained VQGAN")
    read = [load_trained(path, key=flag, kind="vqgan") for path in paths]
    if key == "vqgan":
        return {FIRST_STAGE: _with_used_codes(config, read[0]) if config.remap else read[0]}
    folders, found = cond_folders(_encoded(config)), {}
    for path, trained in zip(paths, read, strict=True):
        encodes = trained.model_config["input_key"]
        if encodes not in folders:
            raise UserError(f"{flag}={path}: that VQGAN encodes '{encodes}', the condition is '{', '.join(folders)}'")
        if folders[encodes] in found:
            raise UserError(
                f"{flag}={path}: the second VQGAN of '{encodes}'; name one for each of {', '.join(folders)}"
            )
        found[folders[encodes]] = trained
    if missing := [encodes for encodes, folder in folders.items() if folder not in found]:
        raise UserError(
            f"{flag}: a '{missing[0]}' condition needs the workdir of its VQGAN; write several with commas between"
        )
    return found


def _with_used_codes(config: ConfigDict, trained: Trained) -> Trained:
    """A first stage without the codes that the training pictures do not use: `config.remap`.

    Raises:
      UserError: a quantizer without a codebook, or codes that are made already.
    """
    if config.codes:
        raise UserError(
            f"config.remap: the codes in {config.codes} are made already; make them with vqgan_jax.tools.encode "
            "--config.remap=True, then train with --config.vqgan=DIR/first_stage of its folder in place of this"
        )
    tokenizer = make_tokenizer(trained, config.vqgan, setup.dtype_of(config))
    used = used_codes.find(config, tokenizer, trained.variables("generator"))
    parallel.say(f"config.remap: {len(used)} of {tokenizer.codebook_size} codes are in use; the others are left out")
    return _pruned(trained, used)


def _pruned(trained: Trained, used: np.ndarray) -> Trained:
    """A VQGAN with the codes `used` alone."""
    model = used_codes.prune_model(trained.model_config, len(used))
    record = {**trained.record, "config": {**trained.record["config"], "model": model}, "used_codes": used.tolist()}
    trees = (used_codes.prune(tree, used) for tree in (trained.params, trained.collections, trained.ema))
    return Trained(record, *trees)


def _pruned_as(kept: Trained, other: Trained) -> Trained:
    """`other` with the codes alone that `kept` was left with, where it has all of them still."""
    used = kept.record.get("used_codes")
    if not used or other.record.get("used_codes"):
        return other
    left, codes = (x.model_config["quantizer"].get("codebook_size", 0) for x in (kept, other))
    return _pruned(other, np.asarray(used)) if left != codes > max(used) else other


def difference(one: Trained, other: Trained, *, besides: Sequence[str] = ()) -> str:
    """The first key of the config or array by which two VQGANs differ in a bit, "" where there is none; `besides` are
    parts of the generator that may."""
    for key in ("input_key", "autoencoder", "quantizer"):
        if plain({key: one.model_config[key]}) != plain({key: other.model_config[key]}):
            return f"model.{key}"
    ours, theirs = flatten_dict(one.variables("generator")), flatten_dict(other.variables("generator"))
    for path in sorted(ours.keys() | theirs.keys()):
        if path[1] in besides:
            continue
        if path not in ours or path not in theirs or not np.array_equal(ours[path], theirs[path]):
            return "/".join(path[1:])
    return ""


def _decoder_of(path: str | os.PathLike, kept: Trained) -> Trained:
    """The VQGAN at `path`, of the codes of `kept`: the same encoder and codebook, its decoder trained on.

    Raises:
      UserError: no VQGAN there, or it has other codes.
    """
    other = _pruned_as(kept, load_trained(path, key="--first_stage", kind="vqgan"))
    if different := difference(kept, other, besides=("decoder", "post_quant")):
        raise UserError(
            f"--first_stage={path}: its codes are not those that the transformer was trained on ({different} differs); "
            "train the decoder alone: --config.init_from with --config.train_only"
        )
    return other


def open_stages(workdir: epath.Path, encoded: Sequence[str], dtype: Any, first_stage: str = "") -> Stages:
    """Opens the copies of the frozen stages in a stage-2 workdir; `encoded` are the batch keys of its condition that
    have a VQGAN, `first_stage` a VQGAN of the same codes to decode with."""
    folders = (FIRST_STAGE, *cond_folders(encoded).values())
    stages = {name: load_trained(workdir / name, key="--workdir", kind="vqgan") for name in folders}
    if first_stage:
        stages[FIRST_STAGE] = _decoder_of(first_stage, stages[FIRST_STAGE])
    return _stages(workdir, stages, {name: _digest(workdir / name) for name in folders}, dtype)


def _stages(path: epath.Path, trained: Mapping[str, Trained], digest: dict[str, str], dtype: Any) -> Stages:
    tokenizers = {name: make_tokenizer(stage, path / name, dtype) for name, stage in trained.items()}
    first = tokenizers.pop(FIRST_STAGE)
    frozen = {"first_stage": trained[FIRST_STAGE].variables("generator")}
    for name, tokenizer in tokenizers.items():
        frozen[f"cond/{tokenizer.config.input_key}"] = trained[name].variables("generator")
    return Stages(first, by_input_key(tokenizers.values()), frozen, digest)


def _digest(folder: epath.Path) -> str:
    return json.loads((folder / portable.STAGE_RECORD).read_text())["sha256"]


def open_transformer(
    workdir: str | os.PathLike,
    *,
    key: str,
    best: bool = True,
    step: int | None = None,
    dtype: Any = jnp.float32,
    first_stage: str = "",
) -> TrainedTransformer:
    """Opens a stage-2 workdir for sampling and scoring, by default its best checkpoint, else that after `step` steps;
    or a file of the reference.

    Raises:
      UserError: nothing there, or `first_stage`, a VQGAN to decode with in place of the workdir's, has other codes.
    """
    workdir = storage.path(workdir)
    read = {}
    if workdir.is_file():
        read = _read_reference(workdir, key, "transformer", (reference.ROOT, FIRST_STAGE, COND_STAGE))
        trained = read.pop(reference.ROOT)
    else:
        trained = load_trained(workdir, key=key, kind="transformer", best=best, step=step)
    config = TransformerConfig.from_config(trained.model_config, key=f"{workdir}: model")
    if read:
        if first_stage:
            read[FIRST_STAGE] = _decoder_of(first_stage, read[FIRST_STAGE])
        stages = _stages(workdir, read, dict.fromkeys(read, trained.record["imported"]["sha256"]), dtype)
    else:
        stages = open_stages(workdir, encoded_keys(config.condition), dtype, first_stage)
    model = ImageTransformer(config, stages.first, stages.cond, dtype)
    return TrainedTransformer(model, trained.variables("transformer")["params"], stages.frozen, stages, trained.record)


def load_vqgan(path: str | os.PathLike) -> PretrainedVQGAN:
    """A trained VQGAN from a workdir, an imported directory, or a .ckpt of the reference (YAML of the same stem)."""
    tokenizer, variables, _ = load_tokenizer(path, key="path")
    return PretrainedVQGAN(tokenizer, variables)


def load_transformer(path: str | os.PathLike) -> PretrainedTransformer:
    """A trained transformer with its stages, from the same kinds of places as `load_vqgan`."""
    trained = open_transformer(path, key="path")
    return PretrainedTransformer(trained.model, trained.params, trained.frozen)
