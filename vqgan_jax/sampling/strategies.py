"""How the next token is drawn from logits: guidance, a hook, temperature, top-k, top-p, min-p, a draw; or greedily.

Guidance schedules: linear and cosine ramps, power-cosine (RAR, arXiv 2411.00776), an interval (arXiv 2404.07724).
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

Kind = Literal["greedy", "plain", "top_k", "ranked"]
MOST_K = 1024  # a top-k up to this is found without sorting the vocabulary; the paper draws from up to 973
RAMPS: dict[str, Callable[[jax.Array, jax.Array | float], jax.Array]] = {  # (progress in [0, 1), power) -> [0, 1]
    "constant": lambda progress, power: jnp.ones_like(progress),
    "linear": lambda progress, power: progress,
    "cosine": lambda progress, power: (1 - jnp.cos(math.pi * progress)) / 2,
    "power-cosine": lambda progress, power: (1 - jnp.cos(math.pi * progress**power)) / 2,
}
Edit = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@struct.dataclass
class Strategy:
    """Sampling settings. The numbers are traced: sweeping them compiles nothing anew.

    What a Python number rules out is left out of the program (`kind`, `guided`: static, and settled by the numbers
    unless given); an array rules out nothing.

    Attributes:
      temperature: divides the logits, > 0.
      top_k: draw from the k likeliest and what ties with the k-th; 0 = from all.
      top_p: then from the likeliest up to and including the one that crosses this share, in [0, 1]; 1 = from all.
      min_p: then from those at least this share as likely as the likeliest, in [0, 1]; 0 = from all.
      guidance: scale w of classifier-free guidance, null + w * (conditional - null); 1 = off.
      power: of the schedule power-cosine.
      interval: guidance acts on token i of n where interval[0] <= i / n < interval[1].
      greedy: take the likeliest always.
      schedule: how the scale grows from 1 over the tokens, a name of RAMPS; "constant" has it whole from the start.
      edit: a last word on the (guided) logits: `(logits [b, v], ids so far [b, n], i) -> logits`; of block windows ids
        are the window's, and i is one a row [b], counted over the picture.
      kind: "plain" filters by min-p alone; "top_k" ranks MOST_K tokens, and a larger k counts as MOST_K; "ranked" all.
      guided: whether the sampler runs the null condition too.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    min_p: jax.Array | float = 0.0
    guidance: jax.Array | float = 1.0
    power: jax.Array | float = 1.0
    interval: tuple[jax.Array | float, jax.Array | float] = (0.0, 1.0)
    greedy: bool = struct.field(pytree_node=False, default=False)
    schedule: str = struct.field(pytree_node=False, default="constant")
    edit: Edit | None = struct.field(pytree_node=False, default=None)
    kind: Kind | None = struct.field(pytree_node=False, default=None)
    guided: bool | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        whole = lambda x: float(x) if isinstance(x, int) else x  # noqa: E731  a 1 for 1.0 would be another program
        for name in ("temperature", "top_p", "min_p", "guidance", "power"):
            object.__setattr__(self, name, whole(getattr(self, name)))
        if isinstance(self.interval, tuple):
            object.__setattr__(self, "interval", tuple(whole(x) for x in self.interval))
        if isinstance(self.guidance, numbers.Real):
            object.__setattr__(self, "guided", self.guidance != 1)
        elif self.guided is None:
            object.__setattr__(self, "guided", True)
        if self.greedy:
            object.__setattr__(self, "kind", "greedy")
        elif isinstance(self.top_k, numbers.Real) and isinstance(self.top_p, numbers.Real):
            plain = self.top_k == 0 and self.top_p >= 1
            object.__setattr__(self, "kind", "plain" if plain else "top_k" if 0 < self.top_k <= MOST_K else "ranked")
        elif self.kind in (None, "greedy"):
            object.__setattr__(self, "kind", "ranked")


