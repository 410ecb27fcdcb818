"""How a condition becomes tokens: the token layout, and one small class a kind of condition.

A condition has `length`, `vocab_size`, `tokens(frozen, batch) -> int32 [b, length]`, `invert(frozen, tokens)` and
`window`, for pictures larger than the trained grid. Its ids are local to it: the layout alone adds offsets.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from vqgan_jax import coordinates
from vqgan_jax.config import UserError, choose, to_dataclass
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.object_tokens import ObjectTokens
from vqgan_jax.tokenizer import Tokenizer

Frozen = Mapping[str, Any]
Grid = tuple[int, int]


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


class Condition(Protocol):
    """The contract. `spatial` grids of tokens can be cut into windows; the others hold for a whole picture."""

    length: int
    vocab_size: int
    spatial: bool
    keys: tuple[str, ...]  # what it needs of a batch

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Condition ids int32 [b, length], local to this kind."""

    def invert(self, frozen: Frozen, tokens: jax.Array) -> Any:
        """What the tokens say: the condition again, as far as they hold it."""

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """Of the tokens of whole pictures of `grid` codes those for their window of `size` at (top, left), which may
        be traced: int32 [b, length]."""


class _Whole:
    """A condition that says the same of every window."""

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """See `Condition.window`."""
        return tokens


class _Spatial:
    """A condition with a token a code, in raster order."""

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """See `Condition.window`."""
        b = tokens.shape[0]
        cut = jax.lax.dynamic_slice(tokens.reshape(b, *grid), (0, top, left), (b, *size))
        return cut.reshape(b, -1)


@dataclasses.dataclass(frozen=True)
class Unconditional(_Whole):
    """A start token, for the transformer needs a first input."""

    length = 1
    vocab_size = 1
    spatial = False
    keys = ()

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        rows = next(iter(batch.values())).shape[0]
        return jnp.zeros((rows, 1), jnp.int32)

    def invert(self, frozen: Frozen, tokens: jax.Array) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class ClassLabel(_Whole):
    """One token, the class."""

    classes: int
    length = 1
    spatial = False
    keys = ("label",)

    @property
    def vocab_size(self) -> int:
        return self.classes

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        return batch["label"][:, None].astype(jnp.int32)

    def invert(self, frozen: Frozen, tokens: jax.Array) -> jax.Array:
        return tokens[:, 0]


@dataclasses.dataclass(frozen=True)
class EncodedImage(_Spatial):
    """A picture (depth, segmentation, edges, ...) as the codes of a VQGAN of its own, in raster order."""

    stage: Tokenizer
    grid: tuple[int, int]
    spatial = True

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.stage.config.input_key,)

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def vocab_size(self) -> int:
        return self.stage.codebook_size

    @property
    def frozen_name(self) -> str:
        """Where its parameters stand among the frozen ones."""
        return f"cond/{self.stage.config.input_key}"

    @property
    def codes_key(self) -> str:
        """The batch key of its codes int32 [b, h, w], where a data set was encoded before."""
        return f"codes/{self.frozen_name}"

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """From the batch's cached codes, or else from its pictures."""
        if self.codes_key in batch:
            ids = batch[self.codes_key]
        else:
            ids = self.stage.encode(frozen[self.frozen_name], model_input(self.stage.config, batch))
        return ids.reshape(ids.shape[0], -1)

    def invert(self, frozen: Frozen, tokens: jax.Array) -> jax.Array:
        return self.stage.decode(frozen[self.frozen_name], tokens.reshape(-1, *self.grid))


@dataclasses.dataclass(frozen=True)
class Coordinates(_Spatial):
    """Where each code of a crop stands in the whole picture, in raster order, for windows of larger pictures."""

    config: "CoordinatesConfig"
    grid: tuple[int, int]
    spatial = True
    keys = ("coords",)

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def vocab_size(self) -> int:
        return self.config.codes

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """From `coords` [b, h, w, 2], (y, x) in [0, 1] at the centres of pixels; of any size that divides."""
        coords, c = batch["coords"], self.config
        if c.scheme == "joint":
            ids = coordinates.coordinate_tokens(coords, c.codes, c.factor)
        else:
            # The scalar counts the whole picture's pixels; how many there are shows in the step between neighbours.
            steps = (coords[:, 1:, :, :1] - coords[:, :-1, :, :1]), (coords[:, :, 1:, 1:] - coords[:, :, :-1, 1:])
            height, width = (jnp.round(1 / jnp.abs(step.mean((1, 2, 3), keepdims=True))) for step in steps)
            scalar = coordinates.raster_scalar(coords, height, width)
            # Its last token is one beyond the table.
            ids = jnp.minimum(coordinates.raster_scalar_tokens(scalar, c.codes, c.factor), c.codes - 1)
        return ids.reshape(ids.shape[0], -1)

    def invert(self, frozen: Frozen, tokens: jax.Array) -> jax.Array:
        """Coordinates [b, h, w, 2], for the raster scalar [b, h, w, 1]."""
        schemes = {"joint": coordinates.coordinates_from_tokens, "raster": coordinates.raster_scalar_from_tokens}
        return schemes[self.config.scheme](tokens.reshape(-1, *self.grid), self.config.codes, self.config.factor)


