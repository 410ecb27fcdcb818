"""A feature network small enough for tests."""

import jax.numpy as jnp
import numpy as np

from vqgan_jax.evals.features import FeatureNet


def small_net(size: int = 8, seed: int = 0, sha256: str = "0" * 64) -> FeatureNet:
    """Random projections of the picture and a bend: 6 pooled features, 5 spatial ones, 4 logits."""
    rng = np.random.default_rng(seed)
    widths = {"pool": 6, "spatial": 5, "logits": 4}
    variables = {
        name: rng.normal(size=(size * size * 3, width)).astype(np.float32) * 0.2 for name, width in widths.items()
    }

    def apply(variables, x):
        flat = x.reshape(len(x), -1)
        return {name: jnp.tanh(jnp.matmul(flat, w, precision="highest")) * 2 for name, w in variables.items()}

    return FeatureNet("small", apply, variables, sha256, size)


def pictures(n: int, size: tuple[int, int] = (12, 10), seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 [n, h, w, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 3, 3, 3))
    rows, columns = (np.linspace(0, 2, length) for length in size)
    hats = [np.maximum(1 - np.abs(places[:, None] - np.arange(3)), 0) for places in (rows, columns)]
    return np.rint(np.einsum("nijc,yi,xj->nyxc", coarse, *hats)).astype(np.uint8)