def filter_logits(logits: jax.Array, strategy: Strategy) -> jax.Array:
    """Divides logits [b, v] by the temperature and sets what the filters exclude to -inf: top-k, then top-p, min-p.

    Top-k keeps ties with the k-th. Of tokens that tie where top-p ends, those of the smaller ids stay. At least one
    token stays.
    """
    logits = logits.astype(jnp.float32) / strategy.temperature
    if strategy.kind in ("top_k", "ranked"):
        logits = _nucleus(*_likeliest(logits, strategy), strategy.top_p)
    top = logits.max(-1, keepdims=True)
    share = jnp.asarray(strategy.min_p, jnp.float32)
    return jnp.where((logits - top >= jnp.log(share)) | (logits == top), logits, -jnp.inf)


def _likeliest(logits: jax.Array, strategy: Strategy) -> tuple[jax.Array, jax.Array]:
    """Top-k: the logits with the rest at -inf, and the largest of them in falling order (all but ties of the last)."""
    v = logits.shape[-1]
    if strategy.kind == "top_k":
        ranked = jax.lax.top_k(logits, min(MOST_K, v))[0]
    else:
        ranked = jnp.sort(logits, axis=-1, descending=True)  # of values alone; finding each value's id is a second sort
    k = jnp.clip(strategy.top_k, 1, ranked.shape[-1])
    kth = jax.lax.dynamic_index_in_dim(ranked, k - 1, axis=-1)
    kth = jnp.where(jnp.asarray(strategy.top_k) > 0, kth, -jnp.inf)
    return jnp.where(logits >= kth, logits, -jnp.inf), jnp.where(ranked >= kth, ranked, -jnp.inf)


def _nucleus(logits: jax.Array, ranked: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Top-p, without the ids of what is ranked: the value at which the share is crossed says who stays."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    probabilities = jnp.exp(ranked - total)
    within = (jnp.cumsum(probabilities, axis=-1) - probabilities < top_p) & (ranked > -jnp.inf)
    last = jnp.maximum(within.sum(-1, keepdims=True) - 1, 0)
    border = jnp.take_along_axis(ranked, last, axis=-1)
    above, level = logits > border, logits == border
    share = jnp.where(above, jnp.exp(logits - total), 0).sum(-1, keepdims=True)
    place = jnp.cumsum(level, axis=-1) - 1  # among those that tie at the border, by id
    stays = above | (level & ((place == 0) | (share + place * jnp.exp(border - total) < top_p)))
    return jnp.where(stays | (jnp.asarray(top_p) >= 1), logits, -jnp.inf)


def draw(keys: jax.Array, logits: jax.Array, strategy: Strategy) -> jax.Array:
    """The next token of each row, int32 [b], from its own key: a row's token does not depend on its batch."""
    if strategy.kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, strategy)).astype(jnp.int32)


def guidance_scale(strategy: Strategy, i: jax.Array | int, length: int) -> jax.Array:
    """The scale w at token i of `length`."""
    progress = jnp.asarray(i, jnp.float32) / length
    scale = 1 + (strategy.guidance - 1) * RAMPS[strategy.schedule](progress, strategy.power)
    first, last = strategy.interval
    return jnp.where((progress >= first) & (progress < last), scale, 1.0)


def interleave(conditional: Any, null: Any) -> jax.Array:
    """Rows [b, ...] of both passes as one batch [2b, ...], the two of a row side by side: on one device."""
    b, *rest = conditional.shape
    return jnp.stack([conditional, jnp.broadcast_to(null, conditional.shape)], 1).reshape(2 * b, *rest)


def next_token(
    keys: jax.Array, logits: jax.Array, strategy: Strategy, ids: jax.Array, i: jax.Array, length: int
) -> jax.Array:
    """Token i of `length` of each row.

    Args:
      keys: one a row [b]; folded with i here.
      logits: [b, v]; guided: those of `interleave`'s rows [2b, v].
      strategy: how to draw.
      ids: what is drawn so far, for the hook.
      i: which token, the same for all rows or one a row [b].
      length: of how many.

    Returns:
      int32 [b].
    """
    if strategy.guided:
        conditional, null = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
        logits = null + guidance_scale(strategy, i, length).reshape(-1, 1) * (conditional - null)
    if strategy.edit is not None:
        logits = strategy.edit(logits, ids, i)
    return draw(jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(i, keys.shape)), logits, strategy)


def row_keys(seed: jax.Array | int, indices: jax.Array) -> jax.Array:
    """One key a sample from the run's seed and the sample's index [b]."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
