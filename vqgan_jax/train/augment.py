"""Differentiable augmentation of what a discriminator sees (DiffAug, arXiv 2006.10738): the published policies.

Real and fake pictures of one row are changed alike where they are given the same key. Everything is a function of the
whole batch's key, so any number of devices draws the same.
"""

import jax
import jax.numpy as jnp

from vqgan_jax.config import suggest

SHIFT = 1 / 8  # of a side: the farthest that pictures are moved
HOLE = 1 / 2  # of a side: the square that is cut out


def color(x: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5, one of each a row."""
    brightness, saturation, contrast = jax.random.uniform(key, (3, x.shape[0], 1, 1, 1))
    x = x + (brightness - 0.5)
    grey = x.mean(axis=3, keepdims=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return (x - mean) * (contrast + 0.5) + mean


def translation(x: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each row's picture by up to an eighth of its sides, zeros behind it."""
    for axis, equation, k in zip((1, 2), ("bih,bhwc->biwc", "biw,bhwc->bhic"), jax.random.split(key), strict=True):
        side = x.shape[axis]
        most = round(side * SHIFT)
        shift = jax.random.randint(k, (x.shape[0], 1, 1), -most, most + 1)
        # As a product with shifted identities: a gather a row would be slow on a TPU, and its gradient slower.
        places = jnp.arange(side)
        shifted = (places[:, None] - shift == places).astype(x.dtype)
        x = jnp.einsum(equation, shifted, x, precision=jax.lax.Precision.HIGHEST)
    return x


def cutout(x: jax.Array, key: jax.Array) -> jax.Array:
    """Blanks a rectangle of half of each side, anywhere, its centre inside the picture."""
    inside = jnp.ones((x.shape[0], 1, 1, 1), bool)
    for axis, k in zip((1, 2), jax.random.split(key), strict=True):
        side = x.shape[axis]
        hole = round(side * HOLE)
        start = jax.random.randint(k, (x.shape[0], 1, 1, 1), 0, side + 1 - hole % 2) - hole // 2
        places = jnp.arange(side).reshape([-1 if n == axis else 1 for n in range(4)])
        inside = inside & (places >= start) & (places < start + hole)
    return jnp.where(inside, 0, x)


POLICIES = {"color": color, "translation": translation, "cutout": cutout}


def parse_policy(text: str) -> tuple[str, ...]:
    """The names in "color,translation,cutout"; none of "". Raises ValueError for an unknown one."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in POLICIES:
            raise ValueError(f"augment: unknown policy '{name}'{suggest(name, POLICIES)}")
    return names


def augment(x: jax.Array, key: jax.Array, policy: tuple[str, ...]) -> jax.Array:
    """Applies a policy's parts in turn to pictures [b, h, w, c] in [-1, 1], each row drawing its own."""
    for name in policy:
        x = POLICIES[name](x, jax.random.fold_in(key, list(POLICIES).index(name)))
    return x
