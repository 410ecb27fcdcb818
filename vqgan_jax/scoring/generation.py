"""How good and how diverse a transformer's samples are: drawn on all devices and hosts and scored at once."""

import functools
import gc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.data.source import readable
from vqgan_jax.evals.conditional import CHECKS
from vqgan_jax.evals.features import Images
from vqgan_jax.evals.progress import watched
from vqgan_jax.evals.references import KEEP, Statistics, collect, compare
from vqgan_jax.evals.rejection import accepted, labels_to_draw
from vqgan_jax.sampling.strategies import Strategy
from vqgan_jax.scoring import judges as judging
from vqgan_jax.scoring import result, sweeps
from vqgan_jax.scoring.bench import Bench
from vqgan_jax.train import setup
from vqgan_jax.trained_transformer import TrainedTransformer

_COUNTS = ("samples", "reference_samples", "samples_compared", "reference_compared", "kid_subset_size")
_NOTES = {
    "rank_deficient": "too few images for a covariance of full rank: this FID compares with nothing of another count",
    "reference_unverified": "the reference does not say how it was made: --preset was taken on trust",
}


def figures(samples: Statistics, reference: Statistics) -> dict[str, Any]:
    """`compare` with counts as integers, and a line of warning for what a reader must know."""
    found: dict[str, Any] = compare(samples, reference)
    for name, note in _NOTES.items():
        if found.pop(name, None):
            found[name] = True
            if jax.process_index() == 0:
                print(f"note: {note}", flush=True)
    return {name: int(value) if name in _COUNTS else value for name, value in found.items()}


