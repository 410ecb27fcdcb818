"""A trained VQGAN as two pure functions and its frozen parameters: the one bridge from stage 1 to stage 2."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from vqgan_jax.models.vqgan import VQGAN, VQGANConfig


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes with `variables` that are arguments, never closures: {"params": ..., "codebook": ...}."""

    model: VQGAN

    @property
    def config(self) -> VQGANConfig:
        return self.model.config

    @property
    def factor(self) -> int:
        """Pixels a code along a side."""
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        return self.config.quantizer.codebook_size

    def encode(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Images float32 [b, h, w, c] in [-1, 1] to ids int32 [b, h / factor, w / factor]."""
        return self.model.apply(variables, images, method="encode")

    def decode(self, variables: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        """Ids int32 [b, h, w] to images float32 [b, factor * h, factor * w, c], not clipped."""
        return self.model.apply(variables, ids, method="decode")


def by_input_key(tokenizers: Iterable[Tokenizer]) -> dict[str, Tokenizer]:
    """The tokenizers by the batch key that each encodes."""
    return {tokenizer.config.input_key: tokenizer for tokenizer in tokenizers}
