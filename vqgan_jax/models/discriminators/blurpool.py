"""The discriminator of VQGAN+ (arXiv 2409.16211): stride-1 convolutions, blurred downsampling, GroupNorm.

Nothing in it depends on the rest of the batch, and no strided kernel prints a grid on the picture (arXiv 1904.11486).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.discriminators.spectral import make_same_conv
from vqgan_jax.models.layers import GROUPS, Conv, GroupNorm

BLUR = (1 / 8, 3 / 8, 3 / 8, 1 / 8)  # as published; its outer product is the kernel
SLOPE = 0.1  # of the leaky ReLU


@dataclasses.dataclass(frozen=True)
class BlurPoolConfig:
    """Hyper-parameters of VQGAN+'s discriminator; published: 128 channels, 3 stages."""

    channels: int  # of the first stage; each later one has twice as many
    max_channels: int
    stages: int  # each halves the picture, and max pooling halves it once more: 3 of 256 pixels give 16x16 logits
    spectral_norm: bool

    def __post_init__(self) -> None:
        if self.channels % GROUPS or self.max_channels % GROUPS or min(self.channels, self.max_channels) < GROUPS:
            raise ValueError(f"channels and max_channels: multiples of GroupNorm's {GROUPS} groups")
        if self.stages < 1:
            raise ValueError("stages: 1 or more")


def blur_downsample(x: jax.Array) -> jax.Array:
    """Blurs [b, h, w, c] and takes every second pixel: [b, ceil(h / 2), ceil(w / 2), c], zeros beyond the border."""
    for axis in (1, 2):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (1, 1 + x.shape[axis] % 2)
        padded = jnp.pad(x, padding)
        last = padded.shape[axis] - len(BLUR) + 1
        taps = (jax.lax.slice_in_dim(padded, k, k + last, stride=2, axis=axis) for k in range(len(BLUR)))
        x = sum(share * tap for share, tap in zip(BLUR, taps, strict=True))
    return x


class BlurPool(nn.Module):
    """Images [b, h, w, c] -> realness logits, float32 [b, h', w', 1], h' = h / 2^(stages + 1)."""

    config: BlurPoolConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c = self.config

        def conv(features: int, size: int, name: str) -> Conv:
            return make_same_conv(c.spectral_norm, train, features, size, dtype=self.dtype, name=name)

        x = nn.leaky_relu(conv(c.channels, 5, "conv_in")(x), SLOPE)
        for k in range(c.stages):
            x = conv(min(c.channels * 2**k, c.max_channels), 3, f"conv_{k}")(x)
            x = GroupNorm(self.dtype, name=f"norm_{k}")(blur_downsample(x))
            x = nn.leaky_relu(x, SLOPE)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.leaky_relu(conv(x.shape[-1], 1, "conv_mixed")(x), SLOPE)
        return conv(1, 5, "conv_out")(x).astype(jnp.float32)
