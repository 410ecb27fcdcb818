"""How well the samples of each task follow what was asked for: a figure, the same for shuffled conditions, and for real
pictures; and the cells of its row on the sheet."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vqgan_jax import drawing, pretrained, storage
from vqgan_jax.evals.conditional import PositionReader, filled_colour
from vqgan_jax.images import to_uint8
from vqgan_jax.request.flags import Asked
from vqgan_jax.request.request import Request
from vqgan_jax.scoring import judges
from vqgan_jax.scoring.workdir import recorded_config
from vqgan_jax.tools.tables import figure as known_figure
from vqgan_jax.tools.tables import number
from vqgan_jax.train import setup
from vqgan_jax.train.metric_writer import JSON_LINES
from vqgan_jax.trained_transformer import TrainedTransformer

READ = 4096  # real pictures that a check learns from
_CROPS = 3  # windows along a side, from which positions are read


class Figure(NamedTuple):
    """What is said about a task's samples: the figure's name and what it means."""

    name: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Shown:
    """A task on the sheet.

    Attributes:
      title: of the task.
      figure: what is said.
      figures: by name; NAME_shuffled and NAME_real where they are known.
      groups: pictures uint8 that belong together: what was asked for, its samples, the original.
    """

    title: str
    figure: Figure
    figures: Mapping[str, float]
    groups: list[list[np.ndarray]]

    @property
    def texts(self) -> tuple[str, str, str]:
        """The figure of the samples, of shuffled conditions and of real pictures, to read; "" where there is none."""
        unit = "%" if self.figure.name == "height_error" else known_figure(self.figure.name).unit
        found = (self.figures.get(f"{self.figure.name}{end}") for end in ("", "_shuffled", "_real"))
        return tuple("" if x is None else number(x, unit) for x in found)

    @property
    def caption(self) -> str:
        """One line."""
        mine, shuffled, real = self.texts
        beside = ", ".join([f"shuffled {shuffled}"] * bool(shuffled) + [f"real {real}"] * bool(real))
        return f"{mine} {self.figure.meaning}" + (f" ({beside})" if beside else "")


class Scored:
    """The samples of one task, and what they were asked for."""

    def __init__(
        self, workdir: Path, folder: Path, trained: TrainedTransformer, config: ConfigDict, request: Request, each: int
    ):
        """`workdir` of the transformer, `folder` of the samples, of which so many are of each condition."""
        self._workdir, self._trained, self._config, self._request = workdir, trained, config, request
        self._each = each
        with np.load(folder / "samples.npz") as file:
            self.samples = file["arr_0"]
        keys = ("image", *trained.model.condition.keys)
        factor, labels = trained.model.first_stage.factor, trained.model.condition.labels
        self._data = setup.open_data(config, keys, factor=factor, classes=labels)

    def shown(self, title: str, figure: Figure, enlarged: int) -> Shown:
        """The task's row."""
        return Shown(title, figure, self.figures(), self.groups(enlarged))

    def figures(self) -> dict[str, float]:
        """All that is known of the samples, NAME_shuffled and NAME_real beside it; and the NLL of held-out codes."""
        found = {"val/nll": self._nll()}
        count, keys = len(self.samples), self._trained.model.condition.keys
        everyone = np.arange(count)
        found_by: list[judges.Judge] = []
        if self._request.completion:
            return found | self._completed()
        if keys == ("coords",):
            return found | self._placed()
        if "label" in keys:
            labels = self._request.rows(everyone)["label"]
            found_by.append(judges.ClassJudge(*judges.small_classifier(self._data, 0, judges.CLASSIFIER_STEPS), labels))
        found_by += judges.condition_judges(keys, self._data, self._request.rows, count)
        for judge in found_by:
            judge.add(self.samples, everyone)
            found |= judge.result()
        if "classifier_accuracy" in found:
            found["class_agreement_real"] = found.pop("classifier_accuracy")
        return found

    def groups(self, enlarged: int) -> list[list[np.ndarray]]:
        """What was asked for, its samples and the original, for one condition after another; so many times as large."""
        request, condition = self._request, self._trained.model.condition
        names = {key: [name.replace("_", " ") for name in names] for key, names in request.names.items()}
        height, width = (enlarged * n for n in self.samples.shape[1:3])
        found = []
        for first in range(0, len(self.samples), self._each):
            row, asked = request.row(request.row_of(first)), []
            if condition.keys:
                batch = {key: row[key][None] for key in condition.keys}
                asked = [condition.draw(batch, (height, width), names)[0]]
            if request.completion:
                asked.append(request.completion.masked(request.row_of(first)))
            original = [to_uint8(row["image"])] if "image" in row and enlarged == 1 else []  # or it would not fit
            cells = [*asked, *self.samples[first : first + self._each], *original]
            found.append([drawing.resized(cell, height, width) for cell in cells])
        return found

    def _nll(self) -> float:
        rows = [json.loads(line) for line in storage.path(self._workdir / JSON_LINES).read_text().splitlines()]
        return min(row["val/nll"] for row in rows if "val/nll" in row)

    def _completed(self) -> dict[str, float]:
        """How far the colour of what was filled in is off, against the originals' and those of others."""
        request, count = self._request, len(self.samples)
        rows = request.rows(np.arange(count))
        given = rows["given"].repeat(self._factor, axis=1).repeat(self._factor, axis=2)
        originals, other = to_uint8(rows["image"]), judges.shuffled(count)
        first = self._trained.model.first_stage
        again = jax.jit(lambda variables, x: first.decode(variables, first.encode(variables, x)))
        real = to_uint8(again(self._trained.frozen["first_stage"], rows["image"]))
        return {
            "filled_colour": float(filled_colour(self.samples, originals, given).mean()),
            "filled_colour_shuffled": float(filled_colour(self.samples, originals[other], given).mean()),
            "filled_colour_real": float(filled_colour(real, originals, given).mean()),
        }

    @property
    def _factor(self) -> int:
        return self._trained.model.first_stage.factor

    def _placed(self) -> dict[str, float]:
        """How far windows of the samples are off in height, where a reader of crops of real pictures sees them."""
        crop = self._config.data.image_size
        transform = dataclasses.replace(self._data.train_transform, keys=("image", "coords"))
        rng = np.random.default_rng(0)
        rows = [transform(self._data.train[k % len(self._data.train)], rng) for k in range(READ)]
        centres = np.stack([row["coords"].mean((0, 1)) for row in rows])
        reader = PositionReader(to_uint8(np.stack([row["image"] for row in rows])), centres)

        def errors(pictures: np.ndarray) -> tuple[float, float]:
            size = pictures.shape[1]
            corners = np.linspace(0, size - crop, _CROPS).astype(int)
            places = [(y, x) for y in corners for x in corners]
            cut = np.stack([p[y : y + crop, x : x + crop] for p in pictures for y, x in places])
            read = reader(cut)[:, 0]
            heights = np.array([(y + crop / 2) / size for _ in pictures for y, _ in places])
            other = heights[judges.shuffled(len(heights))]
            return float(np.abs(read - heights).mean()), float(np.abs(read - other).mean())

        real = np.stack([self._data.val[k]["image"] for k in range(min(len(self.samples), len(self._data.val)))])
        right, wrong = errors(self.samples)
        return {"height_error": right, "height_error_shuffled": wrong, "height_error_real": errors(real)[0]}


def open_task(workdir: Path, folder: Path, asked: Mapping[str, Any], size: int) -> Scored:
    """Opens the samples of a task.

    Args:
      workdir: of its transformer.
      folder: of its samples.
      asked: fields of `request.flags.Asked`, as `sample.py` was called.
      size: height and width of a sample in pixels.
    """
    trained = pretrained.open_transformer(workdir, key="--workdir")
    side = size // trained.model.first_stage.factor
    request = Request(Asked(**asked), trained, (side, side))
    return Scored(workdir, folder, trained, recorded_config(storage.path(workdir)), request, asked["each"])
