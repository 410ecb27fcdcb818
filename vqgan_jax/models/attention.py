"""Causal, prefix and full attention, by the kernel that suits the platform: cuDNN on NVIDIA, Pallas on TPU, else XLA.

Queries come folded, [b, t, n*k], keys and values as [b, t, m*k]; letters as in `gpt.py`. Softmax in float32 everywhere.
Of m heads of keys and values each serves g = n / m queries that stand side by side (arXiv 2305.13245); mostly m = n.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as tpu
from jax.sharding import PartitionSpec as P

from vqgan_jax.parallel import BATCH_AXES, platform, to_mesh_axes

Attend = Literal["causal", "prefix", "full"]
_TILE = 128  # of the TPU's kernel, in tokens


def attention_mask(attend: Attend, prefix: int, queries: int, keys: int, offset: jax.Array | int = 0) -> jax.Array:
    """Which keys a query sees: bool [queries, keys]. Query i stands at position offset + i, key j at position j; with
    an offset a row [b, 1, 1, 1] bool [b, 1, queries, keys]."""
    i, j = jnp.arange(queries)[:, None] + offset, jnp.arange(keys)[None]
    if attend == "full":
        return jnp.ones((queries, keys), bool)
    mask = j <= i
    return mask | ((i < prefix) & (j < prefix)) if attend == "prefix" else mask


def attend_many(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    heads: int,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """Attention of many tokens by plain products, [b, t, n*k] -> [b, t, n*k]; `mask` is bool [t, s] or
    [b, 1, t, s]."""
    b, t, d = query.shape
    if keys.shape[-1] != d:
        return _attend_many_in_groups(query, keys, values, mask, d // heads, drop)
    q, k, v = (a.reshape(b, -1, heads, d // heads) for a in (query, keys, values))
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) * (d // heads) ** -0.5
    weights = drop(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(query.dtype))
    return jnp.einsum("bnts,bsnk->btnk", weights, v).reshape(b, t, d)


def _attend_many_in_groups(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    width: int,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """`attend_many` of fewer heads of keys and values than of queries, each `width` wide."""
    b, t, d = query.shape
    k, v = (a.reshape(b, a.shape[1], -1, width) for a in (keys, values))
    q = query.reshape(b, t, k.shape[2], -1, width)
    scores = jnp.einsum("btmgk,bsmk->bmgts", q, k, preferred_element_type=jnp.float32) * width**-0.5
    mask = jnp.expand_dims(mask, -3)
    weights = drop(jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1).astype(query.dtype))
    return jnp.einsum("bmgts,bsmk->btmgk", weights, v).reshape(b, t, d)


def attend_sequence(query: jax.Array, keys: jax.Array, values: jax.Array, *, heads: int) -> jax.Array:
    """Causal attention of a whole sequence to itself, without dropout: [b, t, n*k] -> [b, t, n*k].

    The platform is that of the mesh in context. A shape or dtype that its kernel does not take goes the plain way; all
    ways agree within the rounding of the dtype.
    """
    b, t, d = query.shape
    if platform() == "gpu" and _cudnn_takes(query, d // heads):
        kernel = _by_cudnn
    elif platform() == "tpu" and _pallas_takes(b, t, heads, d // heads):
        kernel = _by_pallas
    else:
        return attend_many(query, keys, values, attention_mask("causal", 0, t, t), heads=heads)
    by_heads = (a.reshape(b, t, -1, d // heads) for a in (query, keys, values))
    return kernel(*by_heads).reshape(b, t, d)


def _cudnn_takes(query: jax.Array, width: int) -> bool:
    """cuDNN's flash attention: half precision, heads up to 128 wide, NVIDIA chips from Ampere on."""
    device = jax.devices()[0]  # a GPU is compiled for where it is
    capability = getattr(device, "compute_capability", "0")
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128
    return fits and device.device_kind.startswith("NVIDIA") and float(capability) >= 8


def _by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _pallas_takes(batch: int, length: int, heads: int, width: int) -> bool:
    """The TPU's flash attention: at least a tile of tokens, whole rows and heads on each device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    rows, parts = math.prod(sizes.get(name, 1) for name in BATCH_AXES), sizes.get("tensor", 1)
    fits = batch % rows == 0 and heads % parts == 0 and (width <= _TILE or width % _TILE == 0)
    return fits and length >= _TILE


def _by_pallas(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Each device its own rows and heads; tokens past the end, which no query before them sees, fill the last tile."""
    if k.shape[2] != q.shape[2]:  # the kernel knows no groups
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    length, width = q.shape[1], q.shape[-1]
    full = -(-length // _TILE) * _TILE
    tile = next(size for size in (512, 256, _TILE) if full % size == 0)
    names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv")
    names += ("block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    tiles = tpu.BlockSizes(block_b=1, **dict.fromkeys(names, tile))
    run = functools.partial(tpu.flash_attention, causal=True, sm_scale=width**-0.5, block_sizes=tiles)
    if not jax.sharding.get_abstract_mesh().empty:
        spec = P(*to_mesh_axes(("batch", "heads")), None, None)
        run = jax.shard_map(run, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    padded = (jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, full - length), (0, 0))) for a in (q, k, v))
    return run(*padded)[:, :, :length].swapaxes(1, 2)


