"""Encoder and decoder of the VQGAN (arXiv 2012.09841, Table 7), optionally with a strided stem and tail."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.layers import (
    AttentionBlock,
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
    conv2d,
    pixel_shuffle,
)
from vqgan_jax.models.remat import remat


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Hyper-parameters of encoder and decoder."""

    in_channels: int
    out_channels: int
    resolution: int  # nominal picture size: decides at which levels attention stands, not what sizes may go in
    channels: int
    multipliers: tuple[int, ...]  # width of each level, in units of `channels`
    blocks: int  # residual blocks a level in the encoder
    decoder_extra_blocks: int  # more of them in the decoder: 1 in the reference
    attention_resolutions: tuple[int, ...]
    mid_attention: bool
    z_channels: int
    dropout: float
    stem: int  # 1: the reference's 3x3 convolution; s > 1: convolution of stride s, and pixel shuffle by s at the end

    def __post_init__(self) -> None:
        if bad := [m for m in self.multipliers if self.channels * m % 32]:
            raise ValueError(f"channels {self.channels} times multiplier {bad[0]} is no multiple of 32 (GroupNorm)")
        if self.stem < 1 or self.stem & (self.stem - 1):
            raise ValueError(f"stem {self.stem} is no power of two")

    @property
    def factor(self) -> int:
        """Pixels a code along a side."""
        return self.stem * 2 ** (len(self.multipliers) - 1)

    def has_attention(self, level: int) -> bool:
        """Whether attention blocks stand at `level` (0 = finest)."""
        return self.resolution // self.stem // 2**level in self.attention_resolutions

    def score_bytes(self, batch: int, height: int, width: int) -> int:
        """Bytes of the largest attention's scores in float32, for pictures of height x width codes."""
        last = len(self.multipliers) - 1
        sides = [2 ** (last - level) for level in range(last + 1) if self.has_attention(level)]
        return 4 * batch * (height * width * max([*sides, int(self.mid_attention)]) ** 2) ** 2


class Middle(nn.Module):
    """The lowest level's residual block, attention, residual block, in encoder and decoder alike."""

    config: AutoencoderConfig
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        block, attention = _kinds(self.remat)
        x = block(x.shape[-1], self.config.dropout, self.dtype, name="block_1")(x, train)
        if self.config.mid_attention:
            x = attention(self.dtype, name="attention")(x)
        return block(x.shape[-1], self.config.dropout, self.dtype, name="block_2")(x, train)


def _kinds(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """Residual and attention block under the remat rule of that name."""
    return remat(ResnetBlock, "block", name, static_argnums=(2,)), remat(AttentionBlock, "attention", name)


class Encoder(nn.Module):
    """Pictures [b, h, w, c] -> [b, h / factor, w / factor, z_channels]."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    remat: str = ""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c, (block, attention) = self.config, _kinds(self.remat)
        x = x.astype(self.dtype)
        if c.stem == 1:
            x = Conv(c.channels, dtype=self.dtype, name="conv_in")(x)
        else:
            half = c.stem // 2
            x = Conv(c.channels, 2 * c.stem, c.stem, (half, half), dtype=self.dtype, name="conv_in")(x)
        for level, multiplier in enumerate(c.multipliers):
            for k in range(c.blocks):
                width = c.channels * multiplier
                x = block(width, c.dropout, self.dtype, name=f"level_{level}_block_{k}")(x, train)
                if c.has_attention(level):
                    x = attention(self.dtype, name=f"level_{level}_attention_{k}")(x)
            if level < len(c.multipliers) - 1:
                x = Downsample(self.dtype, name=f"level_{level}_downsample")(x)
        x = Middle(c, self.dtype, self.remat, name="middle")(x, train)
        x = GroupNorm(self.dtype, swish=True, name="norm_out")(x)
        return Conv(c.z_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """[b, h, w, z_channels] -> pictures [b, factor * h, factor * w, out_channels], and the last layer's input."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32
    remat: str = ""

    @nn.compact
    def __call__(self, z: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        c, (block, attention) = self.config, _kinds(self.remat)
        x = Conv(c.channels * c.multipliers[-1], dtype=self.dtype, name="conv_in")(z)
        x = Middle(c, self.dtype, self.remat, name="middle")(x, train)
        for level, multiplier in reversed(list(enumerate(c.multipliers))):
            for k in range(c.blocks + c.decoder_extra_blocks):
                width = c.channels * multiplier
                x = block(width, c.dropout, self.dtype, name=f"level_{level}_block_{k}")(x, train)
                if c.has_attention(level):
                    x = attention(self.dtype, name=f"level_{level}_attention_{k}")(x)
            if level:
                x = Upsample(self.dtype, name=f"level_{level}_upsample")(x)
        features = GroupNorm(self.dtype, swish=True, name="norm_out")(x)
        x = Conv(c.out_channels * c.stem**2, dtype=self.dtype, name="conv_out")(features)
        return pixel_shuffle(x, c.stem).astype(jnp.float32), features


def last_layer(config: AutoencoderConfig, kernel: jax.Array, features: jax.Array) -> jax.Array:
    """The decoder's last convolution alone, without bias: the layer of the adaptive weight's gradients (equation 7)."""
    return pixel_shuffle(conv2d(features, kernel.astype(features.dtype)), config.stem).astype(jnp.float32)
