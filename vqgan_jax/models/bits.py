"""Ids of 2^n codes as groups of k bits: an id's embedding, and its logit, is the sum of those of its groups.

A softmax over such ids is the product of a softmax a group, so a table and a head for 2^18 codes cost as much as
2 x 2^9 rows, and the groups of one token are drawn independently of each other (as MaskBit embeds its bits, arXiv
2409.16211).
"""

import jax
import jax.numpy as jnp


def split_bits(ids: jax.Array, groups: int, bits: int) -> jax.Array:
    """Each group's value, the most significant first: int32 [...] to [..., groups], each in [0, 2^bits)."""
    shifts = bits * jnp.arange(groups - 1, -1, -1)
    return (ids[..., None] >> shifts) & (2**bits - 1)


def embed_bits(table: jax.Array, ids_bt: jax.Array, groups: int, bits: int) -> jax.Array:
    """Embeddings [b, t, d] of ids, from a table [groups * 2^bits, d]."""
    rows = split_bits(ids_bt, groups, bits) + 2**bits * jnp.arange(groups)
    return table[rows].sum(-2)


def join_logits(logits_btgv: jax.Array) -> jax.Array:
    """The logits of all ids [b, t, 2^(groups * bits)] from those of the groups [b, t, groups, 2^bits]."""
    b, t, groups, _ = logits_btgv.shape
    logits = logits_btgv[:, :, 0]
    for group in range(1, groups):
        logits = (logits[..., None] + logits_btgv[:, :, group, None]).reshape(b, t, -1)
    return logits
