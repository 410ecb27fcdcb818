"""The transformer of stage 2: GPT-2 as in minGPT, or a Llama as in LlamaGen (arXiv 2406.06525), over tokens of codes.

Pre-norm, untied head, prefix of full attention; its blocks: models/blocks.py. Letters: b batch, t tokens, d width,
n heads, k head dim, f MLP width, v vocabulary, s cache length, l layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype

from vqgan_jax.models import bits
from vqgan_jax.models.attention import Attend
from vqgan_jax.models.blocks import MODULATIONS, Block, Context, GPTConfig, norm, normal, partitioned, zeros
from vqgan_jax.models.remat import remat
from vqgan_jax.models.rope import rotation_at
from vqgan_jax.parallel import constrain, scan_unroll


@struct.dataclass
class Cache:
    """Keys and values of past tokens, one full allocation a layer [b, s, kv_width], and how many positions are filled;
    with AdaLN also what each layer makes of the condition [b, 6d]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    modulations: tuple[jax.Array, ...] = ()


def init_cache(config: GPTConfig, batch: int, length: int, dtype: Dtype) -> Cache:
    """An empty cache for `batch` sequences of up to `length` tokens."""

    def one() -> tuple[jax.Array, ...]:
        zeros = (jnp.zeros((batch, length, config.kv_width), dtype) for _ in range(config.layers))
        return tuple(constrain(x, "batch", "length", "heads") for x in zeros)

    modulated = config.layers if config.adaln else 0
    known = (jnp.zeros((batch, MODULATIONS * config.width), dtype) for _ in range(modulated))
    return Cache(one(), one(), jnp.zeros((), jnp.int32), tuple(constrain(x, "batch", None) for x in known))


