"""The arrays of a stage as an import sees them: each knows the tensors of the file that it is made of."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vqgan_jax.convert.names import Key


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array of a stage.

    Attributes:
      path: in the stage: "params/generator/encoder/conv_in/kernel".
      keys: the tensor it is in the file; one a layer where layers are stacked; () for zeros that no file has.
      joined: rows of each key's piece, where they stand one after the other.
    """

    path: str
    shape: tuple[int, ...]
    keys: tuple[Key, ...]
    dtype: np.dtype = np.dtype(np.float32)
    stacked: bool = False
    joined: tuple[int, ...] = ()

    @property
    def piece_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of what each key gives."""
        if self.joined:
            return tuple((rows, *self.shape[1:]) for rows in self.joined)
        return (self.shape[1:] if self.stacked else self.shape,) * len(self.keys)

    def pieces(self, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """The array's parts in our layout, one a key."""
        if not self.keys:
            yield np.zeros(self.shape, self.dtype)
        for key in self.keys:
            yield np.ascontiguousarray(key.take(tensors[key.name]), self.dtype)

    def read(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The whole array."""
        if self.joined:
            return np.concatenate(list(self.pieces(tensors)))
        if not self.stacked:
            return next(self.pieces(tensors)).reshape(self.shape)
        array = np.empty(self.shape, self.dtype)
        for layer, piece in enumerate(self.pieces(tensors)):
            array[layer] = piece
        return array


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's record and arrays."""

    record: dict[str, Any]
    slots: tuple[Slot, ...]
