"""Stage 2 put together: GPT, token layout, condition, order and first stage, as pure functions of arrays.

Trainer, sampler, scores and the front door all speak to the transformer through this one class.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh

from vqgan_jax import conditioning, ordering
from vqgan_jax.config import UserError, to_dataclass
from vqgan_jax.models.bits import split_bits
from vqgan_jax.models.gpt import GPT, Cache, GPTConfig, cast_weights, init_cache, split_layers
from vqgan_jax.models.rope import Coordinates
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.parallel import constrain, state_shardings
from vqgan_jax.tokenizer import Tokenizer

Tree = Any


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """The transformer's shape, as far as it does not follow from the codes."""

    layers: int
    heads: int
    width: int
    block_size: int  # positions; 0 = as many as the sequence needs
    prefix: int  # first tokens that see each other both ways; 0 = causal throughout, -1 = the whole condition
    embed_dropout: float
    residual_dropout: float
    attention_dropout: float
    block: Literal["gpt2", "llama"]
    kv_heads: int  # heads of keys and values; 0 = as many as heads
    mlp_width: int  # 0 = the block's own rule: models/blocks.py
    positions: Literal["learned", "rope", "rope_llamagen"]  # rotary ones stand on the grid: `ImageTransformer.places`
    qk_norm: bool
    adaln: bool  # blocks modulated by the mean of the condition's embeddings
    drop_path: float  # share of rows that leave the last layer out in training; it grows from 0 at the first
    target_positions: bool  # each token knows the place of the one that it predicts, as random orders need
    head_bits: int  # codes read as groups of so many bits; 0 = each by itself


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What makes a stage-2 model: a workdir fits a config where these are equal."""

    transformer: ArchitectureConfig
    condition: conditioning.ConditionConfig
    grid: tuple[int, ...]  # height and width of the code grid it is trained on
    order: str
    shared_vocabulary: bool  # the reference's layout: condition and image codes share ids
    condition_dropout: float  # share of training rows whose condition is the null token; above 0 sampling can be guided

    @classmethod
    def from_config(cls, model: Mapping[str, Any], key: str = "config.model") -> "TransformerConfig":
        """Builds it from `config.model`. Raises UserError that names the key."""
        rest = {name: model[name] for name in ("grid", "order", "shared_vocabulary", "condition_dropout")}
        if unknown := set(model) - set(rest) - {"transformer", "condition"}:
            raise UserError(f"{key}: unknown key '{sorted(unknown)[0]}'")
        architecture = to_dataclass(ArchitectureConfig, model["transformer"], key=f"{key}.transformer")
        condition = conditioning.condition_config(model["condition"], f"{key}.condition")
        dropout = rest["condition_dropout"]
        if not 0 <= dropout < 1:
            raise UserError(f"{key}.condition_dropout: {dropout}; it is a share of the rows, from 0 to below 1")
        if dropout and isinstance(condition, conditioning.UnconditionalConfig):
            raise UserError(f"{key}.condition_dropout: an unconditional model has no condition to drop; set it to 0")
        return cls(architecture, condition, tuple(rest["grid"]), rest["order"], rest["shared_vocabulary"], dropout)


@dataclasses.dataclass(frozen=True)
class ImageTransformer:
    """Codes of pictures, given a condition. `frozen` everywhere holds the variables of the frozen networks by name:
    "first_stage", "cond/<key>"; `cond_stages` are the VQGANs of encoded conditions by their input_key."""

    config: TransformerConfig
    first_stage: Tokenizer
    cond_stages: Mapping[str, Tokenizer] = dataclasses.field(default_factory=dict, hash=False)
    dtype: Dtype = jnp.float32
    remat: str = ""  # models/remat.py

    @functools.cached_property
    def condition(self) -> conditioning.Condition:
        return conditioning.make_condition(self.config.condition, self.config.grid, self.cond_stages)

    @functools.cached_property
    def layout(self) -> conditioning.TokenLayout:
        codes = self.condition.vocab_size + (self.config.condition_dropout > 0)
        return conditioning.TokenLayout(self.first_stage.codebook_size, codes, self.config.shared_vocabulary)

    @property
    def null_condition(self) -> jax.Array:
        """The condition that says nothing: the id after all others at every place, int32 [1, length].

        Raises:
          UserError: the model was trained without one.
        """
        if not self.config.condition_dropout:
            raise UserError(
                "guidance: this model was trained without config.model.condition_dropout, so it knows no null "
                "condition; sample with guidance 1"
            )
        return jnp.full((1, self.condition.length), self.condition.vocab_size, jnp.int32)

    def drop_condition(self, key: jax.Array, condition_bt: jax.Array) -> jax.Array:
        """The condition as training sees it: the null one in a share of the rows."""
        if not self.config.condition_dropout:
            return condition_bt
        dropped = jax.random.bernoulli(key, self.config.condition_dropout, (condition_bt.shape[0], 1))
        return jnp.where(dropped, self.null_condition, condition_bt)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """Raster index in order of generation, int32 [h * w]."""
        return ordering.order(self.config.order, *self.config.grid)

    @functools.cached_property
    def gpt(self) -> GPTConfig:
        a = self.config.transformer
        needed = self.condition.length + len(self.order) - (not a.target_positions)  # the last code may be an input
        if a.block_size and a.block_size < needed:
            raise UserError(
                f"config.model.transformer.block_size: {a.block_size} positions, the sequence needs {needed}"
            )
        if not -1 <= a.prefix <= self.condition.length:
            raise UserError(
                f"config.model.transformer.prefix: {a.prefix}, but the condition has {self.condition.length} tokens; "
                "codes must not see later ones, and -1 means all of them"
            )
        if a.heads < 1 or a.width % a.heads:
            raise UserError(f"config.model.transformer.width: {a.width} does not divide over {a.heads} heads")
        same = set(f.name for f in dataclasses.fields(GPTConfig)) & set(vars(a))
        changed = {
            "block_size": a.block_size or needed,
            "prefix": self.condition.length if a.prefix < 0 else a.prefix,
        }
        try:
            return GPTConfig(
                vocab_size=self.layout.vocab_size,
                head_size=self.layout.head_size,
                condition=self.condition.length,
                coordinates=() if a.positions == "learned" else self.places,
                **{name: getattr(a, name) for name in same} | changed,
            )
        except ValueError as error:
            raise UserError(f"config.model.transformer.{error}") from None

    @property
    def places(self) -> Coordinates:
        """Row and column of every token, the condition's first, for rotary positions: codes and tokens of spatial
        conditions stand where they belong on the grid; the others on the diagonal before it, each at (-i, -i), as text
        stands before pictures in Qwen2-VL (arXiv 2409.12191); with "rope_llamagen" nowhere."""
        h, w = self.config.grid
        raster = [divmod(index, w) for index in range(h * w)]
        absent = self.config.transformer.positions == "rope_llamagen"
        before = sum(part.length for part in self.condition.parts if not part.spatial)
        condition: list[tuple[int, int] | None] = []
        for part in self.condition.parts:
            if part.spatial:
                condition += [None] * part.length if absent else raster
                continue
            condition += [None if absent else (i - before, i - before) for i in range(part.length)]
            before -= part.length
        return (*condition, *(raster[index] for index in self.order))

    def check_size(self, image_size: int | tuple[int, int]) -> None:
        """Raises UserError unless pictures of this size (a side, or height and width) have the grid's codes."""
        factor = self.first_stage.factor
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = (height // factor, width // factor)
        if self.config.grid != grid:
            raise UserError(
                f"config.model.grid: {self.config.grid}, but {image_size} pixels at factor {factor} give {grid}; "
                "set it, or config.data.image_size"
            )
        for key, stage in self.cond_stages.items():
            if stage.factor != factor:
                raise UserError(
                    f"config.cond_vqgan: the VQGAN of '{key}' has factor {stage.factor}, that of config.vqgan has "
                    f"factor {factor}; their codes must stand at the same places"
                )
        for part in self.condition.parts:
            if isinstance(part, conditioning.Coordinates) and part.config.factor != factor:
                raise UserError(f"config.model.condition.factor: {part.config.factor}, the first stage has {factor}")

    @property
    def attend(self) -> str:
        return "prefix" if self.gpt.prefix else "causal"

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters, boxed with their logical axes."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return GPT(self.gpt, self.dtype).init(key, ids, positions_bt=ids)["params"]

    def codes(self, frozen: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Image codes [b, t] in order of generation, from the batch's cached codes [b, h, w] or its images."""
        return self.from_grid(self._grid_codes(frozen, batch))

    def _grid_codes(self, frozen: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
        if "codes/image" in batch:
            return batch["codes/image"]
        return self.first_stage.encode(frozen["first_stage"], model_input(self.first_stage.config, batch))

    def given(self, frozen: Tree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array] | None:
        """Of a batch with `given` bool [b, h, w], the grid's codes that are kept: (codes of its images, `given`), both
        [b, h, w]; None of one without."""
        if "given" not in batch:
            return None
        return self._grid_codes(frozen, batch), batch["given"]

    def from_grid(self, ids_bhw: jax.Array) -> jax.Array:
        """Ids [b, h, w] to [b, t] in order of generation."""
        return ids_bhw.reshape(ids_bhw.shape[0], -1)[:, self.order]

    def to_grid(self, codes_bt: jax.Array) -> jax.Array:
        """The inverse of `from_grid`."""
        return codes_bt[:, ordering.inverse(self.order)].reshape(-1, *self.config.grid)

    def decode(self, frozen: Tree, ids_bhw: jax.Array) -> jax.Array:
        """Ids [b, h, w] to images; ids beyond the codebook (a shared vocabulary has some) count as its last code."""
        ids = jnp.minimum(ids_bhw, self.first_stage.codebook_size - 1)
        return self.first_stage.decode(frozen["first_stage"], ids)

    def logits(
        self,
        params: Tree,
        condition_bt: jax.Array,
        codes_bt: jax.Array,
        *,
        permutation_bt: jax.Array | None = None,
        grouped: bool = False,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Logits of the codes, float32: position i predicts `codes_bt[:, i]`. Stacked parameters, as trained.

        Args:
          params: as trained.
          condition_bt: local ids.
          codes_bt: of each row, in the order in which they are predicted.
          permutation_bt: which code of the model's order each one is, int32 [b, t]; None: they stand in that order.
            Needs target_positions, or nothing would say which code comes next.
          grouped: as `targets` has them: [b, t, v], with head_bits [b, t, groups, values of a group].
          train: dropout on.
          rngs: {"dropout": key}.

        Returns:
          [b, t, v], or grouped.
        """
        ids = self.layout.join(condition_bt, codes_bt)[:, :-1]
        places = jnp.arange(ids.shape[1] + 1)[None]
        if permutation_bt is not None:
            begin = self.condition.length
            before = jnp.broadcast_to(places[:, :begin], (len(permutation_bt), begin))
            places = jnp.concatenate([before, begin + permutation_bt], axis=1)
        logits, _ = GPT(self.gpt, self.dtype, self.remat).apply(
            {"params": params},
            ids,
            positions_bt=places[:, :-1],
            targets_bt=places[:, 1:],
            attend=self.attend,
            last=codes_bt.shape[1],
            train=train,
            grouped=grouped,
            rngs=rngs,
        )
        return logits

    def targets(self, codes_bt: jax.Array) -> jax.Array:
        """What grouped logits predict of codes [b, t]: themselves, or with head_bits their groups [b, t, groups]."""
        k = self.gpt.head_bits
        return split_bits(codes_bt, self.gpt.bit_groups, k) if k else codes_bt

    def place(self, params: Tree, mesh: Mesh) -> Tree:
        """Stacked parameters that stay as they are: in the compute dtype, norms in float32, sharded as in training."""
        shardings = state_shardings(jax.eval_shape(self.init, jax.random.key(0)), mesh)
        return jax.tree.map(jax.device_put, cast_weights(params, self.dtype), shardings)

    def decoder(self, split_params: Tree) -> tuple[Callable[..., Any], Callable[[int], Cache]]:
        """What the sampler is handed: `apply(ids_bt, cache, span) -> (logits of the last token [b, v], cache)` and
        `empty(batch) -> cache`. `split_params` from `gpt.split_layers`; ids are those of the vocabulary."""
        model = GPT(self.gpt, self.dtype, scan_layers=False)

        def apply(ids_bt: jax.Array, cache: Cache, span: int) -> tuple[jax.Array, Cache]:
            positions = cache.length + jnp.arange(ids_bt.shape[1])[None]
            logits, cache = model.apply(
                {"params": split_params},
                ids_bt,
                positions_bt=positions,
                attend=self.attend,
                cache=cache,
                span=span,
                last=1,
            )
            return constrain(logits[:, 0], "batch", None), cache

        length = self.condition.length + len(self.order) - 1
        return apply, lambda batch: init_cache(self.gpt, batch, length, self.dtype)

    def split(self, params: Tree, mesh: Mesh) -> Tree:
        """Stacked parameters as the sampler takes them: layers apart, in the compute dtype, sharded like the model."""
        ids = jnp.zeros((1, 2), jnp.int32)
        init = functools.partial(GPT(self.gpt, self.dtype, scan_layers=False).init, positions_bt=ids)
        shardings = state_shardings(jax.eval_shape(init, jax.random.key(0), ids)["params"], mesh)
        return jax.tree.map(jax.device_put, split_layers(params, self.dtype), shardings)

    def window_logits(
        self, split_params: Tree, condition_bt: jax.Array, window_bt: jax.Array, at: jax.Array
    ) -> jax.Array:
        """Logits [b, v] of the window's token number `at` [b], from the tokens before it; the rest may be anything, or
        absent: `window_bt` holds the window's first tokens, more than `at`."""
        ids = self.layout.join(condition_bt, window_bt)[:, :-1]
        logits, _ = GPT(self.gpt, self.dtype, scan_layers=False).apply(
            {"params": split_params},
            ids,
            positions_bt=jnp.arange(ids.shape[1])[None],
            attend=self.attend,
            at=self.condition.length - 1 + at,
        )
        return logits[:, 0]
