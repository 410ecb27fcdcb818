"""The training state of both stages, micro-batches, random streams, EMA, and the guard against non-finite steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vqgan_jax.parallel import scan_unroll

Tree = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """Everything a step changes. Trees are keyed by network ("generator", "discriminator", "transformer").

    `collections` holds what is not learned by gradient (the codebook's statistics, BatchNorm's). `ema` holds averaged
    parameters of the network that is sampled, or nothing. `skipped` counts steps dropped because they were not finite.
    """

    step: jax.Array
    key: jax.Array
    params: Tree
    collections: Tree
    opt_state: Tree
    ema: Tree
    skipped: jax.Array

    @classmethod
    def create(cls, key: jax.Array, params: Tree, collections: Tree, opt_state: Tree, ema: Tree) -> "TrainState":
        """A state at step 0. Call it inside one jit: EMA must be buffers of its own (a donated alias is an error)."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, key, params, collections, opt_state, jax.tree.map(jnp.copy, ema), jnp.copy(zero))

    def sampled(self, network: str) -> Tree:
        """The parameters that evaluations and samples use: averaged ones where the run keeps them."""
        return self.ema[network] if network in self.ema else self.params[network]

    def stream(self, name: str) -> jax.Array:
        """The key of a named random stream at this step: a function of (root key, step, name) alone."""
        streams = ("quantizer", "dropout", "second_quantizer", "second_dropout", "corruption", "condition")
        streams += ("augment", "second_augment", "permutation")
        return jax.random.fold_in(jax.random.fold_in(self.key, self.step), streams.index(name))


def accumulate(
    gradients: Callable[[Tree, Tree, jax.Array], tuple[Tree, Tree]], carry: Tree, batch: Mapping[str, jax.Array], n: int
) -> tuple[Tree, Tree]:
    """Runs `gradients(carry, microbatch, index) -> (carry, outputs)` over n micro-batches and averages the outputs.

    Rows are dealt round robin, so that each micro-batch stays sharded like the batch.
    """
    if n == 1:
        return gradients(carry, batch, jnp.zeros((), jnp.int32))
    micro = {name: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
    carry, outputs = jax.lax.scan(
        lambda c, xs: gradients(c, xs[0], xs[1]), carry, (micro, jnp.arange(n)), unroll=scan_unroll(n)
    )
    return carry, jax.tree.map(lambda x: x.mean(axis=0), outputs)


def update_ema(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """One step of the exponential moving average; early on the decay is smaller, (1 + step) / (10 + step)."""
    rate = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, ema, 1 - rate)


def guard(old: TrainState, new: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """Keeps the old state, but for its step, if any metric is not finite; counts it and says so in `skipped`.

    Gradient norms are among the metrics, so a single bad gradient shows.
    """
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    kept = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old.replace(key=None), new.replace(key=None))
    skipped = old.skipped + (~finite).astype(jnp.int32)
    state = kept.replace(step=old.step + 1, key=old.key, skipped=skipped)
    return state, metrics | {"skipped": (~finite).astype(jnp.float32)}
