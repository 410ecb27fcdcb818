"""The cached decoder: one prefill of the prefix, then a scan over tokens. Handed functions, not models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqgan_jax.sampling.strategies import Strategy, draw

Cache = Any
Apply = Callable[[jax.Array, Cache, int], tuple[jax.Array, Cache]]
_SPANS = 4  # early tokens attend over a shorter, static part of the cache


def decode(
    apply: Apply,
    empty: Callable[[int], Cache],
    prefix_bt: jax.Array,
    length: int,
    keys: jax.Array,
    strategy: Strategy,
    given: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Draws `length` tokens after a prefix.

    Args:
      apply: `(ids_bt, cache, span) -> (logits of the last token [b, v], cache)`.
      empty: `batch -> cache`, with room for prefix and tokens.
      prefix_bt: int32 [b, t >= 1], prefilled in one call.
      length: tokens to draw (static).
      keys: one key a row [b]; token i of a row is drawn with fold_in(key, i).
      strategy: how to draw.
      given: (ids int32 [b, length], mask bool [b, length]): where the mask is set the id is kept as given.

    Returns:
      int32 [b, length].
    """
    b, start = prefix_bt.shape
    ids = jnp.zeros((b, length), jnp.int32)
    fixed_ids, fixed = given or (ids, jnp.zeros((b, length), bool))
    logits, cache = apply(prefix_bt, empty(b), start)

    def pick(logits: jax.Array, i: jax.Array) -> jax.Array:
        drawn = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, i), logits, strategy)
        return jnp.where(fixed[:, i], fixed_ids[:, i], drawn)

    def segment(carry: Any, first: int, last: int) -> Any:
        """Tokens first..last-1, attending over a static span of the cache that covers the last of them."""

        def token(carry: Any, i: jax.Array) -> tuple[Any, None]:
            logits, cache, ids = carry
            drawn = pick(logits, i)
            ids = jax.lax.dynamic_update_slice(ids, drawn[:, None], (0, i))
            logits, cache = apply(drawn[:, None], cache, start + last)
            return (logits, cache, ids), None

        return jax.lax.scan(token, carry, jnp.arange(first, last))[0]

    carry = (logits, cache, ids)
    borders = sorted({round((length - 1) * k / _SPANS) for k in range(_SPANS + 1)})
    for first, last in zip(borders, borders[1:], strict=False):
        carry = segment(carry, first, last)
    logits, _, ids = carry
    return ids.at[:, length - 1].set(pick(logits, jnp.asarray(length - 1)))