def attend_one(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, heads: int) -> jax.Array:
    """Attention of one token over a cache that stays folded, [b, n*k] -> [b, n*k].

    Cutting heads out of the cache, as for many queries, copies it on accelerators: the TPU compiler then moves ten
    times its bytes.

    Args:
      query: [b, n*k].
      keys, values: [b, s, m*k].
      seen: bool [s].
      heads: n.
    """
    matrix = attend_by_matrix if keys.shape[-1] == query.shape[-1] else attend_by_spread_query
    ways = matrix, attend_by_sum, attend_by_heads
    by_matrix, by_sum, by_heads = (functools.partial(f, heads=heads) for f in ways)
    return jax.lax.platform_dependent(
        query, keys, values, seen, tpu=by_matrix, cuda=by_sum, rocm=by_sum, default=by_heads
    )


def attend_by_matrix(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, heads: int) -> jax.Array:
    """`attend_one` where a head's dimensions are summed up, and spread over, by a matrix of zeros and ones; of as many
    heads of keys as of queries."""
    by_head = jnp.repeat(jnp.eye(heads, dtype=keys.dtype), query.shape[-1] // heads, axis=0)  # [n*k, n]
    scores = jnp.einsum("bsd,dn->bsn", query[:, None] * keys, by_head, preferred_element_type=jnp.float32)
    weights = _weigh(scores, query, seen).astype(keys.dtype)
    weights = jnp.einsum("bsn,dn->bsd", weights, by_head, preferred_element_type=jnp.float32)
    return (weights * values).sum(1).astype(query.dtype)


def attend_by_spread_query(
    query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, heads: int
) -> jax.Array:
    """`attend_one` of groups: each query stands among zeros where its head of the folded keys is, so that one product
    reads the cache as it lies. Of what a query gathers over all heads of values its own is kept."""
    b, d = query.shape
    m = keys.shape[-1] * heads // d
    own = jnp.eye(m, dtype=query.dtype)[:, None, :, None]  # [m, 1, m, 1]
    q = (query.reshape(b, m, -1, 1, d // heads) * own).reshape(b, heads, -1)  # [b, n, m*k]
    scores = jnp.einsum("bsd,bnd->bsn", keys, q, preferred_element_type=jnp.float32)
    weights = _weigh(scores, query, seen).astype(keys.dtype)
    y = jnp.einsum("bsn,bsd->bnd", weights, values, preferred_element_type=jnp.float32)
    return (y.reshape(b, m, -1, m, d // heads) * own).sum(3).reshape(b, d).astype(query.dtype)


def attend_by_sum(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, heads: int) -> jax.Array:
    """`attend_one` as sums over axes: what a GPU fuses into one pass over the keys and one over the values."""
    q, k, v = (
        a.astype(jnp.float32).reshape(*a.shape[:-1], -1, query.shape[-1] // heads) for a in (query, keys, values)
    )
    if k.shape[2] != heads:  # [b, m, g, k] and [b, s, m, 1, k]
        q, k, v = q.reshape(q.shape[0], k.shape[2], -1, k.shape[3]), k[:, :, :, None], v[:, :, :, None]
    scores = (q[:, None] * k).sum(-1)
    weights = _weigh(scores.reshape(*scores.shape[:2], heads), query, seen).reshape(scores.shape)
    return (weights[..., None] * v).sum(1).reshape(query.shape).astype(query.dtype)


def attend_by_heads(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, *, heads: int) -> jax.Array:
    """`attend_one` a head at a time, heads before positions: so cut, a CPU copies a head's whole rows; for the einsum
    of `attend_many` it copies number by number, and takes twice as long."""
    q = query.reshape(query.shape[0], heads, -1)
    k, v = (a.reshape(*a.shape[:2], -1, q.shape[-1]).swapaxes(1, 2) for a in (keys, values))
    groups = k.shape[1] != heads
    if groups:
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    names = "bmgk,bmsk->bmgs" if groups else "bnk,bnsk->bns"
    scores = jnp.einsum(names, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(query.dtype)
    return jnp.einsum("bmgs,bmsk->bmgk" if groups else "bns,bnsk->bnk", weights, v).reshape(query.shape)


def _weigh(scores_bsn: jax.Array, query: jax.Array, seen: jax.Array) -> jax.Array:
    scale = (query.shape[-1] // scores_bsn.shape[-1]) ** -0.5
    return jax.nn.softmax(jnp.where(seen[:, None], scores_bsn * scale, -jnp.inf), axis=1)
