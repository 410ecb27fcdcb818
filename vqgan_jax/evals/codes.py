"""Statistics of discrete codes: histograms and their entropy, the likelihood of tokens, and the frequency table that a
transformer has to beat. Metrics are clu collections whose merged sums make padded, partial batches exact."""

import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from vqgan_jax import losses
from vqgan_jax.config import UserError
from vqgan_jax.parallel import to_host


@flax.struct.dataclass
class PerImage(metrics.Metric):
    """One number an image, kept apart so that percentiles and standard errors are exact.

    Create it inside jit and merge outside: merging only lists the arrays, which stay sharded, and nothing is waited for
    before `compute`, where every host gets the whole of them.
    """

    values: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]

    @classmethod
    def empty(cls) -> "PerImage":
        return cls(values=(), masks=())

    @classmethod
    def from_model_output(cls, values: jax.Array, mask: jax.Array, **_) -> "PerImage":
        return cls(values=(values,), masks=(mask,))

    def merge(self, other: "PerImage") -> "PerImage":
        return type(self)(values=self.values + other.values, masks=self.masks + other.masks)

    def compute(self) -> np.ndarray:
        """The values of the real images, float64 [n]. Raises UserError where there was none."""
        values, masks = (list(map(to_host, arrays)) for arrays in (self.values, self.masks))
        kept = [np.asarray(value, np.float64)[mask] for value, mask in zip(values, masks, strict=True)]
        if not sum(map(len, kept)):
            raise UserError("no image was scored: the data set is empty or every row is padding")
        return np.concatenate(kept)


@flax.struct.dataclass
class CodeCounts(metrics.Metric):
    """How often each code of a codebook was used by the real images: int32 [q]."""

    counts: jax.Array

    @classmethod
    def empty(cls) -> "CodeCounts":
        return cls(counts=jnp.zeros((), jnp.int32))  # broadcasts: the codebook's size is not known yet

    @classmethod
    def from_model_output(cls, codes: jax.Array, codebook_size: int, mask: jax.Array, **_) -> "CodeCounts":
        weights = jnp.broadcast_to(mask.reshape(-1, *[1] * (codes.ndim - 1)), codes.shape).astype(jnp.int32)
        return cls(counts=jnp.zeros(codebook_size, jnp.int32).at[codes].add(weights))

    def merge(self, other: "CodeCounts") -> "CodeCounts":
        return type(self)(counts=self.counts + other.counts)

    def compute(self) -> np.ndarray:
        """The counts, int64 [q]."""
        return to_host(self.counts).astype(np.int64)


def mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    """`name`: the mean of values [n] over images; `name`_stderr: its standard error (NaN for a single image)."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": float(error)}


@flax.struct.dataclass
class NLLMetrics(metrics.Collection):
    """How well a transformer predicts the tokens of held-out images, under teacher forcing."""

    nll: PerImage.from_output("nll")  # the sum over an image's tokens, in nats
    correct: PerImage.from_output("correct")
    tokens: PerImage.from_output("tokens")

    @classmethod
    def single_from_model_output(cls, *, logits: jax.Array, targets: jax.Array, valid: jax.Array) -> "NLLMetrics":
        """Scores one batch.

        Args:
          logits: [b, t, v], or of tokens in groups [b, t, g, v].
          targets: int32 [b, t] or [b, t, g], the tokens that the logits predict.
          valid: bool [b], False at padding.
        """
        return super().single_from_model_output(
            nll=losses.token_nll(logits, targets).sum(axis=-1),
            correct=losses.over_groups(logits.argmax(axis=-1) == targets, jnp.all).sum(axis=-1),
            tokens=jnp.full(targets.shape[:1], targets.shape[1], jnp.int32),
            mask=valid,
        )

    def compute(self) -> dict[str, float]:
        """nll (nats a token), nll_stderr (over images), bits (a token), accuracy in [0, 1], tokens (how many)."""
        sums = super().compute()
        tokens = sums["tokens"].sum()
        nll = sums["nll"].sum() / tokens
        return {
            "nll": float(nll),
            "nll_stderr": mean_and_error("nll", sums["nll"] / sums["tokens"])["nll_stderr"],
            "bits": float(nll / math.log(2)),
            "accuracy": float(sums["correct"].sum() / tokens),
            "tokens": float(tokens),
        }


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution in proportion to counts [q] (not all zero); codes never used add nothing."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def histogram_entropy(codes: np.ndarray, vocab: int) -> float:
    """Entropy in nats of the marginal distribution of int codes [n, t] in [0, vocab): what a model that knows how often
    each code occurs, and nothing more, pays for a token."""
    _check_range("codes", codes, vocab)
    return entropy(np.bincount(codes.ravel(), minlength=vocab))


def table_nll(
    train_codes: np.ndarray,
    train_labels: np.ndarray | None,
    val_codes: np.ndarray,
    val_labels: np.ndarray | None,
    vocab: int,
    smoothing: Sequence[float] = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
) -> float:
    """What the best table of code frequencies by class and position pays for a held-out token.

    The table's probability of a code is (its count + s) / (all counts + s * vocab) in its class and position. The
    constant s is the candidate with the lowest NLL on a tenth of the training images that the table was not fitted on;
    then the table is fitted on all of them. A transformer that scores no better has learnt no structure.

    Args:
      train_codes: int [n, t] in [0, vocab).
      train_labels: int [n], or None for a table by position alone.
      val_codes: int [m, t].
      val_labels: int [m], or None as for training.
      vocab: how many codes there are.
      smoothing: the candidates for s, all positive.

    Returns:
      Nats a token, the mean over all of val_codes.

    Raises:
      ValueError: labels on one side alone, fewer than two training images, or codes out of range.
    """
    if (train_labels is None) != (val_labels is None):
        raise ValueError("train_labels and val_labels: give both or neither")
    if len(train_codes) < 2:
        raise ValueError("train_codes: a table needs at least two images")
    _check_range("train_codes", train_codes, vocab)
    _check_range("val_codes", val_codes, vocab)
    if train_labels is None:
        train_labels, val_labels = np.zeros(len(train_codes), np.int64), np.zeros(len(val_codes), np.int64)
    # A random tenth: one taken in regular strides would miss classes in data that are ordered by class.
    order = np.random.default_rng(0).permutation(len(train_codes))
    held_out, kept = np.split(order, [max(1, len(order) // 10)])
    counts, totals = _look_up(
        train_codes[kept], train_labels[kept], train_codes[held_out], train_labels[held_out], vocab
    )
    best = min(smoothing, key=lambda s: _smoothed_nll(counts, totals, s, vocab))
    counts, totals = _look_up(train_codes, train_labels, val_codes, val_labels, vocab)
    return _smoothed_nll(counts, totals, best, vocab)


def _look_up(
    codes: np.ndarray, labels: np.ndarray, new_codes: np.ndarray, new_labels: np.ndarray, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each new code [m, t]: its count in `codes` by class and position, and the count [m, 1] of its class."""
    length = codes.shape[1]
    classes = int(max(labels.max(), new_labels.max())) + 1

    def cell(labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return (labels.astype(np.int64)[:, None] * length + np.arange(length)) * vocab + codes

    # Only the cells that occur: the whole table of 1000 classes and 16384 codes would take tens of gigabytes.
    known, counts = np.unique(cell(labels, codes), return_counts=True)
    wanted = cell(new_labels, new_codes)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found = np.where(known[at] == wanted, counts[at], 0)
    return found, np.bincount(labels, minlength=classes)[new_labels][:, None]


def _smoothed_nll(counts: np.ndarray, totals: np.ndarray, constant: float, vocab: int) -> float:
    """Mean NLL in nats of codes with these counts, under Laplace smoothing."""
    return float(-np.log((counts + constant) / (totals + constant * vocab)).mean())


def _check_range(name: str, codes: np.ndarray, vocab: int) -> None:
    """Raises ValueError unless there are codes and all lie in [0, vocab)."""
    if not codes.size or codes.min() < 0 or codes.max() >= vocab:
        raise ValueError(f"{name}: expected codes in [0, {vocab})")
