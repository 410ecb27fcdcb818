"""The transformer of stage 2: GPT-2 as in minGPT, pre-norm, learned positions, untied head, prefix of full attention.

Letters: b batch, t tokens, d width, n heads, k head dim, f MLP width, v vocabulary, s cache length, l layers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype, Initializer

from vqgan_jax.models.attention import Attend, attend_many, attend_one, attend_sequence, attention_mask
from vqgan_jax.models.remat import remat
from vqgan_jax.parallel import constrain, scan_unroll


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of the transformer."""

    vocab_size: int  # rows of the embedding table: image codes and every kind of condition token
    head_size: int  # outputs: image codes only, or the whole vocabulary where kinds share ids as in the reference
    block_size: int  # positions
    layers: int
    heads: int
    width: int
    prefix: int  # the first tokens that attend to each other both ways under attend="prefix" (`n_unmasked`)
    embed_dropout: float
    residual_dropout: float
    attention_dropout: float

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide over {self.heads} heads")


@struct.dataclass
class Cache:
    """Keys and values of past tokens, one full allocation a layer [b, s, n*k], and how many positions are filled."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


def init_cache(config: GPTConfig, batch: int, length: int, dtype: Dtype) -> Cache:
    """An empty cache for `batch` sequences of up to `length` tokens."""

    def one() -> tuple[jax.Array, ...]:
        zeros = (jnp.zeros((batch, length, config.width), dtype) for _ in range(config.layers))
        return tuple(constrain(x, "batch", "length", "heads") for x in zeros)

    return Cache(one(), one(), jnp.zeros((), jnp.int32))


class Attention(nn.Module):
    """Multi-head self-attention, [b, t, d] -> [b, t, d]; with a layer's cache (keys, values, length) if given. With
    `at` [b], of that token alone, [b, 1, d]."""

    config: GPTConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attend: Attend,
        cache: Any,
        span: int | None,
        train: bool,
        at: jax.Array | None = None,
    ) -> tuple:
        c = self.config
        d, n = c.width, c.heads
        x_btd = x

        def project(name: str, inputs: jax.Array, axes: tuple[str, str]) -> jax.Array:
            kernel = self.param(f"{name}_kernel", partitioned(_normal, *axes), (d, d))
            bias = self.param(f"{name}_bias", partitioned(_zeros, axes[1]), (d,))
            return inputs @ kernel.astype(self.dtype) + bias.astype(self.dtype)

        asks = x_btd if at is None else token_at(x_btd, at)
        inputs = {"query": asks, "key": x_btd, "value": x_btd}
        query, key, value = (project(name, inputs[name], ("width", "heads")) for name in inputs)
        t = query.shape[1]
        offset = 0 if at is None else at[:, None, None, None]
        if cache is not None:
            keys, values, offset = cache
            keys = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), offset, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), offset, axis=1)
            cache = (keys, values)
            key, value = (a[:, :span].astype(self.dtype) for a in (keys, values))
        if cache is None and at is None and attend == "causal" and not (train and c.attention_dropout):
            y_btd = attend_sequence(query, key, value, heads=n)
            return project("out", y_btd, ("heads", "width")), cache
        mask = attention_mask(attend, c.prefix, t, key.shape[1], offset)
        if cache is not None and t == 1:
            y_btd = attend_one(query[:, 0], key, value, mask[0], n)[:, None]
        else:
            drop = nn.Dropout(c.attention_dropout, deterministic=not train)
            y_btd = attend_many(query, key, value, mask, heads=n, drop=drop)
        return project("out", y_btd, ("heads", "width")), cache


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with exact GELU; with `at` [b], of that token alone."""

    config: GPTConfig
    dtype: Dtype
    remat: str = ""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attend: Attend,
        cache: Any,
        span: int | None,
        train: bool,
        at: jax.Array | None = None,
    ) -> tuple:
        c = self.config
        d, f = c.width, 4 * c.width
        drop = nn.Dropout(c.residual_dropout, deterministic=not train)
        x = constrain(x, "batch", "length", "activation")
        attention = remat(Attention, "attention", self.remat, static_argnums=(2, 4, 5))
        y, cache = attention(c, self.dtype, name="attention")(
            layer_norm(self.dtype, "norm1")(x), attend, cache, span, train, at
        )
        x = (x if at is None else token_at(x, at)) + drop(y)
        y = layer_norm(self.dtype, "norm2")(x)
        up = self.param("mlp_up_kernel", partitioned(_normal, "width", "mlp"), (d, f))
        up_bias = self.param("mlp_up_bias", partitioned(_zeros, "mlp"), (f,))
        down = self.param("mlp_down_kernel", partitioned(_normal, "mlp", "width"), (f, d))
        down_bias = self.param("mlp_down_bias", partitioned(_zeros, "width"), (d,))
        y = nn.gelu(y @ up.astype(self.dtype) + up_bias.astype(self.dtype), approximate=False)
        x = x + drop(contract(y, down.astype(self.dtype)) + down_bias.astype(self.dtype))
        return constrain(x, "batch", "length", "activation"), cache


