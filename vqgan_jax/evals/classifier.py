"""A small convolutional classifier, trained on real images in seconds, that judges whether generated images show the
class they were asked for (a classification accuracy score in the manner of arXiv 1905.10887, the other way round)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqgan_jax.images import from_uint8

_BATCH = 64
_LEARNING_RATE = 3e-3


class _ConvNet(nn.Module):
    """Strided convolutions and a mean over positions, so that any size from 16 pixels on will do."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [b, h, w, 3] in [-1, 1] -> logits [b, classes]."""
        for width in (16, 32, 64):
            x = nn.Conv(width, (3, 3), strides=(2, 2))(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(net: _ConvNet, params: dict, pixels: jax.Array) -> jax.Array:
    return jax.nn.softmax(net.apply(params, from_uint8(pixels)))


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


def train_classifier(images: np.ndarray, labels: np.ndarray, classes: int, *, seed: int, steps: int) -> Classifier:
    """Trains on uint8 images [n, h, w, 3] with labels [n] in [0, classes), by Adam on batches of 64.

    The same seed gives the same classifier. Keep images that are to be scored out of it.

    Raises:
      ValueError: no images, labels of another length, or labels out of range.
    """
    labels = np.asarray(labels, np.int32)
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"a classifier needs one label an image, got {len(images)} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: expected values in [0, {classes})")
    net = _ConvNet(classes)
    params = jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, *images.shape[1:])))
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, steps))

    def loss(params: dict, pixels: jax.Array, targets: jax.Array) -> jax.Array:
        logits = net.apply(params, from_uint8(pixels))
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: dict, moments: optax.OptState, pixels: jax.Array, targets: jax.Array):
        updates, moments = optimizer.update(jax.grad(loss)(params, pixels, targets), moments)
        return optax.apply_updates(params, updates), moments

    rng = np.random.default_rng(seed)
    moments = optimizer.init(params)
    for _ in range(steps):
        rows = rng.integers(len(images), size=_BATCH)
        params, moments = step(params, moments, images[rows], labels[rows])
    return Classifier(net, params)


def class_agreement(classifier: Classifier, samples: np.ndarray, asked: np.ndarray) -> float:
    """The share in [0, 1] of generated samples, uint8 [n, h, w, 3], that show the class asked for, int [n].

    To be read beside the classifier's accuracy on held-out real images, which bounds what can be expected of it.
    """
    return classifier.accuracy(samples, asked)
