"""The kinds of condition: one small class each, and the config that it is built from."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax import coordinates, drawing
from vqgan_jax.conditioning.contract import Batch, Frozen, Grid, Names, Spatial, Whole, names_of
from vqgan_jax.models.vqgan import model_input, model_output
from vqgan_jax.object_tokens import FLAGS, ObjectTokens
from vqgan_jax.tokenizer import Tokenizer

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unconditional(Whole):
    """A start token, for the transformer needs a first input."""

    length = 1
    vocab_size = 1
    keys = ()

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        rows = next(iter(batch.values())).shape[0]
        return jnp.zeros((rows, 1), jnp.int32)

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        return {}

    def draw(self, batch: Arrays, size: Grid, names: Names = ()) -> np.ndarray:
        rows = next((len(value) for value in batch.values()), 0)
        return np.full((rows, *size, 3), 255, np.uint8)


@dataclasses.dataclass(frozen=True)
class ClassLabel(Whole):
    """One token, the class."""

    classes: int
    length = 1
    keys = ("label",)

    @property
    def vocab_size(self) -> int:
        return self.classes

    @property
    def labels(self) -> int:
        return self.classes

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        return batch["label"][:, None].astype(jnp.int32)

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        return {"label": tokens[:, 0]}

    def draw(self, batch: Arrays, size: Grid, names: Names = ()) -> np.ndarray:
        known = names_of(names, "label")
        return np.stack([drawing.text(drawing.name_of(int(label), known), *size) for label in batch["label"]])


@dataclasses.dataclass(frozen=True)
class EncodedImage(Spatial):
    """A picture (depth, segmentation, edges, ...) as the codes of a VQGAN of its own, in raster order."""

    stage: Tokenizer
    grid: Grid

    @property
    def key(self) -> str:
        """The batch key of the picture."""
        return self.stage.config.input_key

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def vocab_size(self) -> int:
        return self.stage.codebook_size

    @property
    def frozen_name(self) -> str:
        """Where its parameters stand among the frozen ones."""
        return f"cond/{self.key}"

    @property
    def codes_key(self) -> str:
        """The batch key of its codes int32 [b, h, w], where a data set was encoded before."""
        return f"codes/{self.frozen_name}"

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """From the batch's cached codes, or else from its pictures."""
        if self.codes_key in batch:
            ids = batch[self.codes_key]
        else:
            ids = self.stage.encode(frozen[self.frozen_name], model_input(self.stage.config, batch))
        return ids.reshape(ids.shape[0], -1)

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        pictures = self.stage.decode(frozen[self.frozen_name], tokens.reshape(-1, *(grid or self.grid)))
        return {self.key: model_output(self.stage.config, pictures)}

    def draw(self, batch: Arrays, size: Grid, names: Names = ()) -> np.ndarray:
        return np.stack([drawing.resized(drawing.picture(self.key, np.asarray(x)), *size) for x in batch[self.key]])


@dataclasses.dataclass(frozen=True)
class Coordinates(Spatial):
    """Where each code of a crop stands in the whole picture, in raster order, for windows of larger pictures."""

    config: "CoordinatesConfig"
    grid: Grid
    keys = ("coords",)

    @property
    def vocab_size(self) -> int:
        return self.config.codes

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
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

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        """Coordinates [b, h, w, 2]. The raster scalar is y, as far as it can be told, and says next to nothing of x,
        which is 0.5."""
        ids, c = tokens.reshape(-1, *(grid or self.grid)), self.config
        if c.scheme == "joint":
            return {"coords": coordinates.coordinates_from_tokens(ids, c.codes, c.factor)}
        y = coordinates.raster_scalar_from_tokens(ids, c.codes, c.factor)
        return {"coords": jnp.concatenate([y, jnp.full_like(y, 0.5)], axis=-1)}

    def draw(self, batch: Arrays, size: Grid, names: Names = ()) -> np.ndarray:
        return np.stack([drawing.resized(drawing.coords(np.asarray(x)), *size) for x in batch["coords"]])


@dataclasses.dataclass(frozen=True)
class Objects(Whole):
    """The layout of a scene: which objects stand where (arXiv 2105.06458)."""

    config: ObjectTokens

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

    def tokens(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """With `crop_box`, boxes are relative to the whole picture that it is cut from; without, to what is seen."""
        return self._tokens(batch)

    def whole(self, frozen: Frozen, batch: Batch) -> jax.Array:
        """With the sizes of objects that are written as centres: they are seen also where the centre is not."""
        return self._tokens(batch, sizes=True)

    def _tokens(self, batch: Batch, sizes: bool = False) -> jax.Array:
        boxes = (batch[name] for name in ("boxes", "box_classes", "box_flags"))
        return self.config.tokens(*boxes, batch.get("crop_box"), sizes=sizes)

    def invert(self, frozen: Frozen, tokens: jax.Array, grid: Grid | None = None) -> dict[str, jax.Array]:
        return self.config.invert(tokens)

    def draw(self, batch: Arrays, size: Grid, names: Names = ()) -> np.ndarray:
        """Named boxes on white, where they are seen."""
        return np.stack([self._draw({k: np.asarray(batch[k][i]) for k in batch}, size, names) for i in _rows(batch)])

    def _draw(self, row: Arrays, size: Grid, names: Names) -> np.ndarray:
        boxes, classes = drawing.seen_boxes(row["boxes"], row["box_classes"], row.get("crop_box"))
        flags = ["+".join(flag for bit, flag in enumerate(FLAGS) if n >> bit & 1) for n in row.get("box_flags", ())]
        canvas = np.full((*size, 3), 255, np.uint8)
        return drawing.boxes(canvas, boxes, classes, names_of(names, "box_classes"), flags)

    def window(self, tokens: jax.Array, grid: Grid, top: jax.Array, left: jax.Array, size: Grid) -> jax.Array:
        """The objects that the window shows: with `crop` in the whole picture, and the window as their crop; without,
        relative to the window."""
        scene = self.config.invert(tokens)
        corner, seen = jnp.split(scene["crop_box"], 2, axis=-1)
        place = jnp.stack([left / grid[1], top / grid[0]]).astype(jnp.float32)
        share = jnp.array([size[1] / grid[1], size[0] / grid[0]], jnp.float32)
        crop = jnp.concatenate([corner + seen * place, seen * share], axis=-1)
        return self.config.tokens(scene["boxes"], scene["box_classes"], scene["box_flags"], crop)


def _rows(batch: Arrays) -> range:
    return range(len(batch["boxes"]))


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
    """The batch key of the picture; its VQGAN is one of `config.cond_vqgan`."""

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