@dataclasses.dataclass(frozen=True)
class Objects:
    """The layout of a scene: which objects stand where (arXiv 2105.06458)."""

    config: ObjectTokens
    spatial = False

    @property
    def keys(self) -> tuple[str, ...]:
        boxes = ("boxes", "box_classes", "box_flags")
        # Boxes that end at the view's edges have lost what `trim=False` keeps of them.
        return (*boxes, "crop_box") if self.config.crop or not self.config.trim else boxes

    @property
    def length(self) -> int:
        return self.config.length

    @property
    def vocab_size(self) -> int:
        return self.config.vocab

    def tokens(self, frozen: Frozen, batch: Mapping[str, jax.Array]) -> jax.Array:
        """With `crop_box`, boxes are relative to the whole picture that it is cut from; without, to what is seen."""
        boxes = (batch[name] for name in ("boxes", "box_classes", "box_flags"))
        return self.config.tokens(*boxes, batch.get("crop_box"))

    def invert(self, frozen: Frozen, tokens: jax.Array) -> dict[str, jax.Array]:
        return self.config.invert(tokens)

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """With `crop`, the objects that the window shows, and the window as their crop; without, all of them."""
        if not self.config.crop:
            return tokens
        scene = self.config.invert(tokens)
        corner = jnp.stack([left / grid[1], top / grid[0]])
        crop = jnp.concatenate([corner, jnp.array([size[1] / grid[1], size[0] / grid[0]])]).astype(jnp.float32)
        crops = jnp.broadcast_to(crop, (tokens.shape[0], 4))
        return self.config.tokens(scene["boxes"], scene["box_classes"], scene["box_flags"], crops)


@dataclasses.dataclass(frozen=True)
class UnconditionalConfig:
    """No fields."""


@dataclasses.dataclass(frozen=True)
class ClassLabelConfig:
    """The number of classes."""

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}; a class-conditional model needs at least 1")


@dataclasses.dataclass(frozen=True)
class EncodedImageConfig:
    """The batch key of the picture; its VQGAN is `config.cond_vqgan`."""

    input_key: str


@dataclasses.dataclass(frozen=True)
class CoordinatesConfig:
    """How positions become tokens."""

    codes: int
    factor: int  # pixels a token: the first stage's
    scheme: Literal["joint", "raster"]  # one bin of (y, x), or the reference's scalar, which hardly tells columns apart

    def __post_init__(self) -> None:
        if self.codes < 1 or self.factor < 1:
            raise ValueError(f"codes is {self.codes} and factor {self.factor}; both are at least 1")


CONFIGS: dict[str, type[Any]] = {
    "none": UnconditionalConfig,
    "class": ClassLabelConfig,
    "image": EncodedImageConfig,
    "coordinates": CoordinatesConfig,
    "objects": ObjectTokens,
}
ConditionConfig = UnconditionalConfig | ClassLabelConfig | EncodedImageConfig | CoordinatesConfig | ObjectTokens


def condition_config(config: Mapping[str, Any], key: str) -> ConditionConfig:
    """Reads `config.model.condition`. Raises UserError that names the key."""
    fields = dict(config)
    kind = choose(f"{key}.name", fields.pop("name"), CONFIGS)
    return to_dataclass(kind, fields, key=key)


def make_condition(config: ConditionConfig, grid: tuple[int, int], stage: Tokenizer | None) -> Condition:
    """The condition of a config; `stage` is the VQGAN of an encoded picture.

    Raises:
      UserError: an encoded picture without its VQGAN, or with that of another picture.
    """
    match config:
        case UnconditionalConfig():
            return Unconditional()
        case ClassLabelConfig(classes):
            return ClassLabel(classes)
        case EncodedImageConfig(input_key):
            if stage is None:
                raise UserError(f"config.cond_vqgan: a '{input_key}' condition needs the workdir of its VQGAN")
            if stage.config.input_key != input_key:
                raise UserError(
                    f"config.cond_vqgan: that VQGAN encodes '{stage.config.input_key}', the condition is '{input_key}'"
                )
            return EncodedImage(stage, grid)
        case CoordinatesConfig():
            return Coordinates(config, grid)
        case ObjectTokens():
            return Objects(config)
    raise TypeError(config)
