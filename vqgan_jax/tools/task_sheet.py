"""One sheet of many tasks: under each title and figure a row of what was asked for, samples and originals."""

from collections.abc import Iterable

import numpy as np

from vqgan_jax import drawing
from vqgan_jax.tools.task_scores import Shown

WIDTH = 816  # pixels: three groups of four pictures
_GAP, _BETWEEN = 2, 8  # pixels between pictures, and between groups of them
_OTHERS = 3  # conditions further from task to task


def draw_sheet(tasks: Iterable[Shown]) -> np.ndarray:
    """The tasks below each other, each with other conditions than the one above: uint8 [., ., 3]."""
    return np.concatenate([_row(task, first=_OTHERS * k) for k, task in enumerate(tasks)])


def _row(task: Shown, first: int) -> np.ndarray:
    """As many groups of a task as fit, from number `first` on, under its title."""
    groups = [_beside(group, _GAP) for group in task.groups]
    groups = groups[first % len(groups) :] + groups[: first % len(groups)]
    while sum(group.shape[1] + _BETWEEN for group in groups) > WIDTH and len(groups) > 1:
        groups.pop()
    pictures = _beside(groups, _BETWEEN)
    row = _filled(pictures, pictures.shape[0] + _BETWEEN, max(WIDTH, pictures.shape[1]))
    return np.concatenate([drawing.captioned(row[:0], f"{task.title}: {task.caption}"), row])


def _beside(pictures: list[np.ndarray], gap: int) -> np.ndarray:
    height = max(picture.shape[0] for picture in pictures)
    spaced = [_filled(picture, height, picture.shape[1] + gap) for picture in pictures]
    return np.concatenate(spaced, axis=1)[:, :-gap]


def _filled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    pad = [(0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)]
    return np.pad(picture, pad, constant_values=255)
