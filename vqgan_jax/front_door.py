"""What notebooks hold: a trained VQGAN and a trained transformer, jitted, batched, their arguments checked.

Images are float32 [b, h, w, c] in [-1, 1]; ids are local to their kind, for imported models the reference's ids.
`pretrained.load_vqgan` and `pretrained.load_transformer` make them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax import conditioning, losses
from vqgan_jax.config import UserError, choose
from vqgan_jax.models.gpt import split_layers
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.sampling.sampler import leading_given, make_sampler
from vqgan_jax.sampling.strategies import RAMPS, Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ImageTransformer

Tree = Any


class PretrainedVQGAN:
    """Pictures to codes and back.

    A segmentation goes in as labels int [b, h, w] or one-hot float [b, h, w, c], and comes out as logits. Heights and
    widths divide by `factor`; each new shape compiles once. Mistakes in arguments raise UserError.
    """

    def __init__(self, tokenizer: Tokenizer, variables: Tree):
        self.config, self.factor = tokenizer.config, tokenizer.factor
        self._variables = jax.tree.map(jnp.asarray, variables)
        model = tokenizer.model
        self._encode, self._decode = jax.jit(tokenizer.encode), jax.jit(tokenizer.decode)
        self._pre_quant = jax.jit(lambda v, x: model.apply(v, x, method="pre_quantized"))
        self._reconstruct = jax.jit(lambda v, x: model.apply(v, x).reconstruction)
        self._codebook = jax.jit(lambda v: model.apply(v, method="codebook"))

    @functools.cached_property
    def codebook(self) -> jax.Array:
        """The code vectors, float32 [q, e]."""
        return self._codebook(self._variables)

    def encode(self, images: Any) -> jax.Array:
        """Images to ids int32 [b, h / factor, w / factor]."""
        return self._encode(self._variables, self.prepare(images))

    def decode(self, ids: Any) -> jax.Array:
        """Ids int [b, h, w] to images float32 [b, factor * h, factor * w, c], not clipped."""
        return self._decode(self._variables, _ids("ids", ids, ("b", "h", "w"), self.config.quantizer.codebook_size))

    def reconstruct(self, images: Any) -> jax.Array:
        """Images through the codes and back, not clipped."""
        return self._reconstruct(self._variables, self.prepare(images))

    def pre_quant(self, images: Any) -> jax.Array:
        """What the quantizer sees: float32 [b, h / factor, w / factor, e]."""
        return self._pre_quant(self._variables, self.prepare(images))

    def prepare(self, images: Any) -> jax.Array:
        """Checks pictures and returns them as the network takes them, float32 [b, h, w, c].

        Raises:
          UserError: another shape or type, a size that does not divide, a label out of range.
        """
        c = self.config.autoencoder
        if self.config.input_key == "segmentation" and np.ndim(images) == 3:
            labels = _ids("segmentation", images, ("b", "h", "w"), c.in_channels)
            images = model_input(self.config, {"segmentation": labels})
        shape = np.shape(images)
        if len(shape) != 4 or shape[3] != c.in_channels or not all(shape):
            raise UserError(f"images: shape {shape}; this model takes [b, h, w, {c.in_channels}], none of them 0")
        if not jnp.issubdtype(jnp.asarray(images).dtype, jnp.floating):
            raise UserError("images: integers; turn uint8 pictures into float32 in [-1, 1] with images.from_uint8")
        if shape[1] % self.factor or shape[2] % self.factor:
            raise UserError(f"images: {shape[1]}x{shape[2]} pixels; both sides must be multiples of {self.factor}")
        return jnp.asarray(images, jnp.float32)


class PretrainedTransformer:
    """Codes of pictures, given a condition. Arguments are checked and raise UserError; each new shape compiles once.

    Attributes:
      first_stage: the VQGAN of its codes.
      cond_stages: the VQGANs of encoded pictures in the condition, by batch key.
      config: hyper-parameters, `config.grid` among them, the grid of codes that it was trained on.
    """

    def __init__(self, model: ImageTransformer, params: Tree, frozen: Tree):
        self._model, self.config = model, model.config
        self._params, self._frozen = jax.tree.map(jnp.asarray, (params, frozen))
        self.first_stage = PretrainedVQGAN(model.first_stage, self._frozen["first_stage"])
        self.cond_stages = {
            key: PretrainedVQGAN(stage, self._frozen[f"cond/{key}"]) for key, stage in model.cond_stages.items()
        }
        self._logits, self._decode = jax.jit(model.logits), jax.jit(model.decode)
        self._tokens = jax.jit(model.condition.tokens)
        self._sampler = functools.cache(functools.partial(make_sampler, model))

    @functools.cached_property
    def _split(self) -> Tree:
        return split_layers(self._params)

    def condition_tokens(self, raw: Any) -> jax.Array:
        """A condition's ids int32 [b, t].

        Args:
          raw: by kind: the number of rows (unconditional); labels int [b]; a picture as its VQGAN's `encode` takes
            it; coordinates float [b, h, w, 2], (y, x) in [0, 1]; objects as {"boxes": [b, n, 4], "box_classes": [b, n],
            "box_flags": [b, n], "crop_box": [b, 4]}, the last two by choice. Several conditions at once: all of these
            in one mapping by batch key. A picture larger than the trained one gives the tokens of the whole grid, for
            `sample` with that grid.
        """
        condition = self._model.condition
        if not condition.keys:
            rows = 1 if raw is None else raw
            if not isinstance(rows, int | np.integer) or rows < 1:
                raise UserError("raw: the model is unconditional; give the number of rows")
            return jnp.zeros((rows, 1), jnp.int32)
        if len(condition.parts) == 1 and len(condition.keys) == 1 and not isinstance(raw, Mapping):
            raw = {condition.keys[0]: raw}
        batch: dict[str, jax.Array] = {}
        for part in condition.parts:
            batch |= self._batch(part, raw)
        if len({len(value) for value in batch.values()}) > 1:
            raise UserError(f"raw: {', '.join(f'{len(value)} rows of {key}' for key, value in batch.items())}")
        return self._tokens(self._frozen, batch)

    def _batch(self, part: conditioning.Condition, raw: Any) -> dict[str, jax.Array]:
        """What a part of the condition reads, checked."""
        if isinstance(part, conditioning.Objects):
            return _objects(raw, part.config.classes)
        if not isinstance(raw, Mapping) or not set(part.keys) <= set(raw):
            raise UserError(f"raw: this model's condition is a mapping of {', '.join(self._model.condition.keys)}")
        match part:
            case conditioning.ClassLabel():
                return {"label": _ids("labels", np.atleast_1d(raw["label"]), ("b",), part.classes)}
            case conditioning.EncodedImage():
                return {part.codes_key: self.cond_stages[part.key].encode(raw[part.key])}
            case conditioning.Coordinates():
                coords = raw["coords"]
                if np.ndim(coords) != 4 or np.shape(coords)[3] != 2:
                    raise UserError(f"raw: shape {np.shape(coords)}; coordinates are [b, h, w, 2]")
                return {"coords": jnp.asarray(coords, jnp.float32)}
        return {key: jnp.asarray(raw[key]) for key in part.keys}

    def logits(self, ids: Any, condition_tokens: Any) -> jax.Array:
        """Logits float32 [b, t, v]: position i predicts `ids[:, i]`.

        Args:
          ids: [b, t] in order of generation, all of the trained grid's or the first t; or [b, h, w].
          condition_tokens: from `condition_tokens`, [b, length].
        """
        return self._logits(self._params, *self._sequence(ids, condition_tokens))

    def nll(self, ids: Any, condition_tokens: Any) -> jax.Array:
        """Mean negative log-likelihood in nats a token, a scalar; arguments as for `logits`."""
        condition, codes = self._sequence(ids, condition_tokens)
        return losses.token_nll(self._logits(self._params, condition, codes), codes).mean()

    def sample(
        self,
        condition_tokens: Any,
        grid: tuple[int, int] | None = None,
        given: tuple[Any, Any] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float = 0.0,
        greedy: bool = False,
        guidance: float = 1.0,
        schedule: str = "constant",
        power: float = 1.0,
        seed: int = 0,
    ) -> jax.Array:
        """Draws ids int32 [b, h, w]; row i depends on the seed and on i, not on the batch.

        Args:
          condition_tokens: [b, length]; for a spatial condition those of the whole grid, [b, h * w] or [b, h, w].
          grid: height and width in codes, None for the trained ones; beyond them a window slides in raster order.
          given: (ids, mask bool), both [b, h, w]: kept as given where the mask is set.
          temperature: divides the logits, above 0.
          top_k: draw from the k likeliest; None: from all.
          top_p: then from the likeliest that hold this share, in (0, 1]; None: from all.
          min_p: then from those at least this share as likely as the likeliest.
          greedy: take the likeliest always.
          guidance: scale of classifier-free guidance, for a model trained with `condition_dropout`; 1: none.
          schedule: how the scale grows over the tokens: constant, linear, cosine or power-cosine.
          power: of power-cosine.
          seed: of the draw.
        """
        grid = tuple(int(n) for n in grid or self.config.grid)
        if temperature <= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise UserError("sample: temperature is above 0, top_k at least 1 and top_p in (0, 1], or None for none")
        sampler = self._sampler(grid)
        condition = self._condition(condition_tokens, self._model.condition.length_on(grid))
        if given is not None:
            b, (ids, mask) = len(condition), given
            if np.shape(mask) != (b, *grid) or np.shape(ids) != (b, *grid) or np.asarray(mask).dtype != bool:
                raise UserError(f"given: ids and a mask of bool, both of shape {(b, *grid)}")
            ids = _ids("given", np.where(mask, ids, 0), ("b", "h", "w"), self._model.layout.head_size)
            given = ids, jnp.asarray(mask)
        choose("schedule", schedule, RAMPS)
        settings = dict(temperature=float(temperature), top_k=int(top_k or 0), top_p=float(top_p or 1.0))
        settings |= dict(min_p=float(min_p), guidance=float(guidance), power=float(power))
        strategy = Strategy(**settings, greedy=greedy, schedule=schedule)
        leading = {}
        if given and grid == self.config.grid:
            leading = {"leading": leading_given(self._model, np.asarray(mask))}
        keys = row_keys(seed, jnp.arange(len(condition)))
        return sampler(self._split, condition, keys, strategy, given, **leading)

    def decode(self, ids: Any) -> jax.Array:
        """Ids [b, h, w] to images float32; ids beyond the codebook (a shared vocabulary has some) as its last code."""
        return self._decode(self._frozen, _ids("ids", ids, ("b", "h", "w"), self._model.layout.head_size))

    def _condition(self, tokens: Any, length: int) -> jax.Array:
        if np.ndim(tokens) == 3:
            tokens = np.reshape(tokens, (len(tokens), -1))
        tokens = _ids("condition_tokens", tokens, ("b", "t"), self._model.condition.vocab_size)
        if tokens.shape[1] != length:
            raise UserError(f"condition_tokens: {tokens.shape[1]} tokens a row, {length} belong")
        return tokens

    def _sequence(self, ids: Any, condition_tokens: Any) -> tuple[jax.Array, jax.Array]:
        grid, head = self.config.grid, self._model.layout.head_size
        if np.ndim(ids) == 3:
            if np.shape(ids)[1:] != grid:
                raise UserError(f"ids: a grid of {np.shape(ids)[1:]}, the model is trained on {grid}")
            codes = self._model.from_grid(_ids("ids", ids, ("b", "h", "w"), head))
        else:
            codes = _ids("ids", ids, ("b", "t"), head)
        if not 1 <= codes.shape[1] <= grid[0] * grid[1]:
            raise UserError(f"ids: {codes.shape[1]} tokens a row, from 1 to {grid[0] * grid[1]} belong")
        condition = self._condition(condition_tokens, self._model.condition.length)
        if len(condition) != len(codes):
            raise UserError(f"ids: {len(codes)} rows, condition_tokens has {len(condition)}")
        return condition, codes


def _objects(raw: Mapping[str, Any], classes: int) -> dict[str, jax.Array]:
    if not isinstance(raw, Mapping) or not {"boxes", "box_classes"} <= set(raw):
        raise UserError("raw: objects are {'boxes': [b, n, 4], 'box_classes': [b, n]} (and box_flags, crop_box)")
    batch = {"box_flags": np.zeros(np.shape(raw["box_classes"]), np.int32), **raw}
    if np.ndim(batch["boxes"]) != 3 or np.shape(batch["boxes"]) != (*np.shape(batch["box_classes"]), 4):
        raise UserError("raw: 'boxes' are [b, n, 4], 'box_classes' [b, n]")
    _ids("box_classes", np.maximum(batch["box_classes"], 0), ("b", "n"), classes)
    kinds = {"boxes": jnp.float32, "box_classes": jnp.int32, "box_flags": jnp.int32, "crop_box": jnp.float32}
    return {name: jnp.asarray(batch[name], kind) for name, kind in kinds.items() if name in batch}


def _ids(name: str, ids: Any, axes: tuple[str, ...], below: int) -> jax.Array:
    """Checks ids: integers of the right rank, at least one, all in [0, below)."""
    array = np.asarray(ids)
    if array.ndim != len(axes) or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: {array.dtype} of shape {array.shape}; integers [{', '.join(axes)}] belong")
    if array.min() < 0 or array.max() >= below:
        raise UserError(f"{name}: from {array.min()} to {array.max()}, they must lie in 0 to {below - 1}")
    return jnp.asarray(array, jnp.int32)
