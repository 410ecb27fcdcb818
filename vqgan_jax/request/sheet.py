"""The sheet of a job: conditions beside what their tokens say, what is given, samples, and originals, with captions."""

from collections.abc import Callable

import jax
import numpy as np

from vqgan_jax import drawing, images
from vqgan_jax.conditioning import Condition
from vqgan_jax.request.request import Request
from vqgan_jax.sampling.job import SampleFolder
from vqgan_jax.trained_transformer import TrainedTransformer

ROWS, COLUMNS = 16, 8
PIXELS = 1 << 27  # in all
_SIDE = 96  # a picture is enlarged until its short side has so many pixels
_GAP = 2
_LOSSLESS = ("label", "coords")  # their tokens say what the condition does


def draw_sheet(folder: SampleFolder, request: Request, trained: TrainedTransformer) -> np.ndarray:
    """The first pictures of a job, uint8 [., ., 3]: a row a condition; a row a class where there is no more to show,
    and a plain grid where there is no condition.

    Args:
      folder: holds the pictures.
      request: what was asked for.
      trained: the model.
    """
    shown = [(part, source) for part, source in request.parts if part.keys != ("coords",)]
    if request.completion is None and not shown:
        return _plain(folder, request.number)
    if request.completion is None and all(part.keys == ("label",) for part, _ in shown):
        return _by_class(folder, request) if request.names["label"] else _plain(folder, request.number)
    first = next(folder.read([0]))
    cells = min(COLUMNS, request.number) + 2 * len(shown) + 2
    rows: dict[int, list[int]] = {}
    for index in range(request.number):
        rows.setdefault(request.row_of(index), []).append(index)
    most = max(1, min(ROWS, PIXELS // (cells * drawing.enlarged(first, _SIDE).size)))
    invert = _inverter(trained, request)
    drawn = [
        _row(j, [*folder.read(indices[:COLUMNS])], indices, request, [part for part, _ in shown], invert)
        for j, indices in list(rows.items())[:most]
    ]
    return _stacked(drawn, axis=0)


def _plain(folder: SampleFolder, number: int) -> np.ndarray:
    most = max(1, PIXELS // next(folder.read([0])).size)
    pictures = np.stack(list(folder.read(range(min(number, COLUMNS**2, most)))))
    wide = pictures.shape[2] > 2 * pictures.shape[1]
    return images.grid(pictures, columns=1 if wide else None)


def _by_class(folder: SampleFolder, request: Request) -> np.ndarray:
    labels = request.rows(np.arange(request.number))["label"]
    rows = {}
    for label in np.unique(labels)[:ROWS]:
        chosen = np.flatnonzero(labels == label)[:COLUMNS]
        rows[request.names["label"][label]] = np.stack(list(folder.read(chosen)))
    return images.labelled_rows(rows)


def _inverter(trained: TrainedTransformer, request: Request) -> Callable[[dict], dict[str, np.ndarray]]:
    """Returns what one row's tokens say, from and as a batch of one; beyond the trained size, where encoding may take
    more memory than there is, nothing."""
    condition, model = trained.model.condition, trained.model
    trained_size = tuple(model.first_stage.factor * n for n in model.config.grid)
    if request.size != trained_size or all(part.keys[0] in _LOSSLESS for part, _ in request.parts):
        return lambda batch: {}
    program = jax.jit(lambda frozen, batch: condition.invert(frozen, condition.tokens(frozen, batch)))
    return lambda batch: jax.tree.map(np.asarray, program(trained.frozen, batch))


def _row(
    j: int,
    samples: list[np.ndarray],
    indices: list[int],
    request: Request,
    parts: list[Condition],
    invert: Callable[[dict], dict[str, np.ndarray]],
) -> np.ndarray:
    """The cells of row `j` side by side."""
    row, size = request.row(j), samples[0].shape[:2]
    times = -(-_SIDE // min(size))

    def cut(picture: np.ndarray) -> np.ndarray:
        """Of the whole grid, as the samples are cut."""
        return images.centre_crop(picture, *size).repeat(times, axis=0).repeat(times, axis=1)

    batch = {key: value[None] for key, value in row.items()}
    said = invert(batch)
    cells = []
    for part in parts:
        for rows, caption in ((batch, part.keys[0]), (said, "as tokens")):
            if part.keys[0] in rows and not (rows is said and part.keys[0] in _LOSSLESS):
                large = part.draw(rows, (request.size[0] * times, request.size[1] * times), request.names)[0]
                cells.append((images.centre_crop(large, size[0] * times, size[1] * times), caption))
    if request.completion:
        cells.append((cut(request.completion.masked(j % len(request.completion))), "given"))
    cells += [(cut(sample), str(index)) for sample, index in zip(samples, indices, strict=False)]
    if "image" in row:
        cells.append((cut(images.to_uint8(row["image"])), "original"))
    return _stacked([drawing.captioned(picture, caption) for picture, caption in cells], axis=1)


def _stacked(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures below each other (axis 0) or side by side (1), filled up with white."""
    other = max(picture.shape[1 - axis] for picture in pictures)
    padded = []
    for picture in pictures:
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis], pad[1 - axis] = (0, _GAP), (0, other - picture.shape[1 - axis])
        padded.append(np.pad(picture, pad, constant_values=255))
    return np.concatenate(padded, axis=axis)
