"""Convolution layers of the autoencoder, the discriminators (initialised as PyTorch does it) and frozen classifiers.

Layers follow the reference's `diffusionmodules/model.py` (Appendix, Table 7 of arXiv 2012.09841).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from vqgan_jax.parallel import constrain

Padding = tuple[tuple[int, int], tuple[int, int]]
GROUPS, EPSILON = 32, 1e-6  # of GroupNorm


def torch_uniform(fan_in: int) -> Initializer:
    """PyTorch's default for convolutions, kernel and bias alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def conv2d(
    x: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: Padding = ((1, 1), (1, 1)),
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """Convolves x [b, h, w, c] with kernel [height, width, c, features]."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


class Conv(nn.Module):
    """2-D convolution, [b, h, w, c] -> [b, h', w', features]. `padding` counts (before, after) on both axes."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    bias: bool = True
    kernel_init: Initializer | None = None
    dtype: Dtype = jnp.float32
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        default = torch_uniform(self.size**2 * x.shape[-1])
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.weight(self.param("kernel", self.kernel_init or default, shape))
        padding = self.padding, self.padding
        y = conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding, self.precision)
        if self.bias:
            y = y + self.param("bias", default, (self.features,)).astype(self.dtype)
        return constrain(y, "batch", None, None, None)  # else sharded kernels would shard the channels

    def weight(self, kernel: jax.Array) -> jax.Array:
        """What the convolution multiplies with, of its parameter."""
        return kernel


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm by its running statistics, ReLU: [b, h, w, c] -> [b, h', w', features].

    The layer of frozen classifiers, in float32, by default in full precision on every platform. All its arrays are
    parameters.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True
    epsilon: float = 1e-5
    relu: bool = True
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], self.features))
        scale, variance = (self.param(name, nn.initializers.ones, (self.features,)) for name in ("scale", "variance"))
        bias, mean = (self.param(name, nn.initializers.zeros, (self.features,)) for name in ("bias", "mean"))
        padding = [(size // 2 if self.padded else 0,) * 2 for size in self.kernel]
        y = conv2d(x, kernel, self.stride, padding, self.precision)
        y = (y - mean) * (scale * jax.lax.rsqrt(variance + self.epsilon)) + bias
        return nn.relu(y) if self.relu else y


class GroupNorm(nn.Module):
    """32 groups, epsilon 1e-6, statistics in float32: the norm of the reference's autoencoder; with swish after it."""

    dtype: Dtype = jnp.float32
    swish: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] % GROUPS:
            raise ValueError(f"{x.shape[-1]} channels are no multiple of GroupNorm's {GROUPS} groups")
        norm = nn.GroupNorm(num_groups=GROUPS, epsilon=EPSILON, use_fast_variance=False, dtype=self.dtype, name="norm")
        nn.share_scope(self, norm)
        return nn.swish(norm(x)) if self.swish else norm(x)


class ResnetBlock(nn.Module):
    """Norm, swish, conv, norm, swish, dropout, conv, plus the input (through a 1x1 where the width changes)."""

    features: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        h = GroupNorm(self.dtype, swish=True, name="norm1")(x)
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = GroupNorm(self.dtype, swish=True, name="norm2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, padding=(0, 0), dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions [b, h, w, c], residual; softmax in float32."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = GroupNorm(self.dtype, name="norm")(x)
        query, key, value = (
            Conv(c, 1, padding=(0, 0), dtype=self.dtype, name=name)(y).reshape(b, h * w, c)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) * c**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(b, h, w, c)
        return x + Conv(c, 1, padding=(0, 0), dtype=self.dtype, name="out")(y)


class Downsample(nn.Module):
    """Halves height and width: 3x3, stride 2, padded on the right and bottom only, as the reference does."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = Conv(x.shape[-1], 3, stride=2, padding=(0, 1), dtype=self.dtype, name="conv")
        nn.share_scope(self, conv)
        return conv(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        conv = Conv(x.shape[-1], dtype=self.dtype, name="conv")
        nn.share_scope(self, conv)
        return conv(x)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Rearranges depth to space: [b, h, w, factor^2 * c] -> [b, factor * h, factor * w, c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)
