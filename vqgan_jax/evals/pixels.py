"""How close reconstructions come to their images, pixel by pixel: PSNR, SSIM (Wang et al. 2004) and L1, one number an
image, and the collection that averages them over a data set. Pictures are compared as they would be saved: in uint8."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from vqgan_jax.config import UserError
from vqgan_jax.evals.codes import CodeCounts, PerImage, entropy, mean_and_error
from vqgan_jax.images import from_uint8

# An image met exactly has infinite PSNR, and one would carry the mean away. About what a single channel of a 256x256
# image off by one level scores.
EXACT_PSNR = 100.0

_SSIM_WINDOW, _SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 11, 1.5, 0.01, 0.03


def through_uint8(images: jax.Array) -> jax.Array:
    """Float images in [-1, 1] (clipped) to the nearest values that uint8 holds, still float32 in [-1, 1]."""
    return from_uint8(jnp.clip(jnp.round((images.astype(jnp.float32) + 1) * 127.5), 0, 255))


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images [b, h, w, c] in [-1, 1] (range 2) -> [b]; infinite where equal."""
    return 10 * jnp.log10(4 / jnp.square(a - b).mean(axis=(1, 2, 3)))


def l1(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean absolute difference of images [b, h, w, c] in [-1, 1] -> [b] in [0, 2]."""
    return jnp.abs(a - b).mean(axis=(1, 2, 3))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity of images [b, h, w, c] in [-1, 1] -> [b] in [-1, 1]; 1 where equal.

    As scikit-image computes it on uint8 pictures with gaussian_weights=True, use_sample_covariance=False: a Gaussian
    window of 11 pixels with sigma 1.5, wholly inside the picture; the mean over positions and channels. Measured on
    [0, 1], since the luminance term depends on where zero lies.

    Raises:
      UserError: images smaller than the window.
    """
    _, h, w, _ = a.shape
    if min(h, w) < _SSIM_WINDOW:
        raise UserError(f"images of {h}x{w} cannot be scored: SSIM needs at least {_SSIM_WINDOW} pixels a side")
    rows, columns = _window_matrix(h), _window_matrix(w)

    def blur(x: jax.Array) -> jax.Array:
        return jnp.einsum("bhwc,yh,xw->byxc", x, rows, columns, precision=jax.lax.Precision.HIGHEST)

    a, b = (a + 1) / 2, (b + 1) / 2
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _SSIM_K1**2) / (mean_a**2 + mean_b**2 + _SSIM_K1**2)
    structure = (2 * covariance + _SSIM_K2**2) / (variances + _SSIM_K2**2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def _window_matrix(size: int) -> np.ndarray:
    """The Gaussian window along one axis as a band matrix [size - 10, size] (a convolution without padding)."""
    reach = np.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    weights = np.exp(-0.5 * (reach / _SSIM_SIGMA) ** 2)
    band = np.zeros((size - _SSIM_WINDOW + 1, size), np.float32)
    for k, weight in enumerate(weights / weights.sum()):
        np.fill_diagonal(band[:, k:], weight)
    return band


@flax.struct.dataclass
class ReconstructionMetrics(metrics.Collection):
    """What a VQGAN keeps of held-out images. Create it inside jit, merge outside (see PerImage)."""

    psnr: PerImage.from_output("psnr")
    ssim: PerImage.from_output("ssim")
    l1: PerImage.from_output("l1")
    codes: CodeCounts

    @classmethod
    def single_from_model_output(
        cls, *, image: jax.Array, reconstruction: jax.Array, codes: jax.Array, codebook_size: int, valid: jax.Array
    ) -> "ReconstructionMetrics":
        """Scores one batch.

        Args:
          image: [b, h, w, c] in [-1, 1].
          reconstruction: likewise; both are rounded through uint8 here.
          codes: int32 [b, ...], the image's codes in [0, codebook_size).
          codebook_size: a Python int.
          valid: bool [b], False at padding.

        Raises:
          UserError: images smaller than SSIM's window of 11 pixels.
        """
        a, b = through_uint8(image), through_uint8(reconstruction)
        return super().single_from_model_output(
            psnr=jnp.minimum(psnr(a, b), EXACT_PSNR),
            ssim=ssim(a, b),
            l1=l1(a, b),
            codes=codes,
            codebook_size=codebook_size,
            mask=valid,
        )

    def compute(self) -> dict[str, float]:
        """Means over the images of psnr (dB), ssim and l1, each with NAME_stderr; psnr_p10, its 10th percentile;
        codebook_usage, the share of codes that any image used; codebook_perplexity, how many codes used equally often
        would be as diverse; images, how many."""
        values = super().compute()
        counts = values["codes"]
        return {
            **mean_and_error("psnr", values["psnr"]),
            "psnr_p10": float(np.percentile(values["psnr"], 10)),
            **mean_and_error("ssim", values["ssim"]),
            **mean_and_error("l1", values["l1"]),
            "codebook_usage": float((counts > 0).mean()),
            "codebook_perplexity": math.exp(entropy(counts)),
            "images": float(len(values["psnr"])),
        }