class GPT(nn.Module):
    """Token ids [b, t] to next-token logits [b, t, head_size].

    `scan_layers` stacks the layers under one scanned block (training); without it they stand apart, as the sampler
    wants them (`split_layers` converts the parameters).
    """

    config: GPTConfig
    dtype: Dtype = jnp.float32
    remat: str = ""  # what is computed again in the backward pass: models/remat.py
    scan_layers: bool = True

    @nn.compact
    def __call__(
        self,
        ids_bt: jax.Array,
        *,
        positions_bt: jax.Array,
        targets_bt: jax.Array | None = None,
        attend: Attend = "causal",
        cache: Cache | None = None,
        span: int | None = None,
        last: int | None = None,
        at: jax.Array | None = None,
        train: bool = False,
        grouped: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the transformer.

        Args:
          ids_bt: tokens of the whole vocabulary, int32 [b, t].
          positions_bt: their places, int32 [b, t] (or [1, t]): the condition's from 0, then those of the codes in the
            model's order. Below block_size where they are learned, else below len(coordinates).
          targets_bt: with target_positions, the place of the token that each one predicts; by default the next one.
          attend: who sees whom; "prefix" lets the first `config.prefix` tokens see each other.
          cache: keys and values of the tokens before; only without scan_layers.
          span: static number of cache positions to attend over (all by default); must cover length + t. A span of t is
            the first call of an empty cache, which with AdaLN must hold the whole condition.
          last: logits of the last so many tokens only (all by default).
          at: logits of the token at this (traced) index [b] of each row only; without scan_layers and cache.
          train: dropout on.
          grouped: with head_bits, the logits of each group of bits instead of their sums: [b, t, groups, 2^head_bits].
            The cross-entropy of a token is the sum of its groups' (their values: `bits.split_bits`), and needs no more.

        Returns:
          Logits float32 [b, t or last or 1, head_size], and the cache with these tokens in it (None without one).
        """
        c = self.config
        x = self._embed(ids_bt)
        condition = x[:, : c.condition].mean(1) if c.adaln and self._begins(ids_bt, cache, span) else None
        x = self._place(x, positions_bt, targets_bt)
        x = nn.Dropout(c.embed_dropout, deterministic=not train)(x)
        rotation = rotation_at(c.coordinates, c.head_width, positions_bt) if c.coordinates else None
        context = Context(rotation, condition)
        rates = jnp.linspace(0, c.drop_path, c.layers) if train and c.drop_path else None
        if self.scan_layers:
            if cache is not None:
                raise ValueError("a cache needs scan_layers=False: scanning layers copies the cache at every token")
            if at is not None:
                raise ValueError("at needs scan_layers=False: it makes the last layer another than those before")
            block = remat(Block, "block", self.remat, static_argnums=(2, 4, 5), prevent_cse=False)
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(*(nn.broadcast,) * 6, nn.broadcast if rates is None else 0),
                length=c.layers,
                unroll=scan_unroll(c.layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(c, self.dtype, self.remat, name="blocks")(x, attend, None, None, train, None, context, rates)
        else:
            after = []
            for layer in range(c.layers):
                past = None
                if cache is not None:
                    known = cache.modulations[layer] if cache.modulations and condition is None else None
                    past = (cache.keys[layer], cache.values[layer], cache.length, known)
                # Of the last layer's tokens only those are computed that are asked for.
                x, past = Block(c, self.dtype, name=f"block_{layer}")(
                    x,
                    attend,
                    past,
                    span,
                    train,
                    at if layer == c.layers - 1 else None,
                    context,
                    None if rates is None else rates[layer],
                )
                after.append(past)
            if cache is not None:
                keys, values, modulations = zip(*after, strict=True)
                cache = Cache(keys, values, cache.length + ids_bt.shape[1], modulations if c.adaln else ())
        if last is not None:
            x = x[:, -last:]
        return self._head(norm(c, self.dtype, "norm_out")(x), grouped), cache

    def _begins(self, ids_bt: jax.Array, cache: Cache | None, span: int | None) -> bool:
        """Whether these tokens begin with the condition: without a cache, or as the first of an empty one."""
        t = ids_bt.shape[1]
        begins = cache is None or t == (cache.keys[0].shape[1] if span is None else span)
        if begins and cache is not None and t < self.config.condition:
            raise ValueError(f"adaln: the first call has {t} tokens, the condition {self.config.condition}")
        return begins

    def _embed(self, ids_bt: jax.Array) -> jax.Array:
        """[b, t] to [b, t, d]: a row of the table; of codes with head_bits the sum of a row a group."""
        c = self.config
        rows, codes = c.vocab_size, None
        if c.head_bits:
            codes = self.param(
                "bits_embedding", partitioned(normal, "vocab", "width"), (c.bit_groups << c.head_bits, c.width)
            )
            rows -= c.head_size
        if not rows:
            return bits.embed_bits(codes.astype(self.dtype), ids_bt, c.bit_groups, c.head_bits)
        table = self.param("token_embedding", partitioned(normal, "vocab", "width"), (rows, c.width))
        if codes is None:
            return table.astype(self.dtype)[ids_bt]
        is_code = ids_bt < c.head_size
        code = bits.embed_bits(codes.astype(self.dtype), jnp.where(is_code, ids_bt, 0), c.bit_groups, c.head_bits)
        return jnp.where(is_code[..., None], code, table.astype(self.dtype)[jnp.maximum(ids_bt - c.head_size, 0)])

    def _place(self, x: jax.Array, positions_bt: jax.Array, targets_bt: jax.Array | None) -> jax.Array:
        """Adds what is learned of the tokens' places, and of the places that they predict."""
        c = self.config
        if not c.coordinates:
            table = self.param("position_embedding", partitioned(zeros, "position", "width"), (c.block_size, c.width))
            x = x + table.astype(self.dtype)[positions_bt]
        if c.target_positions:
            table = self.param("target_embedding", partitioned(zeros, "position", "width"), (c.block_size, c.width))
            targets_bt = positions_bt + 1 if targets_bt is None else targets_bt
            x = x + table.astype(self.dtype)[targets_bt - 1]  # nothing predicts place 0
        return x

    def _head(self, x: jax.Array, grouped: bool) -> jax.Array:
        """[b, t, d] to logits."""
        c = self.config
        outputs = c.bit_groups << c.head_bits if c.head_bits else c.head_size
        head = self.param("head", partitioned(normal, "width", "vocab"), (c.width, outputs))
        logits = jnp.einsum("btd,dv->btv", x, head.astype(self.dtype), preferred_element_type=jnp.float32)
        if not c.head_bits:
            return logits
        logits = logits.reshape(*logits.shape[:2], c.bit_groups, -1)
        return logits if grouped else bits.join_logits(logits)


def split_layers(params: dict[str, Any], dtype: Dtype | None = None) -> dict[str, Any]:
    """Parameters of a scanned GPT (arrays stacked over layers) as those of an unrolled one. Call it once.

    With a dtype, what is cast to it at use anyway (all but the norms) is cast now: sampling reads every weight at every
    token, so float32 weights would cost a bfloat16 sampler twice the time.
    """
    rest = {name: value for name, value in params.items() if name != "blocks"}
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    split = rest | {f"block_{i}": jax.tree.map(lambda x: x[i], params["blocks"]) for i in range(layers)}  # noqa: B023

    return split if dtype is None else cast_weights(split, dtype)


def cast_weights(params: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """Parameters with all but the norms, which are used in float32, in another dtype."""

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if "norm" in jax.tree_util.keystr(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
