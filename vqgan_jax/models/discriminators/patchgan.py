"""PatchGAN discriminator (arXiv 1611.07004) with BatchNorm or ActNorm, as in the reference.

Under `jax.jit` with a sharded batch both norms' statistics are global over the mesh (the reference's are per GPU).
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.discriminators.spectral import make_conv
from vqgan_jax.models.layers import Conv


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """Hyper-parameters of the PatchGAN."""

    channels: int
    layers: int  # strided layers: 3 gives a receptive field of 70 pixels, 2 one of 34
    norm: Literal["batch", "actnorm"]
    spectral_norm: bool


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm2d: momentum 0.1, epsilon 1e-5, the running variance unbiased. Float32 inside."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c, n = x.shape[-1], x.size // x.shape[-1]
        scale = self.param("scale", lambda key: 1 + 0.02 * jax.random.normal(key, (c,)))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(c))
        running_variance = self.variable("batch_stats", "variance", lambda: jnp.ones(c))
        y = x.astype(jnp.float32)
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean = y.mean(axis=(0, 1, 2))
            variance = jnp.mean((y - mean) ** 2, axis=(0, 1, 2))
            if not self.is_initializing():
                running_mean.value = 0.9 * running_mean.value + 0.1 * mean
                running_variance.value = 0.9 * running_variance.value + 0.1 * variance * (n / max(n - 1, 1))
        return ((y - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


class ActNorm(nn.Module):
    """y = scale * (x + location), started from the first training batch (Glow, arXiv 1807.03039). Float32 inside.

    The data-dependent start is kept in "batch_stats" and the learned part, added to it, in "params".
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        location = self.param("location", nn.initializers.zeros, (c,))
        scale = self.param("scale", nn.initializers.zeros, (c,))
        start_location = self.variable("batch_stats", "location", lambda: jnp.zeros(c))
        start_scale = self.variable("batch_stats", "scale", lambda: jnp.ones(c))
        started = self.variable("batch_stats", "started", lambda: jnp.zeros((), bool))
        y = x.astype(jnp.float32)
        if train and not self.is_initializing():
            fixed = jax.lax.stop_gradient(y)
            deviation = jnp.std(fixed, axis=(0, 1, 2), ddof=1)
            start_location.value = jnp.where(started.value, start_location.value, -fixed.mean(axis=(0, 1, 2)))
            start_scale.value = jnp.where(started.value, start_scale.value, 1 / (deviation + 1e-6))
            started.value = jnp.ones((), bool)
        return ((start_scale.value + scale) * (y + start_location.value + location)).astype(x.dtype)


class PatchGAN(nn.Module):
    """Images [b, h, w, c] -> realness logits of overlapping patches, float32 [b, h', w', 1]."""

    config: PatchGANConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        c = self.config
        norm = {"batch": BatchNorm, "actnorm": ActNorm}[c.norm]
        init = nn.initializers.normal(0.02)
        bias = c.norm != "batch"  # BatchNorm would take a bias away again

        def conv(features: int, stride: int, bias: bool, name: str) -> Conv:
            fields = dict(bias=bias, kernel_init=init, dtype=self.dtype, name=name)
            return make_conv(c.spectral_norm, train, features, 4, stride, (1, 1), **fields)

        x = nn.leaky_relu(conv(c.channels, 2, True, "conv_in")(x), 0.2)
        for k in range(1, c.layers + 1):
            stride = 2 if k < c.layers else 1
            x = conv(c.channels * min(2**k, 8), stride, bias, f"conv_{k}")(x)
            x = nn.leaky_relu(norm(name=f"norm_{k}")(x, train), 0.2)
        return conv(1, 1, True, "conv_out")(x).astype(jnp.float32)
