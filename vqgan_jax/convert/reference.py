"""Checkpoints of the reference (CompVis/taming-transformers) as our stages, strict both ways, one tensor at a time.

Each array of ours is a `Slot` that knows the file's tensors it is made of. What no slot takes must be a known buffer.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from vqgan_jax import storage
from vqgan_jax.config import FORMAT_VERSION, UserError, choose
from vqgan_jax.convert import detect, llamagen, llamagen_tokenizer, names
from vqgan_jax.convert.settings import Settings, read_settings
from vqgan_jax.convert.slots import Slot, Stage
from vqgan_jax.convert.stream import Entry, write_safetensors
from vqgan_jax.models.discriminators import PatchGAN, PatchGANConfig
from vqgan_jax.models.quantizers import GumbelConfig
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.torch_files import TensorFile, open_tensors
from vqgan_jax.train.portable import STAGE_ARRAYS, STAGE_RECORD
from vqgan_jax.train.setup import CHECKPOINTS, COND_STAGE, FIRST_STAGE
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

ROOT = ""  # the stage that the working directory itself is
PREFIXES = {FIRST_STAGE: "first_stage_model.", COND_STAGE: "cond_stage_model."}
LPIPS = r"loss\.perceptual_loss\.(net\.slice[1-5]\.\d+\.(weight|bias)|lin[0-4]\.model\.1\.weight)"
_LPIPS_SCALING = r"loss\.perceptual_loss\.scaling_layer\.(shift|scale)"
_STAGE = r"((first|cond)_stage_model\.)?"
BUFFERS = {  # what a file may hold beyond our arrays, and what it is
    _STAGE + LPIPS: "LPIPS (--lpips_out takes it out)",
    _STAGE + _LPIPS_SCALING: "LPIPS (--lpips_out takes it out)",
    _STAGE + r"loss\.discriminator\.main\.\d+\.num_batches_tracked": "BatchNorm's step counts",
    _STAGE + r"colorize": "colours of segmentations",
    _STAGE + r"quantize\.temperature": "the Gumbel temperature",
    r"transformer\.blocks\.\d+\.attn\.mask": "attention masks",
    r"permuter\.(forward|backward)_shuffle_idx": "the token order",
}


def vqgan_slots(
    config: VQGANConfig, prefix: str = "", rename: Callable[[str], str] = lambda name: name
) -> tuple[Slot, ...]:
    """The arrays of a VQGAN in the reference's terms, its discriminator included where it has one. `rename` makes of a
    name of the reference that of another project of the same architecture."""
    c = config.autoencoder
    quantizer = "gumbel" if isinstance(config.quantizer, GumbelConfig) else "vq"
    images = jnp.zeros((1, c.factor * 2, c.factor * 2, c.in_channels))
    shapes = _shapes(lambda: VQGAN(config).init({"params": jax.random.key(0)}, images))["params"]
    slots = [
        Slot(f"params/generator/{path}", shape, (_renamed(names.generator_key(path, quantizer), prefix, rename),))
        for path, shape in shapes.items()
    ]
    if config.discriminator is not None:
        slots += _discriminator_slots(config.discriminator, c.out_channels, f"{prefix}loss.discriminator.main.")
    return tuple(slots)


def _discriminator_slots(config: PatchGANConfig, channels: int, prefix: str) -> Iterator[Slot]:
    side = 64 * 2**config.layers
    images = jnp.zeros((1, side, side, channels))
    trees = _shapes(lambda: PatchGAN(config).init(jax.random.key(0), images))
    for collection, shapes in trees.items():
        folder = "params/discriminator" if collection == "params" else f"collections/discriminator/{collection}"
        for path, shape in shapes.items():
            key, dtype = names.discriminator_key, np.dtype(np.float32)
            if config.norm == "actnorm" and path.startswith("norm"):
                # The file's values are the start; what is learned on top of it begins at zero.
                key = functools.partial(actnorm_key, prefix) if collection == "batch_stats" else None
                dtype = np.dtype(bool) if path.endswith("started") else dtype
                yield Slot(f"{folder}/{path}", shape, (key(path),) if key else (), dtype)
            else:
                yield Slot(f"{folder}/{path}", shape, (key(path, config.layers, prefix),))


def actnorm_key(prefix: str, path: str) -> names.Key:
    """What an ActNorm keeps: "norm_1/location", "norm_1/scale", "norm_1/started"."""
    module, leaf = path.split("/")
    number = 3 * int(module.removeprefix("norm_"))
    leaf, layout = {"location": ("loc", "channel"), "scale": ("scale", "channel"), "started": ("initialized", "same")}[
        leaf
    ]
    return names.Key(f"{prefix}{number}.{leaf}", layout)


def transformer_slots(model: ImageTransformer) -> tuple[Slot, ...]:
    """The arrays of a transformer in the reference's terms."""
    slots = []
    for path, shape in _shapes(lambda: {"params": model.init(jax.random.key(0))})["params"].items():
        stacked = path.startswith("blocks/")
        layers = range(shape[0]) if stacked else (None,)
        keys = tuple(names.gpt_key(path, layer, "transformer.") for layer in layers)
        slots.append(Slot(f"params/transformer/{path}", shape, keys, stacked=stacked))
    return tuple(slots)


