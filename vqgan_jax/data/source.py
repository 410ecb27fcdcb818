"""What a source of examples is: the protocol that every kind of data follows, and the error of an unreadable one."""

import bisect
from collections.abc import Sequence
from typing import Any, Protocol

Example = dict[str, Any]


class Source(Protocol):
    """Random access to raw examples; picklable, and `__getitem__` may run in several threads at once.

    An example is a dict of: image uint8 [h, w, 3]; and, where the source knows them, label int; segmentation uint8 or
    int32 [h, w] and depth float32 [h, w] in [0, 1], of the image's proportions; boxes float32 [n, 4] (x, y, width,
    height, relative to the picture); box_classes int32 [n]; box_flags int32 [n]; keypoints float32 [n, 3] (x, y,
    visible; relative to the picture); keypoints_mirrored int32 [n] (which point each is in a mirrored picture); edges
    uint8 [h, w]; name str (for people, never batched).
    Reading an unreadable example raises `CorruptExample`. A source that knows the names of ids has them by key in
    `tables`: {"segmentation": ("sky", ...)}. One of picture files has `encoded(index)`: the example with the file's
    bytes as "image_bytes" in place of "image".
    """

    classes: tuple[str, ...]  # the names of the labels, () where examples have none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Which of several parts in a row holds item `index`, and its position there; `ends` are their running totals.

    Raises:
      IndexError: there is no such item.
    """
    if not ends or not 0 <= index < ends[-1]:
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


class CorruptExample(Exception):
    """An example that cannot be read: `path` names it, `reason` says why. The pipeline replaces it and counts it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def readable(source: Source, index: int) -> Example:
    """Example `index` of a source, or the next that can be read. Raises CorruptExample: none can."""
    count = len(source)
    for place in range(index, index + count):
        try:
            return source[place % count]
        except CorruptExample as error:
            last = error
    raise last
