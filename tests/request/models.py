"""Tiny untrained models under every condition, in memory or as the workdir of a run."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common, quantizers
from vqgan_jax.config import FORMAT_VERSION, plain
from vqgan_jax.data import scenes
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train import portable
from vqgan_jax.trained_transformer import Stages, TrainedTransformer
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

SIZE, GRID = 16, (4, 4)
OBJECTS = dict(name="objects", kind="boxes", max_objects=3, vocab=64, classes=5, crop=True, flags=("group",), trim=True)
CONDITIONS = {
    "none": dict(name="none"),
    "class": dict(name="class", classes=8),
    "objects": OBJECTS,
    "coordinates": dict(name="coordinates", codes=64, factor=4, scheme="joint"),
    "class_segmentation": dict(
        name="joint", a=dict(name="class", classes=8), b=dict(name="image", input_key="segmentation")
    ),
    **{key: dict(name="image", input_key=key) for key in ("segmentation", "depth", "edges", "low_res", "keypoints")},
}
CHANNELS = {"segmentation": 10, "depth": 1, "edges": 1}


def data() -> ConfigDict:
    config = common.data("scenes")
    config.image_size, config.train_examples, config.val_examples = SIZE, 8, 6
    config.crop, config.flip, config.max_boxes = "center", False, 3
    return config


def stage_model(key: str) -> ConfigDict:
    """`config.model` of a VQGAN of one kind of picture."""
    model = common.vqgan_model(SIZE)
    model.input_key, ae = key, model.autoencoder
    ae.stem, ae.channels, ae.multipliers, ae.blocks, ae.z_channels = 4, 32, (1,), 1, 8
    ae.decoder_extra_blocks, ae.attention_resolutions, ae.mid_attention = 0, (), False
    ae.in_channels = ae.out_channels = CHANNELS.get(key, 3)
    model.quantizer, model.discriminator.enabled = quantizers.vq(16, 8), False
    return model


def transformer_model(condition: str, dropout: float = 0.0) -> ConfigDict:
    model = common.transformer().model
    gpt = model.transformer
    gpt.layers, gpt.heads, gpt.width = 1, 2, 16
    model.grid, model.condition = GRID, ConfigDict(CONDITIONS[condition])
    model.condition_dropout = dropout
    return model


def untrained(condition: str, dropout: float = 0.0) -> TrainedTransformer:
    """A model as a workdir would give it."""
    config = TransformerConfig.from_config(transformer_model(condition, dropout))
    keys = ["image", *(part["input_key"] for part in _parts(condition) if "input_key" in part)]
    tokenizers = [Tokenizer(VQGAN(VQGANConfig.from_config(stage_model(key)))) for key in keys]
    frozen = {}
    for key, tokenizer in zip(keys, tokenizers, strict=True):
        image = jnp.zeros((1, SIZE, SIZE, tokenizer.config.autoencoder.in_channels))
        shapes = jax.eval_shape(tokenizer.model.init, jax.random.key(1), image)
        frozen["first_stage" if key == "image" else f"cond/{key}"] = _random(shapes)
    first, *cond = tokenizers
    stages = Stages(first, {stage.config.input_key: stage for stage in cond}, frozen, {})
    model = ImageTransformer(config, first, stages.cond)
    params = _random(jax.eval_shape(model.init, jax.random.key(0)))
    run = {"model": plain(transformer_model(condition, dropout)), "data": plain(data())}
    record = {"format_version": FORMAT_VERSION, "kind": "transformer", "config": run, "step": 1, "examples": 8}
    record |= {"classes": list(scenes.CLASSES), "tables": {"box_classes": list(scenes.BOX_CLASSES)}}
    return TrainedTransformer(model, params, frozen, stages, record)


def write_workdir(condition: str, folder: Path, dropout: float = 0.0) -> Path:
    """The same as a workdir that scripts read."""
    trained = untrained(condition, dropout)
    portable.write_stage(folder, {"params": {"transformer": trained.params}}, trained.record)
    for name, variables in trained.frozen.items():
        key = "image" if name == "first_stage" else name.removeprefix("cond/")
        record = {"format_version": FORMAT_VERSION, "kind": "vqgan", "config": {"model": plain(stage_model(key))}}
        rest = {name: value for name, value in variables.items() if name != "params"}
        arrays = {"params": {"generator": variables["params"]}} | ({"collections": {"generator": rest}} if rest else {})
        portable.write_stage(folder / stage_folder(name), arrays, record)
    return folder


def stage_folder(name: str) -> str:
    return name if name == "first_stage" else "cond_stage"


def _parts(condition: str) -> list[dict]:
    fields = CONDITIONS[condition]
    return [value for value in fields.values() if isinstance(value, dict)] or [fields]


def _random(shapes: Any) -> Any:
    """Parameters of these shapes, spread out enough for logits and codes that differ. Nothing is compiled for them."""
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        scale = 2 / np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 0.1
        return (rng.normal(size=x.shape) * scale + ("scale" in str(path[-1]))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))
