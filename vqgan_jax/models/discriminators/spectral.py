"""Spectral normalisation of a discriminator's convolutions (arXiv 1802.05957)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vqgan_jax.models.layers import Conv

_EPSILON = 1e-12


class SpectralConv(Conv):
    """A convolution whose kernel, as a matrix [size^2 c, features], is divided by its largest singular value.

    The value is followed by one step of power iteration a training pass; "batch_stats" remembers the vector `u`
    [features]. Float32 inside. The parameters are those of `Conv`.
    """

    train: bool = False

    def weight(self, kernel: jax.Array) -> jax.Array:
        matrix = kernel.reshape(-1, self.features)
        start = lambda: _normalised(jax.random.normal(self.make_rng("params"), (self.features,)))  # noqa: E731
        remembered = self.variable("batch_stats", "u", start)
        fixed, u = jax.lax.stop_gradient(matrix), remembered.value
        times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        v = _normalised(times(fixed, u))
        if self.train:
            u = _normalised(times(v, fixed))
            if not self.is_initializing():
                remembered.value = u
        return kernel / jnp.maximum(times(times(v, matrix), u), _EPSILON)


def make_conv(spectral_norm: bool, train: bool, *args: Any, **fields: Any) -> Conv:
    """A convolution of these fields, its kernel spectrally normalised or not."""
    return SpectralConv(*args, **fields, train=train) if spectral_norm else Conv(*args, **fields)


def make_same_conv(spectral_norm: bool, train: bool, features: int, size: int, *, dtype: Dtype, name: str) -> Conv:
    """The same of stride 1 and an odd size, which keeps height and width."""
    return make_conv(spectral_norm, train, features, size, padding=(size // 2, size // 2), dtype=dtype, name=name)


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2) + _EPSILON)
