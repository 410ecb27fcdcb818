"""What looks at every sample as it is made, beside the feature network: does it show what was asked for?

A judge has `add(pictures, indices)` and `result() -> figures`, of the samples of all hosts.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax import weights
from vqgan_jax.config import UserError
from vqgan_jax.convert import networks
from vqgan_jax.data.source import readable
from vqgan_jax.evals import conditional
from vqgan_jax.evals.classifier import Classifier, train_classifier
from vqgan_jax.evals.features import FeatureNet, Images
from vqgan_jax.evals.moments import gather
from vqgan_jax.images import from_uint8, to_uint8
from vqgan_jax.scoring.bench import spread
from vqgan_jax.train import setup

CLASSIFIER_IMAGES, CLASSIFIER_STEPS, HELD_OUT_IMAGES = 4096, 200, 512
RESNETS = ("resnet101", "resnet50")
SMALL = "small"  # trained here on the data set's own images
Asked = Callable[[np.ndarray], conditional.Batch]  # indices [n] of samples -> what they were asked for, by batch key


class Judge(Protocol):
    """Sees all samples of this host."""

    def add(self, pictures: np.ndarray, indices: np.ndarray) -> None:
        """Looks at uint8 [n, h, w, 3], the samples `indices` [n]."""

    def result(self) -> dict[str, Any]:
        """The figures, of the samples of all hosts. Called by all hosts."""


def shuffled(count: int) -> np.ndarray:
    """For each of `count` samples the number of another, whose condition is the baseline: what a sample shows of a
    condition that it was not asked for."""
    order = np.random.default_rng(0).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)  # never itself
    return other


def shown_to(judges: Sequence[Judge], images: Images) -> Images:
    """Passes pictures on after every judge has seen them."""
    for pictures, indices in images:
        for judge in judges:
            judge.add(pictures, indices)
        yield pictures, indices


def read_examples(source: Any, transform: Any, most: int) -> dict[str, np.ndarray]:
    """Up to `most` examples of a source, spread out, as the model sees them: arrays by batch key, `image` in uint8.
    One that cannot be read is replaced by the next that can."""
    rng, indices = np.random.default_rng(0), spread(most, len(source))
    found: dict[str, np.ndarray] = {}
    for place, index in enumerate(indices.tolist()):  # into place: gigabytes are not held twice
        for key, value in transform(readable(source, index), rng).items():
            x = to_uint8(value) if key == "image" else np.asarray(value)
            if key not in found:
                found[key] = np.empty((len(indices), *x.shape), x.dtype)
            found[key][place] = x
    return found


def small_classifier(data: setup.Data, seed: int, steps: int) -> tuple[Classifier, float]:
    """A classifier trained on the data set, and its accuracy on held-out images."""
    train = read_examples(data.train, data.val_transform, CLASSIFIER_IMAGES)
    held_out = read_examples(data.val, data.val_transform, HELD_OUT_IMAGES)
    classes = len(data.train.classes)
    classifier = train_classifier(train["image"], train["label"], classes, seed=seed, steps=steps)
    return classifier, classifier.accuracy(held_out["image"], held_out["label"])


class ClassJudge:
    """How often a classifier takes a sample for the class asked for."""

    def __init__(self, classifier: Classifier, accuracy: float, labels: np.ndarray):
        """`accuracy`: the classifier's on held-out images, which bounds what can be expected; `labels` by index."""
        self._classifier, self._accuracy, self._labels = classifier, accuracy, labels
        self._others = labels[shuffled(len(labels))]
        self._sums = np.zeros(3)

    def add(self, pictures: np.ndarray, indices: np.ndarray) -> None:
        if len(pictures):
            found = self._classifier.predict(pictures)
            right, wrong = ((found == labels[indices]).sum() for labels in (self._labels, self._others))
            self._sums += right, wrong, len(pictures)

    def result(self) -> dict[str, Any]:
        right, wrong, count = gather(self._sums).sum(axis=0)
        return {
            "class_agreement": float(right / count),
            "class_agreement_shuffled": float(wrong / count),
            "classifier_accuracy": self._accuracy,
            "class_samples": int(count),
        }


class ConditionJudge:
    """Whether samples show what they were asked for, by a check of evals/conditional.py."""

    def __init__(self, key: str, check: conditional.Check, asked: Asked, count: int, real: conditional.Batch):
        """`asked` says what each of `count` samples was asked for; `real`, held-out pictures and their conditions, are
        scored too: what is attainable, where a check has to learn."""
        self._key, self._check, self._asked = key, check, asked
        self._other = shuffled(count)
        self._real = {name: float(np.nanmean(values)) for name, values in check(real["image"], real).items()}
        self._sums = np.zeros((len(self._real), 2, 2))  # by measure: what was asked for and another's; sum and count

    def add(self, pictures: np.ndarray, indices: np.ndarray) -> None:
        if not len(pictures):
            return
        for k, chosen in enumerate((indices, self._other[indices])):
            measures = self._check(pictures, self._asked(chosen))
            for place, name in enumerate(self._real):
                values = measures[name]
                self._sums[place, k] += np.nansum(values), np.isfinite(values).sum()

    def result(self) -> dict[str, Any]:
        """By KEY_MEASURE: of the samples, of real pictures, and of the samples against conditions of others."""
        totals = gather(self._sums).sum(axis=0)
        found = {}
        for name, ((right, count), (wrong, others)) in zip(self._real, totals, strict=True):
            figure = f"{self._key}_{name}"
            found |= {figure: float(right / max(count, 1)), f"{figure}_shuffled": float(wrong / max(others, 1))}
            if self._key in conditional.LEARNT:  # the others find in a real picture what was derived from it
                found[f"{figure}_real"] = self._real[name]
        return found


