"""Rejection keeps the surest of each class, in any batching, and fills the places that were asked for."""

import numpy as np
import pytest

from vqgan_jax.config import UserError
from vqgan_jax.evals.rejection import accepted, best, labels_to_draw


@pytest.mark.parametrize("rate, drawn", [(1.0, 50), (0.5, 100), (0.25, 200), (0.05, 1000), (0.005, 10000), (0.3, 167)])
def test_enough_is_drawn_of_each_class(rate, drawn):
    labels = np.resize(np.arange(4), 200)
    asked = labels_to_draw(labels, rate)
    assert np.bincount(asked).tolist() == [drawn] * 4 and (np.diff(asked) >= 0).all()


@pytest.mark.parametrize("rate", [0, -1, 1.01])
def test_a_rate_that_is_no_share(rate):
    with pytest.raises(UserError, match="acceptance"):
        labels_to_draw(np.zeros(3, int), rate)


def test_the_first_of_equals_stay():
    assert best(np.array([0.5, 0.9, 0.5, 0.1]), 2).tolist() == [0, 1]


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
def test_the_surest_of_each_class_fill_its_places(batch):
    rng = np.random.default_rng(0)
    labels = np.array([2, 0, 2, 1, 2, 0])
    asked = labels_to_draw(labels, 0.25)
    # A picture's first value names it, and says how sure the classifier is of it.
    sure = rng.permutation(len(asked))
    pictures = np.zeros((len(asked), 2, 2, 3), np.uint8)
    pictures[:, 0, 0, 0] = sure

    def probabilities(x):
        table = np.zeros((len(x), 3))
        table[:] = x[:, 0, 0, 0, None] / 100
        return table

    drawn = ((pictures[i : i + batch], np.arange(i, min(i + batch, len(asked)))) for i in range(0, len(asked), batch))
    found = {}
    for kept, places in accepted(drawn, probabilities, asked, labels):
        assert len(kept) == len(places)
        for picture, place in zip(kept, places, strict=True):
            assert place not in found
            found[int(place)] = int(picture[0, 0, 0])
    assert sorted(found) == list(range(6))
    for label in range(3):
        count = int((labels == label).sum())
        wanted = np.sort(sure[asked == label])[-count:]
        assert sorted(found[place] for place in np.flatnonzero(labels == label)) == wanted.tolist()


def test_classes_that_another_host_draws_are_left_out():
    labels = np.array([0, 1, 0, 1])
    asked = labels_to_draw(labels, 0.5)
    mine = np.flatnonzero(asked == 1)
    drawn = [(np.zeros((len(mine), 2, 2, 3), np.uint8), mine)]
    kept = list(accepted(drawn, lambda x: np.ones((len(x), 2)), asked, labels))
    assert [places.tolist() for _, places in kept] == [[1, 3]]
