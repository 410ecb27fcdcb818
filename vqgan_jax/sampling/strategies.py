"""How the next token is drawn from logits: temperature, then top-k, then top-p, then a draw; or greedily."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Strategy:
    """Sampling settings. All but `greedy` are traced, so sweeping them compiles nothing anew.

    `temperature` > 0; `top_k` int, 0 = off; `top_p` in (0, 1], 1 = off.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    greedy: bool = struct.field(pytree_node=False, default=False)


def filter_logits(logits: jax.Array, strategy: Strategy) -> jax.Array:
    """Divides logits [b, v] by the temperature and sets what top-k and then top-p exclude to -inf.

    Top-k keeps ties with the k-th. Top-p keeps the likeliest tokens of what is left up to and including the one that
    crosses p, so at least one.
    """
    v = logits.shape[-1]
    logits = logits.astype(jnp.float32) / strategy.temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    k = jnp.where(jnp.asarray(strategy.top_k) > 0, strategy.top_k, v)
    kth = jax.lax.dynamic_index_in_dim(ranked, jnp.clip(k, 1, v) - 1, axis=-1)
    ranked = jnp.where(ranked < kth, -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (before < strategy.top_p) | (jnp.asarray(strategy.top_p) >= 1)
    keep = keep.at[..., 0].set(True) & (ranked > -jnp.inf)
    kept = jnp.where(keep, ranked, -jnp.inf)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


def draw(keys: jax.Array, logits: jax.Array, strategy: Strategy) -> jax.Array:
    """The next token of each row, int32 [b], from its own key: a row's token does not depend on its batch."""
    if strategy.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, strategy)).astype(jnp.int32)


def row_keys(seed: jax.Array | int, indices: jax.Array) -> jax.Array:
    """One key a sample from the run's seed and the sample's index [b]."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