def contract(x_btf: jax.Array, kernel: jax.Array) -> jax.Array:
    """[b, t, f] @ [f, d]. One row times a matrix that is taller than wide reads it on a CPU at 0.6 of the bandwidth, so
    there it is done in four pieces, at 0.9."""
    if x_btf.shape[:2] != (1, 1):
        return x_btf @ kernel

    def in_pieces(x: jax.Array, kernel: jax.Array) -> jax.Array:
        pieces = x.reshape(1, 1, 4, -1), kernel.reshape(4, -1, kernel.shape[1])
        return jnp.einsum("btgf,gfd->gbtd", *pieces, preferred_element_type=jnp.float32).sum(0).astype(x.dtype)

    return jax.lax.platform_dependent(
        x_btf, kernel, tpu=jnp.matmul, cuda=jnp.matmul, rocm=jnp.matmul, default=in_pieces
    )


def token_at(x_btd: jax.Array, at: jax.Array) -> jax.Array:
    """Of each row the token at its index: [b, t, d] and [b] to [b, 1, d]."""
    return jnp.take_along_axis(x_btd, at[:, None, None], axis=1)


_normal: Initializer = nn.initializers.normal(0.02)
_zeros: Initializer = nn.initializers.zeros


def partitioned(init: Initializer, *names: str | None) -> Initializer:
    """The initialiser, with the logical axes of what it makes."""
    return nn.with_logical_partitioning(init, names)


def layer_norm(dtype: Dtype, name: str) -> nn.LayerNorm:
    """PyTorch's LayerNorm: epsilon 1e-5, statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
        scale_init=partitioned(nn.initializers.ones, "width"),
        bias_init=partitioned(_zeros, "width"),
    )


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
        attend: Attend = "causal",
        cache: Cache | None = None,
        span: int | None = None,
        last: int | None = None,
        at: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the transformer.

        Args:
          ids_bt: tokens of the whole vocabulary, int32 [b, t].
          positions_bt: their positions, int32 [b, t] (or [1, t]), below block_size.
          attend: who sees whom; "prefix" lets the first `config.prefix` tokens see each other.
          cache: keys and values of the tokens before; only without scan_layers.
          span: static number of cache positions to attend over (all by default); must cover length + t.
          last: logits of the last so many tokens only (all by default).
          at: logits of the token at this (traced) index [b] of each row only; without scan_layers and cache.
          train: dropout on.

        Returns:
          Logits float32 [b, t or last or 1, head_size], and the cache with these tokens in it (None without one).
        """
        c = self.config
        table = self.param("token_embedding", partitioned(_normal, "vocab", "width"), (c.vocab_size, c.width))
        places = self.param("position_embedding", partitioned(_zeros, "position", "width"), (c.block_size, c.width))
        x = table.astype(self.dtype)[ids_bt] + places.astype(self.dtype)[positions_bt]
        x = nn.Dropout(c.embed_dropout, deterministic=not train)(x)
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
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
                unroll=scan_unroll(c.layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(c, self.dtype, self.remat, name="blocks")(x, attend, None, None, train)
        else:
            keys, values = [], []
            for layer in range(c.layers):
                past = None if cache is None else (cache.keys[layer], cache.values[layer], cache.length)
                # Of the last layer's tokens only those are computed that are asked for.
                x, past = Block(c, self.dtype, name=f"block_{layer}")(
                    x, attend, past, span, train, at if layer == c.layers - 1 else None
                )
                if past is not None:
                    keys.append(past[0])
                    values.append(past[1])
            if cache is not None:
                cache = Cache(tuple(keys), tuple(values), cache.length + ids_bt.shape[1])
        if last is not None:
            x = x[:, -last:]
        x = layer_norm(self.dtype, "norm_out")(x)
        head = self.param("head", partitioned(_normal, "width", "vocab"), (c.width, c.head_size))
        logits = jnp.einsum("btd,dv->btv", x, head.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits, cache


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
