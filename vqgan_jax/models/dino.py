"""DINO's ViT-S/8 and ViT-S/16 (arXiv 2104.14294, the official PyTorch weights): frozen features for a discriminator."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from vqgan_jax.models.layers import Conv

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's values in [0, 1]
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_EPSILON = 1e-6  # of LayerNorm
_CUBIC = -0.75  # the free coefficient of PyTorch's bicubic kernel


@dataclasses.dataclass(frozen=True)
class DINOConfig:
    """Sizes of a ViT; tests use a narrow one."""

    patch: int  # pixels a side
    size: int = 224  # of the pictures that it was trained on: one position embedding a patch of these
    width: int = 384
    depth: int = 12
    heads: int = 6


DINOS = {"dino_vits8": DINOConfig(8), "dino_vits16": DINOConfig(16)}


class Block(nn.Module):
    """Pre-norm self-attention and MLP (4 times as wide, exact GELU), both residual: [b, t, d] -> [b, t, d]."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, d = x.shape
        y = _norm("norm1")(x).astype(self.dtype)
        qkv = nn.Dense(3 * d, dtype=self.dtype, name="qkv")(y).reshape(b, t, 3, self.heads, d // self.heads)
        y = jax.nn.dot_product_attention(*(qkv[:, :, k] for k in range(3))).reshape(b, t, d)
        x = x + nn.Dense(d, dtype=self.dtype, name="out")(y)
        y = _norm("norm2")(x).astype(self.dtype)
        y = nn.gelu(nn.Dense(4 * d, dtype=self.dtype, name="mlp_up")(y), approximate=False)
        return x + nn.Dense(d, dtype=self.dtype, name="mlp_down")(y)


class DINO(nn.Module):
    """Pictures float32 [b, h, w, 3] in [-1, 1], sides divisible by the patch, to feature maps.

    Attributes:
      layers: where to read: 0 = the embedded patches, k = after the k-th block.
      class_token: add the class token to every patch, as VAR's discriminator reads it (arXiv 2404.02905).
      dtype: of products; the residual stream and norms are float32.

    Returns:
      a list of float32 [b, h / patch, w / patch, width], one a layer.
    """

    config: DINOConfig
    layers: tuple[int, ...]
    class_token: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        c = self.config
        if bad := [k for k in self.layers if not 0 <= k <= c.depth]:
            raise ValueError(f"layer {bad[0]} of a network of {c.depth} blocks")
        x = ((images + 1) / 2 - _MEAN) / _DEVIATION
        x = Conv(c.width, c.patch, c.patch, (0, 0), dtype=self.dtype, name="patch_embedding")(x)
        b, h, w, d = x.shape
        side = c.size // c.patch
        token = self.param("class_token", nn.initializers.truncated_normal(0.02), (1, d))
        positions = self.param("position_embedding", nn.initializers.truncated_normal(0.02), (1 + side**2, d))
        grid = resize_positions(positions[1:].reshape(side, side, d), h, w).reshape(h * w, d)
        first = jnp.broadcast_to(token + positions[:1], (b, 1, d))
        x = jnp.concatenate([first, x.astype(jnp.float32).reshape(b, h * w, d) + grid], axis=1)
        found = {0: x}
        for k in range(1, c.depth + 1):
            found[k] = x = Block(c.heads, self.dtype, name=f"block_{k - 1}")(x).astype(jnp.float32)

        def read(x: jax.Array) -> jax.Array:
            x = x[:, 1:] + x[:, :1] if self.class_token else x[:, 1:]
            return x.reshape(b, h, w, d)

        return [read(found[k]) for k in self.layers]


def resize_positions(grid: jax.Array, height: int, width: int) -> jax.Array:
    """Position embeddings [h, w, d] of another grid, [height, width, d]: PyTorch's bicubic, pixel centres aligned.

    The official code adds 0.1 to the new sizes against rounding, which moves every position a little; this does not.
    """
    if grid.shape[:2] == (height, width):
        return grid
    rows, columns = _cubic(grid.shape[0], height), _cubic(grid.shape[1], width)
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)


def _cubic(old: int, new: int) -> np.ndarray:
    """Weights float32 [new, old] of cubic convolution without antialiasing, borders repeated."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for k in range(4):
        distance = np.abs(place - (first + k))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        np.add.at(weights, (np.arange(new), np.clip(first + k, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)