class Kept:
    """Keeps the pictures of the first `count` indices, on all hosts."""

    def __init__(self, count: int):
        self._count, self._rows = count, {}

    def add(self, pictures: np.ndarray, indices: np.ndarray) -> None:
        self._rows |= {int(i): pictures[k].copy() for k, i in enumerate(indices) if i < self._count}

    def result(self) -> dict[str, Any]:
        return {}

    def pictures(self) -> np.ndarray:
        """uint8 [count, h, w, 3] on every host. Called by all hosts."""
        order = sorted(self._rows)
        most = int(gather(np.array(len(order))).max())
        shape = gather(np.array(self._rows[order[0]].shape if order else (0, 0, 0))).max(axis=0)
        # A byte a word: what is gathered travels in words of 32 bits.
        pixels, indices = np.zeros((most, *shape), np.uint32), np.full(most, -1)
        for slot, index in enumerate(order):
            pixels[slot], indices[slot] = self._rows[index], index
        pixels, indices = gather(pixels).reshape(-1, *shape), gather(indices).reshape(-1)
        place = np.argsort(indices, kind="stable")
        return pixels[place[indices[place] >= 0]].astype(np.uint8)


def condition_judges(keys: Iterable[str], data: setup.Data, asked: Asked, count: int) -> list[Judge]:
    """A judge for each batch key of a condition that can be looked for in a picture.

    Args:
      keys: of the condition.
      data: real pictures, from which the checks learn; `val_transform` is a `Transform`.
      asked: indices [n] -> what those samples were asked for, by batch key.
      count: samples in all.
    """
    there = readable(data.val, 0).keys()
    judges: list[Judge] = []
    for key in keys:
        learnt = conditional.LEARNT.get(key)
        if key in conditional.FROM_PICTURE:
            derive = conditional.from_transform(dataclasses.replace(data.val_transform, keys=(key,), resize_to=0), key)
            check, needed = conditional.check_of_picture(key, derive), (key,)
        elif learnt is not None and there >= set(learnt.keys):
            needed = learnt.keys
            transform = dataclasses.replace(data.val_transform, keys=("image", *needed))
            check = learnt.make(read_examples(data.train, transform, CLASSIFIER_IMAGES))
        else:
            continue
        real = dataclasses.replace(data.val_transform, keys=("image", *needed))
        judges.append(ConditionJudge(key, check, asked, count, read_examples(data.val, real, HELD_OUT_IMAGES)))
    return judges


def open_resnet(name: str, path: str) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """ImageNet's classifier for rejection sampling: pictures uint8 [n, h, w, 3] -> probabilities [n, 1000], and the
    SHA-256 of its weights."""
    net = networks.load_resnet(name, weights.fetch(name, path, flag="--classifier_weights"))
    return probabilities_of(net), net.sha256


def probabilities_of(net: FeatureNet, rows: int = 32) -> Callable[[np.ndarray], np.ndarray]:
    """A classifying network as pictures uint8 [n, h, w, 3] -> probabilities [n, classes]: the short side is resized to
    8/7 of its input, the centre is cut out."""
    size = net.size

    @jax.jit
    def run(variables: Any, pixels: jax.Array) -> jax.Array:
        b, h, w, c = pixels.shape
        scale = round(size * 8 / 7) / min(h, w)
        resized = (b, max(size, round(h * scale)), max(size, round(w * scale)), c)
        x = jax.image.resize(from_uint8(pixels), resized, "bilinear")
        top, left = (resized[1] - size) // 2, (resized[2] - size) // 2
        return jax.nn.softmax(net.apply(variables, x[:, top : top + size, left : left + size])["logits"])

    def probabilities(pictures: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(pictures), rows):
            batch = pictures[start : start + rows]
            padded = np.pad(batch, [(0, rows - len(batch)), (0, 0), (0, 0), (0, 0)])  # one compiled shape
            found.append(np.asarray(run(net.variables, jnp.asarray(padded)))[: len(batch)])
        return np.concatenate(found)

    return probabilities


def choose_classifier(
    name: str, path: str, classes: int, small: Callable[[], Classifier]
) -> tuple[Any, dict[str, str]]:
    """The classifier that rejects, as `probabilities`, and what it is.

    Args:
      name: "resnet101", "resnet50", "small", or "" for resnet101 where the model has ImageNet's 1000 classes and else
        the small one.
      path: a file of weights, "" for the cached or downloaded one.
      classes: of the model.
      small: trains the small one.

    Raises:
      UserError: ImageNet's classifier for other classes, or an unknown name.
    """
    name = name or (RESNETS[0] if classes == 1000 else SMALL)
    if name == SMALL:
        return small().probabilities, {"name": SMALL}
    if name not in RESNETS:
        raise UserError(f"--classifier={name}: there are {', '.join((*RESNETS, SMALL))}")
    if classes != 1000:
        raise UserError(f"--classifier={name}: knows ImageNet's 1000 classes, the model has {classes}; use {SMALL}")
    probabilities, digest = open_resnet(name, path)
    return probabilities, {"name": name, "sha256": digest}
