"""A small convolutional classifier, trained on real images in seconds, that judges whether generated images show the
class they were asked for (a classification accuracy score in the manner of arXiv 1905.10887, the other way round).
A wider one, trained for minutes, has features by which sets of images can be compared where Inception is not at hand.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqgan_jax import storage
from vqgan_jax.evals.features import FeatureNet
from vqgan_jax.images import from_uint8

_BATCH = 64
_LEARNING_RATE = 3e-3
_SHIFT = 4  # pixels along either side, of augmented images


class _ConvNet(nn.Module):
    """Strided convolutions and a mean over positions, so that any size from 16 pixels on will do."""

    classes: int
    widths: tuple[int, ...]  # of the levels, each of half the resolution of the one before

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Images [b, h, w, 3] in [-1, 1] -> logits [b, classes], and before them pool [b, d], the mean over positions
        of the last level, and spatial [b, h' w'], its mean over channels."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=(2, 2))(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.relu(nn.Conv(self.widths[-1], (3, 3))(x))
        pool = x.mean(axis=(1, 2))
        spatial = x.mean(axis=3).reshape(len(x), -1)
        return {"logits": nn.Dense(self.classes)(pool), "pool": pool, "spatial": spatial}


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(net: _ConvNet, params: dict, pixels: jax.Array) -> jax.Array:
    return jax.nn.softmax(net.apply(params, from_uint8(pixels))["logits"])


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier: `net` and its `params`."""

    net: _ConvNet
    params: dict

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> float32 [n, classes]."""
        found = [np.zeros((0, self.net.classes), np.float32)]
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            padding = [(0, _BATCH - len(batch)), (0, 0), (0, 0), (0, 0)]  # one compiled shape for any n
            found.append(np.asarray(_probabilities(self.net, self.params, np.pad(batch, padding)))[: len(batch)])
        return np.concatenate(found)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, 3] -> int [n], the likeliest class of each."""
        return self.probabilities(images).argmax(axis=-1)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The share in [0, 1] of images, uint8 [n, h, w, 3], whose class is that of labels [n]."""
        return float((self.predict(images) == np.asarray(labels)).mean())

    def feature_net(self, name: str, size: int) -> FeatureNet:
        """Its features of images of `size` x `size` pixels in [-1, 1], for what else would take Inception's; `name`
        is for people. They compare models on one data set, and with nothing that Inception says."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return FeatureNet(name, self.net.apply, self.params, digest.hexdigest(), size)

    def save(self, path: Path, **facts: float) -> None:
        """Writes an .npz file that `load` reads, with numbers that are to be kept beside it."""
        arrays = flax.traverse_util.flatten_dict({"params": self.params}, sep="/")
        storage.save_npz(path, **{name: np.asarray(x) for name, x in arrays.items()}, **facts)

    @classmethod
    def load(cls, path: Path, classes: int, widths: tuple[int, ...]) -> tuple["Classifier", dict[str, float]]:
        """Reads what `save` wrote of a classifier of this shape, and the numbers beside it."""
        arrays = storage.load_npz(path)
        facts = {name: float(arrays.pop(name)) for name in list(arrays) if "/" not in name}
        params = flax.traverse_util.unflatten_dict(arrays, sep="/")["params"]
        return cls(_ConvNet(classes, widths), params), facts


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    seed: int,
    steps: int,
    widths: tuple[int, ...] = (16, 32, 64),
    augment: bool = False,
) -> Classifier:
    """Trains on uint8 images [n, h, w, 3] with labels [n] in [0, classes), by Adam on batches of 64.

    The same seed gives the same classifier on one machine with as many threads. Keep images that are to be scored out
    of it.

    Args:
      images: of one size.
      labels: of them.
      classes: how many there are.
      seed: of the parameters and the order of the images.
      steps: of training.
      widths: channels of the levels, multiples of 8.
      augment: mirror half of the images and shift all by up to 4 pixels, the border repeated: for sets that are small
        for their classes.

    Raises:
      ValueError: no images, labels of another length, or labels out of range.
    """
    labels = np.asarray(labels, np.int32)
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"a classifier needs one label an image, got {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: expected values in [0, {classes})")
    net = _ConvNet(classes, widths)
    params = jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    def loss(params: dict, pixels: jax.Array, targets: jax.Array) -> jax.Array:
        logits = net.apply(params, from_uint8(pixels))["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: dict, moments: optax.OptState, pixels: jax.Array, targets: jax.Array):
        updates, moments = optimizer.update(jax.grad(loss)(params, pixels, targets), moments)
        return optax.apply_updates(params, updates), moments

    rng = np.random.default_rng(seed)
    moments = optimizer.init(params)
    for _ in range(steps):
        rows = rng.integers(len(images), size=_BATCH)
        pixels = _augmented(images[rows], rng) if augment else images[rows]
        params, moments = step(params, moments, pixels, labels[rows])
    return Classifier(net, params)


def _augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images mirrored and shifted at random, each by itself."""
    mirrored = np.where(rng.random(len(images))[:, None, None, None] < 0.5, images, images[:, :, ::-1])
    padded = np.pad(mirrored, [(0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)], mode="edge")
    height, width = images.shape[1:3]
    corners = rng.integers(2 * _SHIFT + 1, size=(len(images), 2))
    return np.stack(
        [x[top : top + height, left : left + width] for x, (top, left) in zip(padded, corners, strict=True)]
    )


def class_agreement(classifier: Classifier, samples: np.ndarray, asked: np.ndarray) -> float:
    """The share in [0, 1] of generated samples, uint8 [n, h, w, 3], that show the class asked for, int [n].

    To be read beside the classifier's accuracy on held-out real images, which bounds what can be expected of it.
    """
    return classifier.accuracy(samples, asked)
