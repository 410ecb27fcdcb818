"""Code statistics: entropies and the frequency table on distributions whose answer is known, NLL on padded batches."""

import tracemalloc

import jax
import numpy as np
import pytest

from vqgan_jax.evals.codes import NLLMetrics, histogram_entropy, table_nll


def _tokens(n: int, t: int = 5, v: int = 11) -> dict:
    rng = np.random.default_rng(0)
    targets = rng.integers(v, size=(n, t)).astype(np.int32)
    logits = rng.normal(size=(n, t, v)).astype(np.float32) + 2 * np.eye(v, dtype=np.float32)[targets]
    return {"logits": logits, "targets": targets, "valid": np.ones(n, bool)}


@jax.jit
def _score(batch):
    return NLLMetrics.single_from_model_output(**batch)


def test_nll_metrics_on_padded_batches_equal_the_definition():
    whole = _tokens(10)
    scores = NLLMetrics.empty()
    for start in range(0, 10, 4):
        rows = {k: v[start : start + 4] for k, v in whole.items()}
        padding = 4 - len(rows["valid"])
        scores = scores.merge(_score({k: np.pad(v, [(0, padding)] + [(0, 0)] * (v.ndim - 1)) for k, v in rows.items()}))
    scores = scores.compute()

    logits, targets = whole["logits"].astype(np.float64), whole["targets"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    expected = {
        "nll": nll.mean(),
        "nll_stderr": nll.mean(1).std(ddof=1) / np.sqrt(10),
        "bits": nll.mean() / np.log(2),
        "accuracy": (logits.argmax(-1) == targets).mean(),
        "tokens": 50,
    }
    assert 0 < expected["accuracy"] < 1
    assert scores == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in scores.values())


def test_histogram_entropy_of_known_distributions():
    assert histogram_entropy(np.arange(12).reshape(3, 4), 12) == pytest.approx(np.log(12))
    assert histogram_entropy(np.arange(12).reshape(3, 4), 100) == pytest.approx(np.log(12))
    assert histogram_entropy(np.full((3, 4), 5), 6) == 0
    assert histogram_entropy(np.array([[0, 0, 0, 1]]), 2) == pytest.approx(0.25 * np.log(4) + 0.75 * np.log(4 / 3))
    with pytest.raises(ValueError, match=r"\[0, 12\)"):
        histogram_entropy(np.array([[12]]), 12)


def test_table_counts_by_class_and_position():
    train = np.array([[0, 1], [0, 2], [1, 2], [2, 2]])
    labels = np.array([0, 0, 1, 1])
    val, val_labels = np.array([[0, 0], [1, 2]]), np.array([0, 1])
    s = 0.5  # counts: [0 | 0] = 2, [1 | 0] = 0 of 2; [0 | 1] = 1, [1 | 1] = 2 of 2
    expected = -np.log((np.array([2, 0, 1, 2]) + s) / (2 + 3 * s)).mean()
    assert table_nll(train, labels, val, val_labels, 3, smoothing=[s]) == pytest.approx(expected)
    pooled = -np.log((np.array([2, 0, 1, 3]) + s) / (4 + 3 * s)).mean()
    assert table_nll(train, None, val, None, 3, smoothing=[s]) == pytest.approx(pooled)


def test_the_table_of_many_classes_and_codes_takes_little_memory():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(16384, size=(50, 256)), np.arange(50) * 20 + 19
    tracemalloc.start()
    table_nll(codes, labels, codes[:5], labels[:5], 16384, smoothing=[1.0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * codes.nbytes  # a whole table has 300,000 times as many cells


def test_table_pays_the_entropy_it_should():
    rng = np.random.default_rng(0)
    labels, val_labels = rng.integers(4, size=4000), rng.integers(4, size=500)

    def draw(labels):  # position 0 tells the class, position 1 is one of two codes of the class, position 2 is noise
        coin = rng.integers(2, size=len(labels))
        return np.stack([labels, 2 * labels + coin, rng.integers(8, size=len(labels))], 1)

    train, val = draw(labels), draw(val_labels)
    by_class = table_nll(train, labels, val, val_labels, 8)
    by_position = table_nll(train, None, val, None, 8)
    assert by_class == pytest.approx((0 + np.log(2) + np.log(8)) / 3, abs=0.01)
    assert by_position == pytest.approx((np.log(4) + 2 * np.log(8)) / 3, abs=0.01)


def test_smoothing_is_chosen_well_and_on_training_codes_alone():
    rng = np.random.default_rng(0)
    train, val = rng.choice(64, size=(2, 60, 9), p=rng.dirichlet(np.full(64, 0.5)))
    candidates = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    fixed = [table_nll(train, None, val, None, 64, smoothing=[s]) for s in candidates]
    chosen = table_nll(train, None, val, None, 64, smoothing=candidates)
    assert chosen == pytest.approx(min(fixed), abs=0.05) and max(fixed) > min(fixed) + 0.5
    # Each validation image alone would like another constant; a constant that they have no say in gives plain means.
    alone = [table_nll(train, None, row[None], None, 64, smoothing=candidates) for row in val]
    assert np.mean(alone) == pytest.approx(chosen)


def test_codes_never_seen_in_training_cost_a_finite_price():
    nll = table_nll(np.zeros((10, 2), int), np.zeros(10, int), np.full((1, 2), 3), np.array([5]), 4)
    assert nll == pytest.approx(np.log(4))  # a class never seen: uniform


def test_table_refuses_what_it_would_miscount():
    codes, labels = np.zeros((4, 2), int), np.zeros(4, int)
    with pytest.raises(ValueError, match="both or neither"):
        table_nll(codes, labels, codes, None, 4)
    with pytest.raises(ValueError, match="val_codes"):
        table_nll(codes, labels, codes + 4, labels, 4)
    with pytest.raises(ValueError, match="train_codes"):
        table_nll(codes - 1, labels, codes, labels, 4)
    with pytest.raises(ValueError, match="two images"):
        table_nll(codes[:1], None, codes, None, 4)
