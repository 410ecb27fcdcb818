"""The Inception v3 network (arXiv 1512.00567) that the FID is defined by, as TensorFlow's 2015 graph computes it:
1008 outputs, average pools that do not count padding, a max pool in the last block. Float32 and full precision on every
platform: lower ones move features by 1e-3. Modules are named as in the published PyTorch port of the weights."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqgan_jax.models.layers import ConvNorm

SIZE = 299
CLASSES = 1008
_SPATIAL_CHANNELS = 7


class _Conv(ConvNorm):
    """The network's convolution."""

    epsilon: float = 1e-3


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _pooled(x: jax.Array, pool: str) -> jax.Array:
    """A 3x3 pool that keeps the size."""
    if pool == "max":
        return nn.max_pool(x, (3, 3), padding="SAME")
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


class _Block(nn.Module):
    """Branches of convolutions on one input, joined."""

    def chain(self, x: jax.Array, name: str, *steps: tuple[int, tuple[int, int]]) -> jax.Array:
        """Convolutions `name`_1, `name`_2, ... of (width, kernel)."""
        for k, (width, kernel) in enumerate(steps, 1):
            x = _Conv(width, kernel, name=f"{name}_{k}")(x)
        return x

    def pool(self, x: jax.Array, width: int, pool: str = "average") -> jax.Array:
        """The pool branch, after its 1x1 convolution."""
        return _Conv(width, name="branch_pool")(_pooled(x, pool))


class BlockA(_Block):
    """35x35: 1x1, 5x5, two 3x3 and a pool."""

    pool_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = (
            _Conv(64, name="branch1x1")(x),
            self.chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            self.pool(x, self.pool_width),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockB(_Block):
    """35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)))
        branches = (
            _Conv(384, (3, 3), 2, padded=False, name="branch3x3")(x),
            _Conv(96, (3, 3), 2, padded=False, name="branch3x3dbl_3")(double),
            _max_pool(x),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockC(_Block):
    """17x17: 1x1, 7x7 and two 7x7 as pairs of 1x7 and 7x1, and a pool."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w, row, column = self.width, (1, 7), (7, 1)
        branches = (
            _Conv(192, name="branch1x1")(x),
            self.chain(x, "branch7x7", (w, (1, 1)), (w, row), (192, column)),
            self.chain(x, "branch7x7dbl", (w, (1, 1)), (w, column), (w, row), (w, column), (192, row)),
            self.pool(x, 192),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockD(_Block):
    """17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = _Conv(192, name="branch3x3_1")(x)
        large = self.chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        branches = (
            _Conv(320, (3, 3), 2, padded=False, name="branch3x3_2")(small),
            _Conv(192, (3, 3), 2, padded=False, name="branch7x7x3_4")(large),
            _max_pool(x),
        )
        return jnp.concatenate(branches, axis=-1)


class BlockE(_Block):
    """8x8: 1x1, 3x3 and two 3x3 that end in a 1x3 beside a 3x1, and a pool of either kind."""

    pool_kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small = _Conv(384, name="branch3x3_1")(x)
        double = self.chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        branches = (
            _Conv(320, name="branch1x1")(x),
            _Conv(384, (1, 3), name="branch3x3_2a")(small),
            _Conv(384, (3, 1), name="branch3x3_2b")(small),
            _Conv(384, (1, 3), name="branch3x3dbl_3a")(double),
            _Conv(384, (3, 1), name="branch3x3dbl_3b")(double),
            self.pool(x, 192, self.pool_kind),
        )
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """Prepared pictures float32 [b, 299, 299, 3] in about [-1, 1] -> float32
    pool [b, 2048], the features of FID, KID, precision and recall;
    spatial [b, 2023], of sFID: 7 channels at 17x17 of the graph's "mixed_6/conv";
    logits [b, 1008], of the Inception Score: without the last layer's bias, which no tool adds."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Mapping[str, jax.Array]:
        x = _Conv(32, (3, 3), 2, padded=False, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), padded=False, name="Conv2d_2a_3x3")(x)
        x = _max_pool(_Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = _Conv(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(_Conv(192, (3, 3), padded=False, name="Conv2d_4a_3x3")(x))
        for name, pool_width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_width, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)  # the 1x1 branch comes first in the join
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE("average", name="Mixed_7b")(x)
        pool = BlockE("max", name="Mixed_7c")(x).mean(axis=(1, 2))
        kernel = self.param("fc", nn.initializers.lecun_normal(), (pool.shape[-1], CLASSES))
        logits = jnp.matmul(pool, kernel, precision=jax.lax.Precision.HIGHEST)
        return {"pool": pool, "spatial": spatial, "logits": logits}
