"""The token layout: where condition and image codes stand in the transformer's vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where each kind's ids stand in the transformer's vocabulary: image codes at 0, the condition's after them.

    `shared` is the reference's layout: all offsets are 0, and the head covers the whole vocabulary.
    """

    image_codes: int
    condition_codes: int
    shared: bool

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        codes = (self.image_codes, self.condition_codes)
        return max(codes) if self.shared else sum(codes)

    @property
    def head_size(self) -> int:
        """Outputs of the head."""
        return self.vocab_size if self.shared else self.image_codes

    def condition(self, tokens_bt: jax.Array) -> jax.Array:
        """A condition's local ids as ids of the vocabulary."""
        return tokens_bt + (0 if self.shared else self.image_codes)

    def join(self, condition_bt: jax.Array, codes_bt: jax.Array) -> jax.Array:
        """The transformer's sequence [b, condition + codes] from the local ids of both."""
        return jnp.concatenate([self.condition(condition_bt), codes_bt], axis=1)
