"""LPIPS with VGG16 features (arXiv 1801.03924, version 0.1), float32 throughout."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.models.layers import Conv

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Inside the square root: the gradient at an all-zero feature vector stays finite.
_EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class LPIPSConfig:
    """Widths and depths of the five VGG stages; tests use a narrow network."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    depths: tuple[int, ...] = (2, 2, 3, 3, 3)


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images float32 [b, h, w, 3] in [-1, 1]: float32 [b]."""

    config: LPIPSConfig = LPIPSConfig()

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        # Pairs side by side, so that on a mesh each device holds both of its own: no features travel.
        pairs = jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
        x = (pairs.astype(jnp.float32) - _SHIFT) / _SCALE
        distance = jnp.zeros(a.shape[0])
        for stage, (width, depth) in enumerate(zip(self.config.widths, self.config.depths, strict=True)):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for k in range(depth):
                x = nn.relu(Conv(width, name=f"stage_{stage}_conv_{k}")(x))
            unit = x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + _EPSILON)
            unit_a, unit_b = jnp.moveaxis(unit.reshape(-1, 2, *unit.shape[1:]), 1, 0)
            weights = self.param(f"linear_{stage}", nn.initializers.constant(1 / width), (width,))
            distance += jnp.mean(jnp.einsum("bhwc,c->bhw", (unit_a - unit_b) ** 2, weights), axis=(1, 2))
        return distance