def _shapes(init: Callable[[], Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Flat paths and shapes of each collection that `init` makes, without computing anything."""
    trees = nn.unbox(jax.eval_shape(init))
    return {
        name: {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()} for name, tree in trees.items()
    }


def _renamed(key: names.Key, prefix: str, rename: Callable[[str], str]) -> names.Key:
    return dataclasses.replace(key, name=prefix + rename(key.name))


class Checkpoint:
    """An open checkpoint of the reference: its stages by folder, and what of the file they leave out.

    Attributes:
      kind: "vqgan" or "transformer".
      stages: ROOT, and for a transformer of the reference FIRST_STAGE and, where there is one, COND_STAGE.
      left_out: number of tensors by what they are.
    """

    def __init__(self, tensors: TensorFile, settings: Settings):
        self.tensors = tensors
        self._imported = _provenance(tensors)
        self._settings = settings.section("model", "params")
        self._data = settings.section("data", "params", "train", "params")
        self.kind = "transformer" if "transformer.tok_emb.weight" in tensors else "vqgan"
        self._buffers = BUFFERS
        if llamagen.is_transformer(tensors):
            self.kind, self._buffers = "transformer", llamagen.BUFFERS
            self.stages = {ROOT: self._llamagen()}
        elif llamagen_tokenizer.is_tokenizer(tensors):
            self._buffers = llamagen_tokenizer.BUFFERS
            self.stages = {ROOT: self._llamagen_tokenizer()}
        elif self.kind == "transformer":
            self.stages = self._transformer()
        else:
            self.stages = {ROOT: self._vqgan("", self._settings)}
        self._check_shapes()
        self.left_out = self._check_names()

    @property
    def codes(self) -> int:
        """Codes of the VQGAN, or of that which a transformer was trained on."""
        if self.kind == "transformer" and FIRST_STAGE not in self.stages:
            return self.tensors.shape(llamagen.CODES)[0]
        model = self.stages[FIRST_STAGE if self.kind == "transformer" else ROOT].record["config"]["model"]
        return VQGANConfig.from_config(model, key=f"{self.tensors.path}: model").quantizer.codebook_size

    def read(self, folder: str = ROOT) -> dict[str, Any]:
        """One stage's arrays, as `portable.read_stage` would read them from the working directory."""
        flat = {slot.path: slot.read(self.tensors) for slot in self.stages[folder].slots}
        return unflatten_dict(flat, sep="/")

    def write(self, directory: epath.Path) -> None:
        """Writes every stage in its portable form (see `portable.write_stage`), one tensor in memory at a time.

        Raises:
          UserError: a run lies there, or it cannot be written.
        """
        if (directory / CHECKPOINTS).exists():
            raise UserError(f"--out={directory}: holds a training run; name another folder")
        try:
            for name, stage in self.stages.items():
                folder = directory / name
                # The record is the commit mark: while the arrays change, there is none.
                (folder / STAGE_RECORD).unlink(missing_ok=True)
                entries = [
                    Entry(slot.path, slot.shape, slot.dtype, functools.partial(slot.pieces, self.tensors))
                    for slot in stage.slots
                ]
                digest = write_safetensors(folder / STAGE_ARRAYS, entries)
                storage.write_json(folder / STAGE_RECORD, {"record": stage.record, "sha256": digest})
        except OSError as error:
            raise UserError(f"--out={directory}: cannot be written ({error.strerror or error})") from None

    def table(self) -> str:
        """What went where, for people."""
        rows = [("module", "tensors", "parameters")]
        for folder, stage in self.stages.items():
            tensors, sizes = Counter(), Counter()
            for slot in stage.slots:
                network = "/".join(filter(None, (folder, *slot.path.split("/")[1:2])))
                tensors[network] += len(slot.keys)
                sizes[network] += math.prod(slot.shape) * slot.path.startswith("params/") * bool(slot.keys)
            rows += [(network, f"{tensors[network]:,}", f"{sizes[network]:,}") for network in tensors]
        rows += [(f"left out: {what}", f"{count:,}", "") for what, count in self.left_out.items()]
        widths = [max(len(row[k]) for row in rows) for k in range(3)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)

    def _record(self, kind: str, model: Mapping[str, Any]) -> dict[str, Any]:
        imported = self._imported
        return {"format_version": FORMAT_VERSION, "kind": kind, "config": {"model": dict(model)}, "imported": imported}

    def _vqgan(self, prefix: str, settings: Settings, input_key: str | None = None) -> Stage:
        model = detect.vqgan_model(self._under(prefix), settings, input_key)
        config = VQGANConfig.from_config(model, key=f"{self.tensors.path}: {prefix}model")
        return Stage(self._record("vqgan", model), vqgan_slots(config, prefix))

    def _llamagen(self) -> Stage:
        """A transformer of LlamaGen; its tokenizer is a file of its own."""
        model = llamagen.transformer_model(self.tensors, self._settings)
        slots = llamagen.transformer_slots(model, self.tensors.shape(llamagen.CODES)[0])
        return Stage(self._record("transformer", model), slots)

    def _llamagen_tokenizer(self) -> Stage:
        model = llamagen_tokenizer.vqgan_model(self.tensors, self._settings)
        config = VQGANConfig.from_config(model, key=f"{self.tensors.path}: model")
        levels = len(config.autoencoder.multipliers)
        slots = vqgan_slots(config, rename=functools.partial(llamagen_tokenizer.llamagen_name, levels=levels))
        return Stage(self._record("vqgan", model), slots)

    def _transformer(self) -> dict[str, Stage]:
        settings = self._settings
        cond_prefix = PREFIXES[COND_STAGE]
        inside = f"{cond_prefix}encoder.conv_in.weight" in self.tensors
        condition = detect.condition(settings, self._data, inside)
        where = f"{settings.source}: {settings.path}.first_stage_key"
        first_key = choose(where, settings.text("first_stage_key", "image"), detect.BATCH_KEYS)
        first_settings = settings.section("first_stage_config", "params")
        stages = {FIRST_STAGE: self._vqgan(PREFIXES[FIRST_STAGE], first_settings, first_key)}
        if condition["name"] == "image":
            shared = settings.get("cond_stage_config") == "__is_first_stage__"
            cond_settings = first_settings if shared else settings.section("cond_stage_config", "params")
            prefix = cond_prefix if inside else PREFIXES[FIRST_STAGE]
            stages[COND_STAGE] = self._vqgan(prefix, cond_settings, condition["input_key"])

        first_model = stages[FIRST_STAGE].record["config"]["model"]
        shapes = self._under("transformer.")
        model = detect.transformer_model(shapes, settings, condition, first_model, self._prefix())
        where = f"{self.tensors.path}: model"
        first, *cond = (
            Tokenizer(VQGAN(VQGANConfig.from_config(stages[name].record["config"]["model"], key=where)))
            for name in (FIRST_STAGE, COND_STAGE)
            if name in stages
        )
        transformer = ImageTransformer(TransformerConfig.from_config(model, key=where), first, by_input_key(cond))
        self._check_layout(transformer, shapes["tok_emb.weight"][0])
        return {ROOT: Stage(self._record("transformer", model), transformer_slots(transformer)), **stages}

    def _under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Names without `prefix`, and shapes, of the tensors under it."""
        found = (name for name in self.tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): self.tensors.shape(name) for name in found}

    def _prefix(self) -> int | None:
        """How many first tokens the attention mask lets see each other."""
        name = "transformer.blocks.0.attn.mask"
        if name not in self.tensors or len(self.tensors.shape(name)) != 4:
            return None
        seen = int(np.count_nonzero(self.tensors[name][0, 0, :1]))
        return seen if seen > 1 else 0

    def _check_layout(self, model: ImageTransformer, vocab: int) -> None:
        path, codes, other = self.tensors.path, model.first_stage.codebook_size, model.condition.vocab_size
        if model.layout.vocab_size != vocab:
            raise UserError(
                f"{path}: 'transformer.tok_emb.weight' has {vocab} tokens, but the first stage has {codes} codes and "
                f"the condition {other}: {model.layout.vocab_size} belong, spare tokens are not supported"
            )
        name = "permuter.forward_shuffle_idx"
        if name in self.tensors and not np.array_equal(self.tensors[name], model.order):
            raise UserError(
                f"{path}: '{name}' is not the order {model.config.order} on a grid of {model.config.grid}; mend "
                "model.params.permuter_config of the YAML"
            )

    def _check_shapes(self) -> None:
        for slot in self._slots():
            for key, piece_shape in zip(slot.keys, slot.piece_shapes, strict=True):
                if key.name not in self.tensors:
                    raise UserError(f"{self.tensors.path}: the file has no tensor '{key.name}', which the model needs")
                shape = self.tensors.shape(key.name)
                try:
                    ours = key.take(np.broadcast_to(np.float32(0), shape)).shape
                except (ValueError, IndexError):
                    ours = None
                if ours != piece_shape:
                    belongs = names.to_reference(np.broadcast_to(np.float32(0), piece_shape), key.layout).shape
                    belongs = (key.total, *belongs[1:]) if key.rows else belongs
                    raise UserError(f"{self.tensors.path}: '{key.name}' has shape {shape}, {belongs} belongs")

    def _check_names(self) -> dict[str, int]:
        mapped = {key.name for slot in self._slots() for key in slot.keys}
        left_out: Counter[str] = Counter()
        for name in self.tensors:
            if name in mapped:
                continue
            what = next((what for pattern, what in self._buffers.items() if re.fullmatch(pattern, name)), None)
            if what is None:
                raise UserError(
                    f"{self.tensors.path}: the tensor '{name}' is no part of a {self.kind} as found here, and no known "
                    "buffer; nothing was imported"
                )
            left_out[what] += 1
        return dict(left_out)

    def _slots(self) -> Iterable[Slot]:
        return (slot for stage in self.stages.values() for slot in stage.slots)


@contextlib.contextmanager
def open_checkpoint(path: str | os.PathLike, yaml: str | os.PathLike | None = None) -> Iterator[Checkpoint]:
    """Opens a checkpoint of the reference (.ckpt or .safetensors) and finds what model it holds.

    Args:
      path: the file.
      yaml: the model's YAML; None takes the file of the same stem beside it, where there is one.

    Raises:
      UserError: a file that is no such checkpoint, that its YAML contradicts, or that lacks something; one line.
    """
    path = storage.path(path)
    with open_tensors(path) as tensors:
        yield Checkpoint(tensors, read_settings(path, storage.path(yaml) if yaml else None))


def _provenance(tensors: TensorFile) -> dict[str, Any]:
    counts = {name: tensors.metadata.get(name) for name in ("epoch", "global_step")}
    counts = {name: value for name, value in counts.items() if type(value) is int}
    return {"file": tensors.path.name, "sha256": storage.sha256(tensors.path), **counts}


def lpips_entries(tensors: TensorFile) -> list[Entry]:
    """LPIPS out of a VQGAN's file, under the names of torchvision's VGG16 and of the `lpips` package's heads.

    Raises:
      UserError: the file holds no LPIPS.
    """
    entries = []
    for name in tensors:
        if re.fullmatch(LPIPS, name):
            theirs = re.sub(r"net\.slice\d", "features", name.removeprefix("loss.perceptual_loss."))
            read = functools.partial(lambda name: [tensors.read(name)], name)
            entries.append(Entry(theirs, tensors.shape(name), np.dtype(np.float32), read))
    if not entries:
        raise UserError(f"--lpips_out: {tensors.path} holds no LPIPS (no tensors 'loss.perceptual_loss.*')")
    return entries
