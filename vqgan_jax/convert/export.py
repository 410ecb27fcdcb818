"""Our models as files for the reference: tensors under its names, and the YAML that says the rest."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import yaml
from etils import epath
from flax.traverse_util import flatten_dict

from vqgan_jax import conditioning, storage
from vqgan_jax.config import GPT2, UserError
from vqgan_jax.convert import detect, names
from vqgan_jax.convert.reference import PREFIXES, transformer_slots, vqgan_slots
from vqgan_jax.convert.slots import Slot
from vqgan_jax.convert.stream import Entry, write_safetensors
from vqgan_jax.models.attention import attention_mask
from vqgan_jax.models.discriminators import PatchGANConfig
from vqgan_jax.models.quantizers import EMAConfig, GumbelConfig, VQConfig
from vqgan_jax.models.vqgan import VQGANConfig
from vqgan_jax.object_tokens import FLAGS
from vqgan_jax.ordering import inverse
from vqgan_jax.train.setup import COND_STAGE, FIRST_STAGE
from vqgan_jax.transformer import ImageTransformer

Tree = Mapping[str, Any]
_QUANTIZERS = (VQConfig, EMAConfig, GumbelConfig)
_THEIR_KEYS = {ours: theirs for theirs, ours in reversed(detect.BATCH_KEYS.items())}


@dataclasses.dataclass(frozen=True)
class Network:
    """A VQGAN to be written: {"params": {network: tree}, "collections": {network: tree}} and its configuration."""

    config: VQGANConfig
    arrays: Tree

    @property
    def discriminator(self) -> PatchGANConfig | None:
        """The discriminator that the file can hold: what the reference has no name for only trained the model."""
        found = self.config.discriminator if "discriminator" in self.arrays["params"] else None
        return found if isinstance(found, PatchGANConfig) and not found.spectral_norm else None


def export_vqgan(path: epath.Path, network: Network) -> None:
    """Writes `path` (.safetensors) and the YAML of the same stem, with the discriminator where the reference has such.

    Raises:
      UserError: something that the reference has no name for.
    """
    _write(path, list(_vqgan_entries(network, "")), _vqgan_section(network))


def export_transformer(path: epath.Path, model: ImageTransformer, params: Tree, stages: Mapping[str, Network]) -> None:
    """Writes `path` (.safetensors) with the frozen stages inside, and the YAML of the same stem.

    Args:
      path: the file.
      model: the transformer.
      params: its stacked parameters.
      stages: by FIRST_STAGE and COND_STAGE.

    Raises:
      UserError: something that the reference has no name for.
    """
    if not model.config.shared_vocabulary:
        raise UserError(
            "--to=torch: the reference knows no model.shared_vocabulary=False: its conditions share the codes' ids"
        )
    architecture = model.config.transformer
    if modern := [name for name, value in GPT2.items() if getattr(architecture, name) != value]:
        raise UserError(
            f"--to=torch: the reference knows no model.transformer.{modern[0]}={getattr(architecture, modern[0])!r}"
        )
    entries = [entry for name, stage in stages.items() for entry in _vqgan_entries(stage, PREFIXES[name])]
    entries += _entries(transformer_slots(model), {"params": {"transformer": params}})
    gpt = model.gpt
    mask = np.asarray(attention_mask(model.attend, gpt.prefix, gpt.block_size, gpt.block_size), np.float32)[None, None]
    entries += [_constant(f"transformer.blocks.{i}.attn.mask", mask) for i in range(gpt.layers)]
    if model.config.order != "row_major":
        entries.append(_constant("permuter.forward_shuffle_idx", model.order.astype(np.int64)))
        entries.append(_constant("permuter.backward_shuffle_idx", inverse(model.order).astype(np.int64)))
    _write(path, entries, *_transformer_sections(model, stages))


def _write(path: epath.Path, entries: list[Entry], model: Tree, data: Tree | None = None) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"--out={path}: with --to=torch the name of a .safetensors file")
    try:
        write_safetensors(path, entries)
        storage.write_text(path.with_suffix(".yaml"), yaml.safe_dump({"model": model, **(data or {})}, sort_keys=False))
    except OSError as error:
        raise UserError(f"--out={path}: cannot be written ({error.strerror or error})") from None


def _vqgan_entries(network: Network, prefix: str) -> Iterator[Entry]:
    config, arrays = network.config, network.arrays
    if not isinstance(config.quantizer, _QUANTIZERS) or getattr(config.quantizer, "normalize", False):
        kind = type(config.quantizer).__name__.removesuffix("Config")
        raise UserError(f"--to=torch: the reference has no quantizer like this {kind} of model.quantizer")
    if unknown := [
        name
        for name, ours, theirs in (
            ("stem", config.autoencoder.stem, 1),
            ("decoder_extra_blocks", config.autoencoder.decoder_extra_blocks, 1),
            ("mid_attention", config.autoencoder.mid_attention, True),
        )
        if ours != theirs
    ]:
        raise UserError(f"--to=torch: the reference has no such model.autoencoder.{unknown[0]}")
    if isinstance(config.quantizer, EMAConfig):
        # Running means are a codebook like any other once training is over.
        book = arrays["collections"]["generator"]["codebook"]["quantizer"]["codes"]
        generator = {**arrays["params"]["generator"], "quantizer": {"codebook": book}}
        arrays = {**arrays, "params": {**arrays["params"], "generator": generator}}
        q = config.quantizer
        config = dataclasses.replace(
            config, quantizer=VQConfig(q.codebook_size, q.dim, 1.0, 0.25, 0.0, 0.99, False, "uniform")
        )
    config = dataclasses.replace(config, discriminator=network.discriminator)
    yield from _entries(vqgan_slots(config, prefix), arrays)
    if config.discriminator is not None and config.discriminator.norm == "batch":
        for k in range(1, config.discriminator.layers + 1):
            name = f"{prefix}loss.discriminator.main.{3 * k}.num_batches_tracked"
            yield _constant(name, np.zeros((), np.int64))
    if config.input_key == "segmentation":
        colours = np.random.RandomState(0).standard_normal((3, config.autoencoder.in_channels, 1, 1))
        yield _constant(f"{prefix}colorize", colours.astype(np.float32))


def _entries(slots: tuple[Slot, ...], arrays: Tree) -> Iterator[Entry]:
    flat = flatten_dict(dict(arrays), sep="/")
    for slot in slots:
        if not slot.keys:  # ActNorm's learned part, added to its start below
            continue
        value = np.asarray(flat[slot.path])
        if slot.path.startswith("collections/"):
            learned = f"params/discriminator/{'/'.join(slot.path.split('/')[-2:])}"
            if slot.dtype == np.bool_:
                value = value.astype(np.uint8)
            elif learned in flat:
                value = value + np.asarray(flat[learned])
        for key, piece in zip(slot.keys, value if slot.stacked else [value], strict=True):
            yield _constant(key.name, names.to_reference(piece, key.layout))


def _constant(name: str, array: np.ndarray) -> Entry:
    return Entry(name, array.shape, array.dtype, lambda: [array])


def _vqgan_section(network: Network, stage: bool = False) -> dict[str, Any]:
    config = network.config
    c, q = config.autoencoder, config.quantizer
    params: dict[str, Any] = {
        "embed_dim": q.dim,
        "n_embed": q.codebook_size,
        "image_key": _THEIR_KEYS[config.input_key],
        "ddconfig": {
            "double_z": False,
            "z_channels": c.z_channels,
            "resolution": c.resolution,
            "in_channels": c.in_channels,
            "out_ch": c.out_channels,
            "ch": c.channels,
            "ch_mult": list(c.multipliers),
            "num_res_blocks": c.blocks,
            "attn_resolutions": list(c.attention_resolutions),
            "dropout": c.dropout,
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    }
    target = "VQModel"
    if config.input_key == "segmentation":
        target, params["n_labels"] = "VQSegmentationModel", c.in_channels
        params["lossconfig"] = {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}
    if isinstance(q, GumbelConfig):
        target, params["kl_weight"] = "GumbelVQ", q.kl_weight
        counted = q.temperature_steps.isdecimal()  # else in shares of a run that is over: what it came to
        start = q.temperature_start if counted else q.temperature_end
        schedule = {
            "warm_up_steps": 0,
            "lr_start": start,
            "lr_max": start,
            "lr_min": q.temperature_end,
            "max_decay_steps": int(q.temperature_steps) if counted else 1,
        }
        scheduler = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"
        params["temperature_scheduler_config"] = {"target": scheduler, "params": schedule}
    if (d := network.discriminator) and not stage:
        params["lossconfig"] = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {
                "disc_start": 0,
                "disc_in_channels": c.out_channels,
                "disc_num_layers": d.layers,
                "disc_ndf": d.channels,
                "use_actnorm": d.norm == "actnorm",
            },
        }
    return {"target": f"taming.models.vqgan.{target}", "params": params}


def _transformer_sections(model: ImageTransformer, stages: Mapping[str, Network]) -> tuple[dict, dict]:
    """The YAML's sections: `model`, and `data` where the condition's tokens are described there."""
    a, gpt, condition, data = model.config.transformer, model.gpt, model.condition, {}
    first = _vqgan_section(stages[FIRST_STAGE], stage=True)
    params: dict[str, Any] = {
        "first_stage_key": first["params"]["image_key"],
        "transformer_config": {
            "target": "taming.modules.transformer.mingpt.GPT",
            "params": {
                "vocab_size": gpt.vocab_size,
                "block_size": gpt.block_size,
                "n_layer": gpt.layers,
                "n_head": gpt.heads,
                "n_embd": gpt.width,
                "n_unmasked": gpt.prefix,
                "embd_pdrop": a.embed_dropout,
                "resid_pdrop": a.residual_dropout,
                "attn_pdrop": a.attention_dropout,
            },
        },
        "first_stage_config": first,
    }
    order = next(theirs for theirs, ours in detect.ORDERS.items() if ours == model.config.order)
    grid = dict(zip("HW", model.config.grid, strict=True))
    permuter = {"target": f"taming.modules.transformer.permuter.{order}"}
    params["permuter_config"] = permuter if order == "Identity" else {**permuter, "params": grid}
    match condition:
        case conditioning.Unconditional():
            params |= {"cond_stage_config": "__is_unconditional__", "unconditional": True}
        case conditioning.ClassLabel():
            stage = {"target": "taming.modules.util.Labelator", "params": {"n_classes": condition.classes}}
            params |= {"cond_stage_key": "class_label", "cond_stage_config": stage}
        case conditioning.EncodedImage():
            stage = _vqgan_section(stages[COND_STAGE], stage=True)
            params |= {"cond_stage_key": stage["params"]["image_key"], "cond_stage_config": stage}
        case conditioning.Coordinates():
            c = condition.config
            if c.scheme != "raster":
                raise UserError("--to=torch: the reference knows coordinates of model.condition.scheme='raster' only")
            stage = {"target": "taming.modules.misc.coord.CoordStage"}
            stage["params"] = {"n_embed": c.codes, "down_factor": c.factor}
            params |= {"cond_stage_key": "coord", "cond_stage_config": stage}
        case conditioning.Objects():
            c = condition.config
            key = next(theirs for theirs, ours in detect.OBJECT_KEYS.items() if ours == c.kind)
            stage = {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": key}}
            params |= {"cond_stage_key": key, "cond_stage_config": stage}
            described = {
                "max_objects_per_image": c.max_objects,
                "no_tokens": c.vocab,
                "no_object_classes": c.classes,
                "encode_crop": c.crop,
                "use_group_parameter": FLAGS[0] in c.flags,
                "use_additional_parameters": set(FLAGS[1:]) <= set(c.flags),
            }
            data = {"data": {"params": {"train": {"params": described}}}}
        case _:
            raise UserError("--to=torch: the reference knows no model.condition like this one, such as several at once")
    return {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}, data
