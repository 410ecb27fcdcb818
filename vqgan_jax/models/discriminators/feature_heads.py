"""Heads that judge the feature maps of a frozen network, as in StyleGAN-T (arXiv 2301.09515) and VAR (2404.02905)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.dino import DINOS
from vqgan_jax.models.discriminators.patchgan import BatchNorm
from vqgan_jax.models.discriminators.spectral import make_same_conv
from vqgan_jax.models.layers import Conv, GroupNorm


@dataclasses.dataclass(frozen=True)
class FeatureHeadsConfig:
    """Hyper-parameters of the heads, and what they look at: one head on each layer that is read."""

    network: str  # of models/dino.py
    layers: tuple[int, ...]  # 0 = the embedded patches, k = after the k-th block
    size: int  # pixels a side that the network sees the pictures at, a multiple of its patch; 0: as they are
    kernel: int  # of the residual block, odd
    norm: Literal["group", "batch"]
    spectral_norm: bool

    def __post_init__(self) -> None:
        if self.network not in DINOS:
            raise ValueError(f"network: unknown name '{self.network}'; there are: {', '.join(DINOS)}")
        network = DINOS[self.network]
        if not self.layers or not all(0 <= k <= network.depth for k in self.layers):
            raise ValueError(f"layers: {self.layers}; name some of 0 to {network.depth}")
        if self.size % network.patch:
            raise ValueError(f"size: {self.size} is no multiple of the patch of {network.patch} pixels")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel} is even")


class FeatureHeads(nn.Module):
    """Feature maps [b, h, w, c], each of its own size -> logits float32 [b, n]: those of all places of all maps."""

    config: FeatureHeadsConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool = False) -> jax.Array:
        logits = [Head(self.config, self.dtype, name=f"head_{k}")(x, train) for k, x in enumerate(maps)]
        return jnp.concatenate([x.reshape(x.shape[0], -1) for x in logits], axis=1)


class Head(nn.Module):
    """One feature map [b, h, w, c] -> logits float32 [b, h, w, 1]: as wide as the map, one residual block."""

    config: FeatureHeadsConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c, width = self.config, x.shape[-1]

        def conv(features: int, size: int, name: str) -> Conv:
            return make_same_conv(c.spectral_norm, train, features, size, dtype=self.dtype, name=name)

        def block(x: jax.Array, size: int, k: int) -> jax.Array:
            x = conv(width, size, f"conv_{k}")(x)
            if c.norm == "batch":
                x = BatchNorm(name=f"norm_{k}")(x, train)
            else:
                x = GroupNorm(self.dtype, name=f"norm_{k}")(x)
            return nn.leaky_relu(x, 0.2)

        x = block(x, 1, 0)
        x = (x + block(x, c.kernel, 1)) / math.sqrt(2)
        return conv(1, 1, "conv_out")(x).astype(jnp.float32)
