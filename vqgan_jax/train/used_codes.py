"""The codes of a VQGAN that a data set uses, and the VQGAN without the others: what `config.remap` gives stage 2.

A code that is gone needs no table of ids anywhere: the quantizer gives what it would have taken the nearest one left.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vqgan_jax import parallel
from vqgan_jax.config import UserError
from vqgan_jax.data.pipeline import Transform, evaluation
from vqgan_jax.models.quantizers import FSQConfig, LFQConfig
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.train import encoding, setup
from vqgan_jax.train.setup import Data

Tree = Mapping[str, Any]
# The axis of the codes in what a quantizer learns and remembers; what is not here has none.
_AXES = {"codebook": 0, "codes": 0, "count": 0, "sum": 0, "usage": 0, "logits/kernel": 3, "logits/bias": 0}


def find(config: ConfigDict, tokenizer: Tokenizer, variables: Tree) -> np.ndarray:
    """Ids of the codes that a config's training pictures use, in order: those of the views that are to be cached, or
    an epoch as it is drawn. All hosts call it together.

    Raises:
      UserError: a quantizer without a codebook, or no data.
    """
    if isinstance(tokenizer.config.quantizer, FSQConfig | LFQConfig):
        raise UserError(
            "config.remap: the codes of this first stage are numbers, not rows of a codebook, so that none can be left "
            "out; set it to False"
        )
    data = setup.open_data(config, (tokenizer.config.input_key,), factor=tokenizer.factor)
    cached = encoding.CENTER_FLIP if config.data.flip else encoding.CENTER
    used = in_use(
        tokenizer,
        variables,
        data,
        encoding.choose_views(cached if config.cache_codes else "1", data),
        seed=config.seed,
        batch=config.batch_size,
        threads=config.data.threads,
    )
    if used.sum() < 2:
        raise UserError("config.remap: all training pictures are one and the same code; the first stage has collapsed")
    return np.flatnonzero(used)


def in_use(
    tokenizer: Tokenizer,
    variables: Tree,
    data: Data,
    views: tuple[Transform, ...],
    *,
    seed: int,
    batch: int,
    threads: int,
) -> np.ndarray:
    """Which codes the training pictures use, bool [q]. All hosts call it together, each encodes a share.

    Args:
      tokenizer: encodes.
      variables: of the tokenizer, on every host.
      data: the data set.
      views: what each picture is encoded as.
      seed: of random views.
      batch: pictures encoded at once on each host, about.
      threads: reading threads.
    """
    mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
    key = tokenizer.config.input_key
    batch = -(-batch // (len(views) * mesh.size)) * mesh.size
    variables = parallel.put_tree(variables, mesh)

    @jax.jit
    def seen(variables: Tree, rows: Mapping[str, jax.Array]) -> jax.Array:
        pictures = rows[key].reshape(-1, *rows[key].shape[2:])
        ids = tokenizer.encode(variables, model_input(tokenizer.config, {key: pictures}))
        ids = ids.reshape(len(rows["valid"]), -1)
        return jnp.zeros(tokenizer.codebook_size, bool).at[ids].max(rows["valid"][:, None])

    examples, host, hosts = len(data.train), jax.process_index(), jax.process_count()
    part = range(examples * host // hosts, examples * (host + 1) // hosts)
    used = np.zeros(tokenizer.codebook_size, bool)
    if part:
        own = parallel.host_rows(mesh, batch)
        reading = dict(
            rows=own, global_batch=batch, transform=encoding.AllViews(views), part=part, seed=seed, threads=threads
        )
        with jax.set_mesh(mesh):
            for rows in evaluation(data.train, **reading):
                rows = {name: rows[name] for name in (key, "valid")}
                used |= np.asarray(seen(variables, parallel.put_batch(rows, mesh, batch)))
    return multihost_utils.process_allgather(used).reshape(hosts, -1).any(axis=0)


def prune_model(model: Tree, codes: int) -> dict[str, Any]:
    """The `config.model` of a VQGAN of which so many codes are left."""
    return {**model, "quantizer": {**model["quantizer"], "codebook_size": codes}}


def prune(tree: Tree, used: np.ndarray) -> dict[str, Any]:
    """A VQGAN's parameters or collections with the codes `used` alone, in that order."""
    flat = flatten_dict(dict(tree))
    for path, array in flat.items():
        if "quantizer" in path:
            name = "/".join(path[path.index("quantizer") + 1 :])
            if name in _AXES:
                flat[path] = np.take(np.asarray(array), used, axis=_AXES[name])
    return unflatten_dict(flat)
