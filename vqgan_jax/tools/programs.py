"""The programs of a config on any mesh, with abstract arguments: nothing is read, and nothing is computed.

They are built as the scripts build them, so what compiles here is what runs there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vqgan_jax import parallel
from vqgan_jax.conditioning import encoded_keys
from vqgan_jax.config import UserError, choose
from vqgan_jax.data.transforms import sides
from vqgan_jax.models.gpt import GPT, cast_weights
from vqgan_jax.models.vqgan import VQGAN, VQGANConfig
from vqgan_jax.sampling.sampler import make_sampler
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer, by_input_key
from vqgan_jax.train import encoding, setup
from vqgan_jax.train.recipe import Recipe, frozen_networks, transformer_recipe, vqgan_recipe
from vqgan_jax.train.roofline import trace_plain
from vqgan_jax.train.transformer_step import REFERENCE
from vqgan_jax.transformer import ImageTransformer, TransformerConfig

Tree = Any


class Program(NamedTuple):
    """A jitted function with abstract, sharded arguments.

    Fields:
      function: jitted.
      args: its arguments, ShapeDtypeStructs with shardings.
      mesh: to be set while it is traced.
      images: pictures that one run of it handles.
      steps: runs of it in the config's whole run; 0 where it has no end.
      needed: traces the same computation without rematerialisation: what its FLOPs are counted in.
      beside: what lies on the devices besides its arguments, abstract.
    """

    function: Any
    args: tuple[Any, ...]
    mesh: Mesh
    images: int
    steps: int
    needed: Callable[[], Any]
    beside: Tree


def is_transformer(config: ConfigDict) -> bool:
    """Whether a config is one of stage 2."""
    return "transformer" in config.model


def train_program(config: ConfigDict, mesh: Mesh, *, examples: int, stages: Sequence[Mapping[str, Any]]) -> Program:
    """The train step of either stage.

    Args:
      config: whole.
      mesh: of the devices to compile for.
      examples: of the training split, for durations in epochs.
      stages: of stage 2: `config.model` of its first stage, and then of those of its condition.

    Raises:
      UserError: as the scripts raise.
    """
    setup.check_batch(config, mesh)
    durations = setup.Durations(config, examples)
    if is_transformer(config):
        model, frozen = build_transformer(config, stages)
        keys = (model.first_stage.config.input_key, *model.condition.keys)
        if cached := bool(config.cache_codes or config.codes):
            keys = encoding.cached_keys(model)
        make: Callable[..., Recipe] = functools.partial(transformer_recipe, config, durations=durations)
    else:
        cached = False
        model = VQGAN(VQGANConfig.from_config(config.model), setup.dtype_of(config), setup.remat_of(config))
        keys = (model.config.input_key,)
        frozen = {name: jax.eval_shape(init, jax.random.key(0)) for name, init in frozen_networks(config).items()}
        make = functools.partial(vqgan_recipe, config, durations=durations)
    recipe = make(model=model)
    state = parallel.abstract_sharded(recipe.init, mesh, jax.random.key(0))
    frozen = by_size(frozen, mesh)
    beside = frozen if cached else {}
    if is_transformer(config) and config.loss.cca.weight:
        reference = functools.partial(parallel.abstract_sharded, lambda key: cast_weights(model.init(key), model.dtype))
        frozen = frozen | {REFERENCE: reference(mesh, jax.random.key(0))}
    args = state, batch_of(config, keys, config.batch_size, mesh), frozen

    def needed() -> Any:
        plain = model.clone(remat="") if isinstance(model, VQGAN) else dataclasses.replace(model, remat="")
        return trace_plain(make(model=plain).step, *args)

    step = setup.jit_step(recipe.step, recipe.learning_rate, state)
    return Program(step, args, mesh, config.batch_size, durations.total, needed, beside)


def sample_program(config: ConfigDict, mesh: Mesh, batch: int, stages: Sequence[Mapping[str, Any]]) -> Program:
    """The sampler of a transformer's trained grid, on the devices of one host, as sample.py runs it: codes alone.

    Args:
      config: of a transformer; `config.sampling` is how it draws.
      mesh: of one host's devices.
      batch: pictures at once.
      stages: as `train_program`.
    """
    model, frozen = build_transformer(config, stages)
    init = functools.partial(GPT(model.gpt, model.dtype, scan_layers=False).init, positions_bt=jnp.zeros((1, 2), int))
    params = parallel.abstract_sharded(
        lambda key: cast_weights(init(key, jnp.zeros((1, 2), jnp.int32))["params"], model.dtype),
        mesh,
        jax.random.key(0),
    )
    strategy = Strategy(**config.sampling)
    condition = jax.ShapeDtypeStruct((batch, model.condition.length), jnp.int32)
    rows = _on_batch((condition, jax.eval_shape(row_keys, 0, jnp.zeros(batch, jnp.int32))), mesh)
    function = make_sampler(model, model.config.grid)
    args = (params, *rows, strategy, None)
    return Program(function, args, mesh, batch, 0, lambda: function.trace(*args).jaxpr, by_size(frozen, mesh))


def encode_program(config: ConfigDict, mesh: Mesh, batch: int, stages: Sequence[Mapping[str, Any]]) -> Program:
    """What `tools.encode` runs on the devices of each host; arguments as `sample_program`."""
    model, frozen = build_transformer(config, stages)
    frozen = by_size(frozen, mesh)
    keys = (model.first_stage.config.input_key, *(part.key for part in encoding.encoded_parts(model)))
    args = frozen, batch_of(config, keys, batch, mesh)
    function = encoding.make_encoder(model)
    return Program(function, args, mesh, batch, 0, lambda: function.trace(*args).jaxpr, {})


def build_transformer(config: ConfigDict, stages: Sequence[Mapping[str, Any]]) -> tuple[ImageTransformer, Tree]:
    """The model of a stage-2 config, and the shapes of the frozen variables of its stages by name.

    Raises:
      UserError: a stage too few, or ones that the config does not fit.
    """
    dtype, settings = setup.dtype_of(config), TransformerConfig.from_config(config.model)
    (first, variables), *rest = [_tokenizer(model, dtype) for model in stages]
    conditions = by_input_key(tokenizer for tokenizer, _ in rest)
    for key in encoded_keys(settings.condition):
        if key not in conditions:
            raise UserError(f"--cond: a '{key}' condition needs the config of its VQGAN, or config.cond_vqgan")
    frozen = {"first_stage": variables} | {f"cond/{stage.config.input_key}": shapes for stage, shapes in rest}
    model = ImageTransformer(settings, first, conditions, dtype, setup.remat_of(config))
    model.check_size(config.data.image_size)
    return model, frozen


def _tokenizer(model: Mapping[str, Any], dtype: Any) -> tuple[Tokenizer, Tree]:
    vqgan = VQGAN(VQGANConfig.from_config(model, key="model of a stage"), dtype)
    c = vqgan.config.autoencoder
    images = jnp.zeros((1, c.resolution, c.resolution, c.in_channels))
    keys = dict.fromkeys(("params", "quantizer"), jax.random.key(0))
    return Tokenizer(vqgan), jax.eval_shape(vqgan.init, keys, images)


def batch_of(config: ConfigDict, keys: Sequence[str], batch: int, mesh: Mesh) -> Tree:
    """The abstract batch that the pipeline makes of a config's data, sharded over its rows."""
    (h, w), boxes = sides(config.data.image_size), config.data.max_boxes
    grid = tuple(config.model.grid) if is_transformer(config) else ()
    picture, map_, f, i = (h, w, 3), (h, w, 1), jnp.float32, jnp.int32
    known = {
        "image": (picture, f),
        "keypoints": (picture, f),
        "low_res": (picture, f),
        "depth": (map_, f),
        "edges": (map_, f),
        "coords": ((h, w, 2), f),
        "segmentation": ((h, w), i),
        "label": ((), i),
        "boxes": ((boxes, 4), f),
        "box_classes": ((boxes,), i),
        "box_flags": ((boxes,), i),
        "crop_box": ((4,), f),
    }
    rows = {key: (grid, i) if key.startswith("codes/") else choose("batch key", key, known) for key in keys}
    return _on_batch({key: jax.ShapeDtypeStruct((batch, *shape), dtype) for key, (shape, dtype) in rows.items()}, mesh)


def by_size(tree: Tree, mesh: Mesh) -> Tree:
    """Abstract frozen variables as `parallel.put_tree` places them."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, parallel.shard_by_size(x.shape, mesh))
        ),
        tree,
    )


def _on_batch(tree: Tree, mesh: Mesh) -> Tree:
    sharding = parallel.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def bytes_a_device(tree: Tree) -> int:
    """Bytes that abstract arrays take of each device, by their shardings."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)
