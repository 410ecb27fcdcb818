"""Distances against closed forms, brute force and the golden numbers; running sums against numpy's."""

import numpy as np
import pytest

from tests.reference import golden
from vqgan_jax.config import UserError
from vqgan_jax.evals import distances
from vqgan_jax.evals.moments import Gaussian, Moments


def moments(vectors: np.ndarray, cuts=()) -> Moments:
    found = Moments.empty(vectors.shape[1])
    for part in np.split(vectors, cuts):
        found.add(part)
    return found


def test_running_sums_equal_numpy_however_they_are_cut_and_merged():
    vectors = np.random.default_rng(0).normal(3, 2, (500, 12)).astype(np.float32)
    wanted = vectors.astype(np.float64)
    whole = moments(vectors, (1, 17, 400))
    halves = moments(vectors[300:]).merge(moments(vectors[:300]))
    for found in (whole, halves):
        assert found.count == 500
        np.testing.assert_allclose(found.mean, wanted.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance(), np.cov(wanted, rowvar=False), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.covariance(ddof=0), np.cov(wanted, rowvar=False, ddof=0), rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="needs at least 2"):
        moments(vectors[:1]).gaussian()


def test_frechet_equals_the_fixtures():
    fixture = golden("inception.npz")
    a, b = fixture["frechet/a"], fixture["frechet/b"]
    full = distances.frechet(moments(a).gaussian(), moments(b).gaussian())
    assert full == pytest.approx(float(fixture["frechet/value"]), rel=1e-6)
    few = distances.frechet(moments(a[:40]).gaussian(), moments(b[:50]).gaussian())
    assert few == pytest.approx(float(fixture["frechet_deficient/value"]), rel=1e-6)


def test_frechet_of_gaussians_in_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    va, vb = rng.uniform(0.1, 4, (2, 9))
    ma, mb = rng.normal(size=(2, 9))
    a, b = (Gaussian(m, basis @ np.diag(v) @ basis.T) for m, v in ((ma, va), (mb, vb)))
    wanted = np.square(ma - mb).sum() + np.square(np.sqrt(va) - np.sqrt(vb)).sum()  # covariances that commute
    assert distances.frechet(a, b) == pytest.approx(wanted, rel=1e-12)
    assert distances.frechet(b, a) == pytest.approx(wanted, rel=1e-12)
    # The same covariance turned by 45 degrees in two dimensions: tr sqrt(S_a S_b) = 2 * sqrt(det) * ... by hand
    turned = np.array([[2.5, 1.5], [1.5, 2.5]])  # eigenvalues 4 and 1
    plain = np.diag([4.0, 1.0])
    overlap = np.sqrt(np.trace(plain @ turned) + 2 * np.sqrt(np.linalg.det(plain @ turned)))  # of any 2 x 2 matrix
    found = distances.frechet(Gaussian(np.zeros(2), plain), Gaussian(np.zeros(2), turned))
    assert found == pytest.approx(10 - 2 * overlap, rel=1e-12)


@pytest.mark.parametrize("n", [3, 40, 200])
def test_equal_sets_are_zero_apart_at_any_rank(n):
    x = np.random.default_rng(0).normal(size=(n, 64)) * 10
    assert distances.frechet(moments(x).gaussian(), moments(x[::-1]).gaussian()) < 1e-6


def test_too_few_vectors_are_noticed_with_and_without_their_count():
    x = np.random.default_rng(0).normal(size=(30, 16))
    for n, deficient in ((30, False), (17, False), (16, True), (5, True)):
        gaussian = moments(x[:n]).gaussian()
        assert distances.rank_deficient(gaussian, n) is deficient
        assert distances.rank_deficient(gaussian, None) is deficient


def brute_mmd(x: np.ndarray, y: np.ndarray) -> float:
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    m = len(x)
    same = sum(k(v[i], v[j]) for v in (x, y) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same - 2 * sum(k(a, b) for a in x for b in y) / m**2


def test_kid_equals_brute_force_on_the_subsets_that_torch_fidelity_draws():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(31, 7)).astype(np.float32), rng.normal(0.3, 1, (40, 7)).astype(np.float32)
    draw, values = np.random.RandomState(5), []
    for _ in range(6):
        x = a[draw.choice(31, 11, replace=False)].astype(np.float64)
        values.append(brute_mmd(x, b[draw.choice(40, 11, replace=False)].astype(np.float64)))
    mean, std = distances.kid(a, b, subsets=6, size=11, seed=5)
    assert mean == pytest.approx(np.mean(values), rel=1e-9) and std == pytest.approx(np.std(values), rel=1e-9)
    # Of fewer vectors than a subset asks for, all.
    mean, std = distances.kid(a, b[:20], subsets=3, size=1000)
    assert mean != 0 and std > 0


def test_kid_is_unbiased():
    rng = np.random.default_rng(0)
    values = [distances.kid(*rng.normal(size=(2, 50, 4)), subsets=1, size=50)[0] for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)


def brute_precision(reference: np.ndarray, samples: np.ndarray, k: int) -> float:
    inside = 0
    for s in samples:
        for i, r in enumerate(reference):
            others = sorted(np.linalg.norm(r - other) for j, other in enumerate(reference) if j != i)
            if np.linalg.norm(s - r) <= others[k - 1]:
                inside += 1
                break
    return inside / len(samples)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_precision_and_recall_equal_brute_force_in_blocks_of_any_size(monkeypatch, rows):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(0.8, 0.6, (33, 5)).astype(np.float32)
    monkeypatch.setattr(distances, "_BLOCK_BYTES", rows * 8 * 40)
    precision, recall = distances.precision_recall(real, fake)
    assert precision == pytest.approx(brute_precision(real, fake, 3)) and recall == pytest.approx(
        brute_precision(fake, real, 3)
    )
    assert 0 < recall < precision < 1


def test_a_collapsed_model_is_precise_and_recalls_little():
    rng = np.random.default_rng(0)
    precision, recall = distances.precision_recall(rng.normal(0, 3, (200, 16)), rng.normal(0, 0.1, (200, 16)))
    assert precision > 0.9 and recall < 0.1


def brute_score(logits: np.ndarray, splits: list[np.ndarray]) -> tuple[float, float]:
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    values = [np.exp((p[s] * (np.log(p[s]) - np.log(p[s].mean(0)))).sum(1).mean()) for s in splits]
    return float(np.mean(values)), float(np.std(values))


def test_inception_score_equals_brute_force_in_any_order():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (57, 9)).astype(np.float32)
    splits = np.arange(57) // 20
    wanted = brute_score(logits, [np.flatnonzero(splits == k) for k in range(3)])
    score, order = distances.InceptionScore(splits, 9), rng.permutation(57)
    for rows in np.array_split(order, 5):
        score.add(logits[rows], rows)
    assert score.all_hosts() == pytest.approx(wanted, rel=1e-12)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    logits = np.eye(5, dtype=np.float32)[np.arange(40) % 4] * 50_000  # probabilities of exactly 0 and 1, one never 1
    score = distances.InceptionScore(np.zeros(40, int), 5)
    score.add(logits, np.arange(40))
    assert score.all_hosts() == pytest.approx((4, 0))
