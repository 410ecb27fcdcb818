"""One sheet of many tasks: under each title and figure a row of what was asked for, samples and originals."""

from collections.abc import Iterable

import numpy as np

from vqgan_jax import drawing
from vqgan_jax.tools.task_scores import Shown

CELLS, SIDE = 12, 64  # a row: so many cells of so many pixels
_GAP, _BETWEEN = 2, 6  # pixels between cells, and between groups of them


def draw_sheet(tasks: Iterable[Shown]) -> np.ndarray:
    """The tasks below each other: uint8 [., ., 3]."""
    rows = [_row(task) for task in tasks]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([_filled(row, row.shape[0] + _BETWEEN, width) for row in rows])


def _row(task: Shown) -> np.ndarray:
    """As many groups of a task as fit, under its title."""
    width = CELLS * (SIDE + _GAP)
    groups = [_beside(group, _GAP) for group in task.groups]
    while sum(group.shape[1] + _BETWEEN for group in groups) - _BETWEEN > width and len(groups) > 1:
        groups.pop()
    pictures = _beside(groups, _BETWEEN)
    return np.concatenate([drawing.captioned(pictures[:0], f"{task.title}: {task.caption}"), pictures])


def _beside(pictures: list[np.ndarray], gap: int) -> np.ndarray:
    height = max(picture.shape[0] for picture in pictures)
    spaced = [_filled(picture, height, picture.shape[1] + gap) for picture in pictures]
    return np.concatenate(spaced, axis=1)[:, :-gap]


def _filled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    pad = [(0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)]
    return np.pad(picture, pad, constant_values=255)