class Conditions:
    """What each sample is asked for: classes in turn, or the conditions of held-out examples in turn."""

    def __init__(self, trained: TrainedTransformer, data: setup.Data, count: int):
        """`count` samples in all."""
        self.keys = trained.model.condition.keys
        self._data = data
        classes = max(1, len(data.train.classes)) if "label" in self.keys else 1
        self.labels = np.resize(np.arange(classes, dtype=np.int32), count)
        self._read = functools.lru_cache(maxsize=1024)(self._example)

    def _example(self, index: int) -> Mapping[str, np.ndarray]:
        row = self._data.val_transform(readable(self._data.val, index), np.random.default_rng(0))
        return {key: value for key, value in row.items() if key not in ("image", "codes/image")}

    def rows(self, labels: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Batch arrays for the samples `indices` [n], whose classes are `labels` [n]."""
        if set(self.keys) <= {"label"}:
            return {"label": labels}
        examples = [self._read(int(index) % len(self._data.val)) for index in indices]
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    def asked(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        """What the samples `indices` [n] were asked for."""
        return self.rows(self.labels[indices], indices)

    @functools.cached_property
    def classes(self) -> np.ndarray:
        """The class that each sample is asked for, int32: its example's, where it is asked for more than a class."""
        if set(self.keys) <= {"label"}:
            return self.labels
        examples = min(len(self.labels), len(self._data.val))
        labels = [readable(self._data.val, k)["label"] for k in range(examples)]
        return np.resize(np.array(labels, np.int32), len(self.labels))

    def describe(self) -> str:
        """For the result's definition."""
        if not self.keys:
            return "none"
        return "classes in turn" if set(self.keys) == {"label"} else f"{', '.join(self.keys)} of held-out examples"


class Generation:
    """A transformer on the bench: scores its samples under one setting after another."""

    def __init__(
        self,
        trained: TrainedTransformer,
        data: setup.Data,
        bench: Bench,
        *,
        count: int,
        reference: Statistics | None = None,
        classifier: str = "",
        classifier_weights: str = "",
        judged: bool = True,
        keep: int = KEEP,
    ):
        """Classifiers are read or trained when they are first needed.

        Args:
          trained: the model.
          data: its data set: classes, conditions, and real pictures for the judges.
          bench: devices and networks.
          count: samples of each setting.
          reference: what their features are compared with; None for no feature scores.
          classifier: that rejects, see judges.choose_classifier.
          classifier_weights: its file.
          judged: whether to ask if samples show what was asked for.
          keep: feature vectors for precision, recall and KID; 0 leaves these out.
        """
        self._trained, self._data, self._bench = trained, data, bench
        self.count, self.reference = count, reference
        self._classifier = classifier, classifier_weights
        self.conditions = Conditions(trained, data, count)
        self._judged, self._keep = judged, keep

    @functools.cached_property
    def _small(self) -> tuple[Any, float]:
        """A classifier of the data set's own images, and its accuracy."""
        with jax.set_mesh(self._bench.mesh.local_mesh):
            return judging.small_classifier(self._data, self._bench.seed, judging.CLASSIFIER_STEPS)

    @functools.cached_property
    def _rejector(self) -> tuple[Any, dict[str, str]]:
        """`probabilities`, and what computes them."""
        if set(self.conditions.keys) != {"label"}:
            raise UserError("acceptance: rejection sampling asks a classifier, and this model is not class-conditional")
        classes = self._trained.model.condition.labels
        return judging.choose_classifier(*self._classifier, classes, lambda: self._small[0])

    def _judges(self) -> list[judging.Judge]:
        if not self._judged:
            return []
        keys, found = self.conditions.keys, []
        if "label" in keys:
            found.append(judging.ClassJudge(*self._small, self.conditions.classes))
        return found + judging.condition_judges(keys, self._data, self.conditions.asked, self.count)

    @property
    def has_scores(self) -> bool:
        """Whether there is anything to say of samples."""
        checked = set(self.conditions.keys) & {"label", *CHECKS}
        return self.reference is not None or bool(self._judged and checked)

    def update(self, params: Any) -> None:
        """Scores other parameters of the same model (stacked, as trained) from now on."""
        self._trained = self._trained.with_params(params)

    def release(self) -> None:
        """Frees the parameters on the devices until the next `update`."""
        self._trained = self._trained.with_params(None)
        gc.collect()  # what was placed on the devices lies in a cycle

    def check(self, setting: sweeps.Setting) -> None:
        """Raises UserError for a setting that this model cannot be sampled with, or whose classifier cannot be had."""
        strategy, rate = sweeps.split(setting)
        if not 0 < rate <= 1:
            raise UserError(f"acceptance: {rate:g}: is {sweeps.SETTINGS[sweeps.ACCEPTANCE][2]}")
        if strategy.guided:
            _ = self._trained.model.null_condition
        if rate < 1:
            _ = self._rejector

    def define(self, setting: sweeps.Setting) -> dict[str, Any]:
        """What defines the scores of a setting beside the checkpoint."""
        parts = {"sampler": setting, "conditions": self.conditions.describe(), "samples": self.count}
        if setting.get(sweeps.ACCEPTANCE, 1.0) < 1:
            parts["classifier"] = self._rejector[1]
        if self.reference is not None:
            parts |= result.describe_features(self._bench.extract)
            parts["reference"] = {**self.reference.source, "images": self.reference.count}
        return parts

    def draw(self, setting: sweeps.Setting) -> Images:
        """This host's samples under a setting, and their indices; sample i depends on seed, setting and i alone.

        With rejection a host draws whole classes, so that none has to be compared between hosts.
        """
        strategy, rate = sweeps.split(setting)
        host, hosts, labels = jax.process_index(), jax.process_count(), self.conditions.labels
        if rate == 1:
            yield from self._drawn(np.arange(len(labels))[host::hosts], labels, strategy)
            return
        asked = labels_to_draw(labels, rate)
        mine = np.flatnonzero(asked % hosts == host)
        yield from accepted(self._drawn(mine, asked, strategy), self._rejector[0], asked, labels)

    def _drawn(self, indices: np.ndarray, labels: np.ndarray, strategy: Strategy) -> Images:
        """The samples `indices` [n], of the classes `labels[indices]`, on this host's devices."""
        batches = self._trained.samples(
            lambda chosen: self.conditions.rows(labels[chosen], chosen),
            self._trained.model.config.grid,
            seed=self._bench.seed,
            batch=max(1, min(self._bench.batch // jax.process_count(), len(indices))),
            strategy=strategy,
            indices=indices,
        )
        start = 0
        for pictures in batches:
            yield pictures, indices[start : start + len(pictures)]
            start += len(pictures)

    def score(self, setting: sweeps.Setting, keep: int = 0) -> tuple[dict[str, Any], np.ndarray]:
        """Draws and scores `count` samples.

        Args:
          setting: of the sampler, see sweeps.SETTINGS.
          keep: how many samples to return.

        Returns:
          the figures: those of `compare`, class_agreement, classifier_accuracy and class_samples for classes,
          KEY_MEASURE and KEY_MEASURE_real for conditions that can be derived again, samples; and the first `keep`
          samples uint8 [keep, h, w, 3], on every host.
        """
        with jax.set_mesh(self._bench.mesh.local_mesh):  # nothing but sums crosses hosts
            return self._score(setting, keep)

    def _score(self, setting: sweeps.Setting, keep: int) -> tuple[dict[str, Any], np.ndarray]:
        judges, kept = self._judges(), judging.Kept(keep)
        drawn = judging.shown_to([*judges, kept], self.draw(setting))
        found: dict[str, Any] = {}
        if self.reference is None:
            for _ in watched(drawn, self.count, "samples"):
                pass
        else:
            source = {"samples": self.define(setting)}
            extract = self._bench.extract
            samples = collect(drawn, extract, count=self.count, source=source, keep=self._keep, what="samples")
            found = figures(samples, self.reference)
        for judge in judges:
            found |= judge.result()
        return found, kept.pictures() if keep else np.zeros((0, 0, 0, 3), np.uint8)
