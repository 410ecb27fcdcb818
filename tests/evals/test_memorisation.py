"""Nearest neighbours equal brute force in any order of arrival; copies are found, and held-out images are none."""

import numpy as np
import pytest

from vqgan_jax.evals import memorisation
from vqgan_jax.evals.memorisation import Nearest, closer_share, copy_share, nearest_by


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_nearest_equals_brute_force(pieces):
    rng = np.random.default_rng(0)
    queries, stream = rng.normal(size=(7, 5)), rng.normal(size=(40, 5))
    nearest = Nearest(queries, neighbours=4)
    for part in np.array_split(rng.permutation(40), pieces):
        nearest.add(stream[part].astype(np.float32), part)
    distances, indices = nearest.result()
    everything = np.linalg.norm(queries[:, None] - stream[None], axis=-1)
    np.testing.assert_array_equal(indices, np.argsort(everything, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(everything, axis=1)[:, :4], rtol=1e-5)


def test_equal_neighbours_come_by_index_whatever_came_first():
    for order in ([0, 1, 2], [2, 1, 0]):
        nearest = Nearest(np.zeros((1, 2)), neighbours=2)
        for index in order:
            nearest.add(np.ones((1, 2)), np.array([index]))
        assert nearest.result()[1].tolist() == [[0, 1]]


def test_blocks_do_not_matter(monkeypatch):
    rng = np.random.default_rng(1)
    queries, stream = rng.normal(size=(3, 4)), rng.normal(size=(10, 4))
    whole = Nearest(queries)
    whole.add(stream, np.arange(10))
    monkeypatch.setattr(memorisation, "_BLOCK", 3)
    parts = Nearest(queries)
    parts.add(stream, np.arange(10))
    np.testing.assert_array_equal(parts.result()[1], whole.result()[1])


def test_fewer_training_images_than_neighbours():
    nearest = Nearest(np.zeros((2, 3)), neighbours=5)
    nearest.add(np.ones((2, 3)), np.arange(2))
    distances, indices = nearest.result()
    assert indices[0].tolist() == [0, 1, -1, -1, -1] and np.isinf(distances[0, 2:]).all()


def test_shares():
    held_out = np.arange(1.0, 101.0)
    assert closer_share(np.zeros(5), held_out) == 1.0  # copies
    assert closer_share(held_out, held_out) == 0.5  # as far as new images are
    assert closer_share(np.full(5, 1000.0), held_out) == 0.0
    assert closer_share(np.array([50.5]), held_out) == 0.5
    assert copy_share(np.array([0.5, 0.5, 50.0, 99.0]), held_out) == 0.5
    assert copy_share(held_out, held_out) == pytest.approx(0.01)


def test_another_distance_chooses_among_the_candidates():
    train = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    distance = lambda a, b: np.abs(a.astype(int) - b).mean((1, 2, 3))  # noqa: E731
    pictures = train[[4, 9]]
    candidates = np.array([[0, 3, 7], [8, -1, -1]])
    distances, chosen = nearest_by(distance, pictures, candidates, lambda index: train[index])
    assert chosen.tolist() == [3, 8] and distances.tolist() == [1.0, 1.0]


def test_the_sheet_pairs_samples_with_their_nearest():
    samples, nearest = np.full((3, 4, 4, 3), 10, np.uint8), np.full((3, 4, 4, 3), 200, np.uint8)
    sheet = memorisation.sheet(samples, nearest, pairs=2)
    assert sheet[0, 0, 0] == 10 and sheet[0, 6, 0] == 200 and sheet[0, 12, 0] == 10
