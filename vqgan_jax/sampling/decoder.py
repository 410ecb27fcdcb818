"""The cached decoder: one prefill of what is known, then scans over tokens. Handed functions, not models.

It is one program: the cache is born in it, and every scan writes it in place. Token by token it attends over a static
prefix of the cache that grows in buckets, so that early tokens do not pay for late ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vqgan_jax.sampling.strategies import Strategy, interleave, next_token

Cache = Any
Apply = Callable[[jax.Array, Cache, int], tuple[jax.Array, Cache]]
BUCKETS = 8  # more attend over less and compile longer: at 256 tokens 12% over the least, 4 would be 25%, 16 6%
NARROWEST = 32  # positions: a narrower bucket saves too little for what it costs to compile


def spans(start: int, length: int, buckets: int | None = None) -> list[tuple[int, int, int]]:
    """The scans of the decoder as (first token, last token + 1, cache positions attended over), all but the last token.

    Args:
      start: tokens in the cache before the first.
      length: tokens drawn, of which the last is never looked at.
      buckets: how many there are without a prefix, by default BUCKETS or fewer; borders lie at whole multiples of the
        bucket.
    """
    width = -(-length // buckets) if buckets else max(-(-length // BUCKETS), NARROWEST)
    found, first = [], 0
    while first < length - 1:
        span = min((start + first) // width * width + width, start + length - 1)
        found.append((first, span - start, span))
        first = span - start
    return found


def decode(
    apply: Apply,
    empty: Callable[[int], Cache],
    prefix_bt: jax.Array,
    length: int,
    keys: jax.Array,
    strategy: Strategy,
    given: tuple[jax.Array, jax.Array] | None = None,
    *,
    leading: int = 0,
    null_bt: jax.Array | None = None,
    buckets: int | None = None,
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
      leading: so many first tokens are given in every row (static); they are prefilled with the prefix.
      null_bt: the prefix of the null condition, [b or 1, t]; needed where the strategy is guided.
      buckets: see `spans`; 1 attends over the whole cache always.

    Returns:
      int32 [b, length].
    """
    b = prefix_bt.shape[0]
    ids = jnp.zeros((b, length), jnp.int32)
    fixed_ids, fixed = given or (ids, jnp.zeros((b, length), bool))
    if leading:
        ids = ids.at[:, :leading].set(fixed_ids[:, :leading])
    if leading == length:
        return ids
    rows = (lambda x: interleave(x, x)) if strategy.guided else (lambda x: x)
    prefix_bt = interleave(prefix_bt, null_bt) if strategy.guided else prefix_bt
    prefix_bt = jnp.concatenate([prefix_bt, rows(ids[:, :leading])], axis=1)
    start = prefix_bt.shape[1]
    logits, cache = apply(prefix_bt, empty(prefix_bt.shape[0]), start)

    def pick(logits: jax.Array, ids: jax.Array, i: jax.Array) -> jax.Array:
        drawn = next_token(keys, logits, strategy, ids, i, length)
        return jnp.where(fixed[:, i], fixed_ids[:, i], drawn)

    def segment(carry: Any, first: int, last: int, span: int) -> Any:
        def token(carry: Any, i: jax.Array) -> tuple[Any, None]:
            logits, cache, ids = carry
            drawn = pick(logits, ids, i)[:, None]
            ids = jax.lax.dynamic_update_slice(ids, drawn, (0, i))
            logits, cache = apply(rows(drawn), cache, span)
            return (logits, cache, ids), None

        return jax.lax.scan(token, carry, jnp.arange(first, last))[0]

    carry = (logits, cache, ids)
    for first, last, span in spans(start, length - leading, buckets):
        carry = segment(carry, leading + first, leading + last, span)
    logits, _, ids = carry
    return ids.at[:, length - 1].set(pick(logits, ids, jnp.asarray(length - 1)))
