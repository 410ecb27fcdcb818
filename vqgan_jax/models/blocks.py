"""The transformer's block, as in GPT-2 or as in Llama (arXiv 2302.13971), and the pieces that either may have.

Llama: RMSNorm, SwiGLU, no biases. Either: rotary positions, QK-norm (arXiv 2302.05442), grouped-query attention (arXiv
2305.13245), AdaLN (DiT, arXiv 2212.09748), drop-path. Letters as in `gpt.py`.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from vqgan_jax.models.attention import Attend, attend_many, attend_one, attend_sequence, attention_mask
from vqgan_jax.models.remat import remat
from vqgan_jax.models.rope import Coordinates, Rotation, rotate
from vqgan_jax.parallel import constrain

EPSILON = 1e-5  # of both norms
MODULATIONS = 6  # of AdaLN: shift, scale and gate of the attention, and of the MLP
_MLP_MULTIPLE = 256  # to which LlamaGen rounds a SwiGLU's width up


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of the transformer.

    Raises:
      ValueError: sizes that do not go together.
    """

    vocab_size: int  # ids: image codes and every kind of condition token
    head_size: int  # outputs: image codes only, or the whole vocabulary where kinds share ids as in the reference
    block_size: int  # rows of the tables of learned positions
    layers: int
    heads: int
    width: int
    prefix: int  # the first tokens that attend to each other both ways under attend="prefix" (`n_unmasked`)
    embed_dropout: float
    residual_dropout: float
    attention_dropout: float
    block: Literal["gpt2", "llama"]
    kv_heads: int  # of keys and values, shared by as many heads each; 0: as many as heads
    mlp_width: int  # 0: the block's own rule
    coordinates: Coordinates  # of each place, for rotary positions; (): learned positions
    qk_norm: bool
    adaln: bool  # blocks are modulated by the mean embedding of the first `condition` tokens
    condition: int  # how many tokens those are
    drop_path: float  # of the last layer; it grows from 0 at the first
    target_positions: bool  # each token knows the place of the one that it predicts (RAR, arXiv 2411.00776)
    head_bits: int  # 0: an output a code; else codes are read as groups of so many bits: models/bits.py

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide over {self.heads} heads")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.heads} heads do not divide over {self.kv_heads}")
        if self.coordinates and self.head_width % 4:
            raise ValueError(f"positions: rotary ones need heads of a multiple of 4, not of {self.head_width}")
        if self.adaln and not self.condition:
            raise ValueError("adaln: needs a condition")
        if self.head_bits and 2 ** (self.bit_groups * self.head_bits) != self.head_size:
            raise ValueError(
                f"head_bits: {self.head_size} codes are not groups of {self.head_bits} bits; there must be 2^n of "
                "them with n a multiple of head_bits, and the condition's ids of their own"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Of keys and values, folded: what a token takes of each cache."""
        return (self.kv_heads or self.heads) * self.head_width

    @property
    def hidden(self) -> int:
        """The MLP's width: 4d in GPT-2; in LlamaGen two thirds of that, rounded up to a multiple of 256."""
        if self.mlp_width:
            return self.mlp_width
        if self.block == "gpt2":
            return 4 * self.width
        return -(-(8 * self.width // 3) // _MLP_MULTIPLE) * _MLP_MULTIPLE

    @property
    def bit_groups(self) -> int:
        """Groups of bits of a code's id."""
        return (self.head_size.bit_length() - 1) // self.head_bits


class Context(NamedTuple):
    """What all layers share: the tokens' rotation, and the condition's mean embedding [b, d]; None where unused."""

    rotation: Rotation | None = None
    condition: jax.Array | None = None


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
        rotation: Rotation | None = None,
    ) -> tuple:
        c = self.config
        d, n = c.width, c.heads
        x_btd = x

        def project(name: str, inputs: jax.Array, axes: tuple[str, str], size: int) -> jax.Array:
            kernel = self.param(f"{name}_kernel", partitioned(normal, *axes), (inputs.shape[-1], size))
            if c.block == "llama":
                return inputs @ kernel.astype(self.dtype)
            bias = self.param(f"{name}_bias", partitioned(zeros, axes[1]), (size,))
            return inputs @ kernel.astype(self.dtype) + bias.astype(self.dtype)

        asks = x_btd if at is None else token_at(x_btd, at)
        inputs = {"query": (asks, d), "key": (x_btd, c.kv_width), "value": (x_btd, c.kv_width)}
        query, key, value = (project(name, x, ("width", "heads"), size) for name, (x, size) in inputs.items())
        if c.qk_norm:
            query, key = (self._norm_heads(name, x) for name, x in (("query_norm", query), ("key_norm", key)))
        if rotation is not None:
            turn = rotation if at is None else jax.tree.map(lambda a: _angles_at(a, at), rotation)
            query, key = rotate(query, turn), rotate(key, rotation)
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
            return project("out", y_btd, ("heads", "width"), d), cache
        mask = attention_mask(attend, c.prefix, t, key.shape[1], offset)
        if cache is not None and t == 1:
            y_btd = attend_one(query[:, 0], key, value, mask[0], n)[:, None]
        else:
            drop = nn.Dropout(c.attention_dropout, deterministic=not train)
            y_btd = attend_many(query, key, value, mask, heads=n, drop=drop)
        return project("out", y_btd, ("heads", "width"), d), cache

    def _norm_heads(self, name: str, x_btd: jax.Array) -> jax.Array:
        """RMSNorm of each head's vector; the heads share its scale [k]."""
        x = x_btd.reshape(*x_btd.shape[:2], -1, self.config.head_width)
        return rms_norm(self.dtype, name, None)(x).reshape(x_btd.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with `at` [b], of that token alone.

    A layer's cache is (keys, values, length, modulation), the last one None where it is not known yet; what comes back
    is (keys, values, modulation).
    """

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
        context: Context = Context(),  # noqa: B008
        drop_path: jax.Array | None = None,
    ) -> tuple:
        c = self.config
        past, known = (None, None) if cache is None else (cache[:3], cache[3])
        drop = nn.Dropout(c.residual_dropout, deterministic=not train)
        modulation = self._modulation(context.condition) if c.adaln and known is None else known
        parts = None if modulation is None else jnp.split(modulation[:, None], MODULATIONS, axis=-1)

        def enter(name: str, x: jax.Array, k: int) -> jax.Array:
            y = norm(c, self.dtype, name)(x)
            return y if parts is None else y * (1 + parts[k + 1]) + parts[k]

        def leave(y: jax.Array, k: int) -> jax.Array:
            y = drop(y if parts is None else y * parts[k + 2])
            return y if drop_path is None else self._drop_path(y, drop_path)

        x = constrain(x, "batch", "length", "activation")
        attention = remat(Attention, "attention", self.remat, static_argnums=(2, 4, 5))
        y, past = attention(c, self.dtype, name="attention")(
            enter("norm1", x, 0), attend, past, span, train, at, context.rotation
        )
        x = (x if at is None else token_at(x, at)) + leave(y, 0)
        x = x + leave(self._mlp(enter("norm2", x, 3)), 3)
        x = constrain(x, "batch", "length", "activation")
        return x, None if past is None else (*past, modulation)

    def _mlp(self, y: jax.Array) -> jax.Array:
        """GELU (exact) in GPT-2, SwiGLU in Llama."""
        c = self.config
        d, f = c.width, c.hidden
        up = self.param("mlp_up_kernel", partitioned(normal, "width", "mlp"), (d, f))
        if c.block == "llama":
            gate = self.param("mlp_gate_kernel", partitioned(normal, "width", "mlp"), (d, f))
            down = self.param("mlp_down_kernel", partitioned(normal, "mlp", "width"), (f, d))
            y = nn.silu(y @ gate.astype(self.dtype)) * (y @ up.astype(self.dtype))
            return contract(y, down.astype(self.dtype))
        up_bias = self.param("mlp_up_bias", partitioned(zeros, "mlp"), (f,))
        down = self.param("mlp_down_kernel", partitioned(normal, "mlp", "width"), (f, d))
        down_bias = self.param("mlp_down_bias", partitioned(zeros, "width"), (d,))
        y = nn.gelu(y @ up.astype(self.dtype) + up_bias.astype(self.dtype), approximate=False)
        return contract(y, down.astype(self.dtype)) + down_bias.astype(self.dtype)

    def _modulation(self, condition: jax.Array) -> jax.Array:
        """AdaLN's six vectors [b, 6d] from the condition [b, d]; zero at the start, where a block changes nothing."""
        size = MODULATIONS * self.config.width
        kernel = self.param("modulation_kernel", partitioned(zeros, "width", "mlp"), (self.config.width, size))
        bias = self.param("modulation_bias", partitioned(zeros, "mlp"), (size,))
        modulation = nn.silu(condition) @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        # Whole on each device: XLA's partitioner computes wrong gradients of a sharded vector that is cut into six.
        return constrain(modulation, "batch", None)

    def _drop_path(self, y: jax.Array, rate: jax.Array) -> jax.Array:
        """Leaves a branch out of a share of the rows (arXiv 1603.09382)."""
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (y.shape[0], 1, 1))
        return jnp.where(kept, y / (1 - rate).astype(y.dtype), 0)


def contract(x_btf: jax.Array, kernel: jax.Array) -> jax.Array:
    """[b, t, f] @ [f, d]. One row times a matrix that is taller than wide reads it on a CPU at 0.6 of the bandwidth, so
    there it is done in four pieces, at 0.9."""
    if x_btf.shape[:2] != (1, 1) or x_btf.shape[2] % 4:
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


def _angles_at(a: jax.Array, at: jax.Array) -> jax.Array:
    """Of [b or 1, t, 1, k/2] the angles at each row's index, [b, 1, 1, k/2]."""
    a = jnp.broadcast_to(a, (at.shape[0], *a.shape[1:]))
    return jnp.take_along_axis(a, at[:, None, None, None], axis=1)


normal: Initializer = nn.initializers.normal(0.02)
zeros: Initializer = nn.initializers.zeros


def partitioned(init: Initializer, *names: str | None) -> Initializer:
    """The initialiser, with the logical axes of what it makes."""
    return nn.with_logical_partitioning(init, names)


def norm(config: GPTConfig, dtype: Dtype, name: str) -> nn.Module:
    """The block's norm, its statistics in float32. Every norm's name holds "norm": `gpt.cast_weights` tells by it."""
    return layer_norm(dtype, name) if config.block == "gpt2" else rms_norm(dtype, name, "width")


def layer_norm(dtype: Dtype, name: str) -> nn.LayerNorm:
    """PyTorch's LayerNorm: epsilon 1e-5, statistics in float32."""
    return nn.LayerNorm(
        epsilon=EPSILON,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
        scale_init=partitioned(nn.initializers.ones, "width"),
        bias_init=partitioned(zeros, "width"),
    )


def rms_norm(dtype: Dtype, name: str, axis: str | None) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + 1e-5) times a scale, in float32 (arXiv 1910.07467)."""
    scale_init = partitioned(nn.initializers.ones, axis)
    return nn.RMSNorm(epsilon=EPSILON, dtype=dtype, name=name, scale_init=scale_init)
