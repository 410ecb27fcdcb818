"""The judge of class-conditional samples: learns the embedded scenes, follows its seed, takes any number of images."""

import numpy as np
import pytest

from vqgan_jax.data.scenes import CLASSES, render
from vqgan_jax.evals.classifier import Classifier, _augmented, class_agreement, train_classifier


def _scenes(seed: int, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    scenes = [render(seed, index, size, size) for index in range(n)]
    return np.stack([scene["image"] for scene in scenes]), np.array([scene["label"] for scene in scenes])


@pytest.fixture(scope="module")
def small():
    images, labels = _scenes(0, 640, 32)
    return images, labels, train_classifier(images, labels, len(CLASSES), seed=0, steps=80)


def test_learns_scenes_it_has_not_seen(small):
    *_, classifier = small
    images, labels = _scenes(1, 200, 32)
    assert classifier.accuracy(images, labels) >= 0.9


def test_agreement_is_the_share_that_shows_what_was_asked(small):
    images, labels, classifier = small
    asked = classifier.predict(images[:10])
    assert class_agreement(classifier, images[:10], asked) == 1
    asked[:3] = (asked[:3] + 1) % len(CLASSES)
    assert class_agreement(classifier, images[:10], asked) == pytest.approx(0.7)


def test_prediction_does_not_depend_on_the_batch(small):
    images, _, classifier = small
    together = classifier.predict(images[:70])
    assert together.shape == (70,) and np.issubdtype(together.dtype, np.integer)
    np.testing.assert_array_equal(
        np.concatenate([classifier.predict(images[:3]), classifier.predict(images[3:70])]), together
    )
    assert classifier.predict(images[:0]).shape == (0,)


def test_takes_small_images_and_follows_its_seed():
    images = np.random.default_rng(0).integers(256, size=(130, 16, 17, 3)).astype(np.uint8)
    labels = (images.mean((1, 2))[:, 0] > images.mean((1, 2))[:, 1]).astype(int)
    first, again, other = (train_classifier(images, labels, 2, seed=seed, steps=2) for seed in (0, 0, 1))
    kernels = [classifier.params["params"]["Conv_0"]["kernel"] for classifier in (first, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert set(first.predict(images)) <= {0, 1}


def test_a_saved_classifier_has_the_same_features(small, tmp_path):
    images, _, classifier = small
    classifier.save(tmp_path / "one.npz", accuracy=0.5)
    loaded, facts = Classifier.load(tmp_path / "one.npz", len(CLASSES), (16, 32, 64))
    assert facts == {"accuracy": 0.5}
    np.testing.assert_array_equal(loaded.probabilities(images[:9]), classifier.probabilities(images[:9]))
    net, again = (one.feature_net("small", 32) for one in (classifier, loaded))
    assert net.sha256 == again.sha256 and net.dims() == {"logits": len(CLASSES), "pool": 64, "spatial": 16}
    other = train_classifier(images[:64], small[1][:64], len(CLASSES), seed=1, steps=1)
    assert other.feature_net("other", 32).sha256 != net.sha256


def test_augmented_images_are_mirrored_and_shifted_each_by_itself():
    images = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, None, :, None], (64, 16, 16, 3))
    found = _augmented(images, np.random.default_rng(0))
    assert found.shape == images.shape and found.dtype == np.uint8
    steps = np.diff(found[:, 8, 4:-4, 0].astype(int), axis=1)  # away from the border, which is repeated
    assert {tuple(set(row)) for row in steps} == {(1,), (-1,)}
    rising = found[steps[:, 0] == 1, 8, 8, 0].astype(int)
    assert set(rising) == set(range(4, 13))  # shifts of -4 to 4 pixels


def test_refuses_labels_that_do_not_fit():
    images = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="4 images and 3 labels"):
        train_classifier(images, np.zeros(3, int), 2, seed=0, steps=1)
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        train_classifier(images, np.array([0, 1, 2, 0]), 2, seed=0, steps=1)


@pytest.mark.slow
def test_tells_the_scenes_of_the_demonstration_apart():
    images, labels = _scenes(0, 4096, 64)
    classifier = train_classifier(images, labels, len(CLASSES), seed=0, steps=200)
    assert classifier.accuracy(*_scenes(1, 512, 64)) >= 0.97
