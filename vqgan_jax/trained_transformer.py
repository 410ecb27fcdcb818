"""A stage-2 model with its parameters and frozen stages, ready to draw pictures of any size."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqgan_jax import parallel
from vqgan_jax.conditioning import EncodedImage
from vqgan_jax.images import to_uint8
from vqgan_jax.models.strips import Peak, apply_in_strips
from vqgan_jax.models.vqgan import model_input
from vqgan_jax.sampling.large import LargeOptions, LargeSampler, windows_at_once
from vqgan_jax.sampling.large_decoder import decode_begun, decode_tiles, device_budget, encode_tiles, plan, spread
from vqgan_jax.sampling.sampler import make_sampler
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ImageTransformer

Tree = Any
Rows = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The frozen stages of a stage-2 workdir: the VQGAN of its codes, those of conditions by their input_key, their
    variables by name in `frozen`, and in `digest` what identifies each by its folder."""

    first: Tokenizer
    cond: Mapping[str, Tokenizer]
    frozen: Tree
    digest: dict[str, str]


@dataclasses.dataclass(frozen=True)
class TrainedTransformer:
    """A stage-2 workdir, open: the model, its parameters as trained, and its frozen stages."""

    model: ImageTransformer
    params: Tree
    frozen: Tree
    stages: Stages
    record: dict[str, Any]

    @functools.cached_property
    def _programs(self) -> tuple[Any, ...]:
        """Conditions, keys and given codes, ids of the trained grid, and pictures, each compiled once however often one
        samples."""
        model = self.model  # not self, whose parameters would live as long as the programs

        def tokens(frozen: Tree, rows: Rows, seed: int, whole: bool = False) -> tuple[Any, ...]:
            condition = model.condition.whole if whole else model.condition.tokens
            return condition(frozen, rows), row_keys(seed, rows["index"]), model.given(frozen, rows)

        return jax.jit(tokens, static_argnames="whole"), make_sampler(model, model.config.grid), jax.jit(model.decode)

    @functools.cached_property
    def _large_sampler(self) -> Callable[..., LargeSampler]:
        """By grid and how windows run, compiled once."""
        return functools.cache(functools.partial(LargeSampler, self.model))

    @functools.cached_property
    def _placed(self) -> Callable[[Mesh], tuple[Tree, Tree]]:
        """By mesh: the sampler's parameters and the frozen variables."""
        return functools.cache(lambda mesh: (self.model.split(self.params, mesh), parallel.put_tree(self.frozen, mesh)))

    def with_params(self, params: Tree) -> "TrainedTransformer":
        """The same model with other parameters (as trained); what is compiled stays."""
        other = dataclasses.replace(self, params=params)
        for name in ("_programs", "_large_sampler"):
            other.__dict__[name] = getattr(self, name)
        return other

    @property
    def checkpoint(self) -> int | str | None:
        """What tells it from other checkpoints of its place: its step, or the hash of the file it was imported from."""
        imported = self.record.get("imported")
        return imported["sha256"] if imported else self.record.get("step")

    def samples(
        self,
        conditions: np.ndarray | Callable[[np.ndarray], Mapping[str, np.ndarray]],
        grid: tuple[int, int],
        *,
        seed: int,
        batch: int,
        strategy: Strategy,
        indices: np.ndarray | None = None,
        mesh: Mesh | None = None,
        large: LargeOptions | None = None,
        leading: int = 0,
    ) -> Iterator[np.ndarray]:
        """Draws picture i under condition i, `batch` at a time: uint8 [up to batch, h, w, c].

        Picture i depends on the seed and on i, not on the batch, its place in it, or the devices. One compiled shape:
        the last batch is filled up and cut. While a batch is handed over, the next is already being drawn.

        Args:
          conditions: labels, int32, one a picture; or `(indices [n]) -> batch arrays [n, ...]` as the condition needs,
            with `image` and `given` where part of a picture is given: its codes are kept.
          grid: height and width in codes.
          seed: of all pictures.
          batch: pictures at once; rounded up to what the mesh divides.
          strategy: how to draw.
          indices: which pictures; where None all that have a label.
          mesh: of this process's own devices (hosts sample apart); by default one copy of the model on each.
          large: how pictures beyond the trained size are made.
          leading: first codes that are given in every picture, from `leading_given`: prefilled at once.
        """
        mesh = mesh or parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
        rows_of = conditions if callable(conditions) else lambda chosen: {"label": conditions[chosen]}
        indices = np.arange(len(conditions)) if indices is None else np.asarray(indices)
        if tuple(grid) != self.model.config.grid:
            yield from self._large_samples(rows_of, grid, indices, seed, batch, strategy, mesh, large or LargeOptions())
            return
        parts = math.prod(mesh.shape[name] for name in parallel.BATCH_AXES)
        batch = -(-batch // parts) * parts
        tokens, draw, decode = self._programs
        params, frozen = self._placed(mesh)
        waiting: list[tuple[jax.Array, int]] = []
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            filled = np.resize(chosen, batch)
            rows = {"index": filled.astype(np.int32), **rows_of(filled)}
            with jax.set_mesh(mesh):
                condition, keys, given = tokens(frozen, parallel.put_batch(rows, mesh, batch), seed)
                settings = {"leading": leading} if leading else {}
                pictures = decode(frozen, draw(params, condition, keys, strategy, given, **settings))
            waiting.append((pictures, len(chosen)))
            if len(waiting) > 1:
                yield _host_pictures(*waiting.pop(0))
        for pictures, count in waiting:
            yield _host_pictures(pictures, count)

    def _large_samples(
        self,
        rows_of: Callable[[np.ndarray], Mapping[str, np.ndarray]],
        grid: tuple[int, int],
        indices: np.ndarray,
        seed: int,
        batch: int,
        strategy: Strategy,
        mesh: Mesh,
        large: LargeOptions,
    ) -> Iterator[np.ndarray]:
        """`samples` of a grid beyond the trained one: the windows that run at once are spread over the mesh."""
        if not len(indices):
            return
        parts = math.prod(mesh.shape[name] for name in parallel.BATCH_AXES)
        sampler, most = self._large_sampler(tuple(grid), stride=large.stride, parts=parts, batch=batch), 0
        if large.stride:
            budget = parts * (large.memory or device_budget())
            most = windows_at_once(self.model, batch * (2 if strategy.guided else 1), budget)
            if most < sampler.together:
                large.announce(f"drawing {most} of {sampler.together} windows at once, as the memory allows")
        tokens, (params, frozen) = self._programs[0], self._placed(mesh)
        encode, decode = self._large_encoder(mesh, large), self._large_decoder((batch, *grid), mesh, large)
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            filled = np.resize(chosen, batch)
            rows = {"index": filled.astype(np.int32), **rows_of(filled)}
            rows |= encode(rows)
            begun = large.folder.begun(filled) if large.folder else None
            ids, position = begun or (None, 0)
            shown = sampler.rows(position)
            large.begun(sampler.share(position))
            with jax.set_mesh(mesh):
                condition, keys, given = tokens(frozen, rows, seed, whole=True)
                for ids, position in sampler(params, condition, keys, strategy, given, begun=begun, most=most):
                    jax.block_until_ready(ids)  # or the bar would be at its end at once
                    large.progress(sampler.share(position))
                    if large.folder:
                        large.folder.keep(chosen, ids, position)
                    if large.every and sampler.rows(position) >= shown + large.every and position < sampler.total:
                        shown = sampler.rows(position)
                        pictures = to_uint8(decode_begun(decode, np.asarray(ids), sampler.drawn(position)))
                        large.folder.show(chosen, list(map(large.finish, chosen, pictures)), shown)
            yield to_uint8(decode(np.asarray(ids)))[: len(chosen)]

    def _large_encoder(self, mesh: Mesh, large: LargeOptions) -> Callable[[Rows], Rows]:
        """Of batches of larger pictures the codes of what is encoded: the conditions' pictures, and images that are
        given in part. As the memory allows; by the keys of cached codes."""
        parts = [part for part in self.model.condition.parts if isinstance(part, EncodedImage)]
        stages = {part.codes_key: (part.stage, part.frozen_name) for part in parts}
        stages["codes/image"] = self.model.first_stage, "first_stage"
        encoders: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

        def encode(rows: Rows) -> Rows:
            codes = {}
            for key, (tokenizer, name) in stages.items():
                x = rows.get(tokenizer.config.input_key)
                if x is None or key in rows or (name == "first_stage" and "given" not in rows):
                    continue
                if key not in encoders:
                    encoders[key] = self._convert_large("encode", tokenizer, name, x.shape, x.dtype, mesh, large)
                codes[key] = encoders[key](x)
            return codes

        return encode

    def _large_decoder(
        self, shape: tuple[int, ...], mesh: Mesh, large: LargeOptions
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Ids of this shape to images, as the memory allows."""
        return self._convert_large("decode", self.model.first_stage, "first_stage", shape, np.int32, mesh, large)

    def _convert_large(
        self,
        method: Literal["encode", "decode"],
        tokenizer: Tokenizer,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        mesh: Mesh,
        large: LargeOptions,
    ) -> Callable[[np.ndarray], np.ndarray]:
        """A method of the stage of this name, for batch arrays or ids of this shape, exactly as the memory allows, or
        in tiles of the trained size."""
        config = tokenizer.config
        doing = "decoding" if method == "decode" else f"encoding {config.input_key}"

        def prepared(x: Any) -> Any:
            if method == "encode":
                return model_input(config, {config.input_key: x})
            return jnp.minimum(x, tokenizer.codebook_size - 1)

        def convert(variables: Tree, x: jax.Array) -> jax.Array:
            return getattr(tokenizer, method)(variables, prepared(x))

        if large.tiles:
            large.announce(f"{doing} in overlapping tiles (approximate)")
            tile = self.model.config.grid
            return functools.partial(
                decode_tiles if method == "decode" else encode_tiles,
                spread(convert, self.frozen[name], mesh),
                factor=tokenizer.factor,
                tile=tile,
                overlap=tuple(n // 2 for n in tile),
                together=mesh.size,
            )

        def in_strips(variables: Tree, x: np.ndarray | jax.ShapeDtypeStruct, budget: int) -> tuple[np.ndarray, Peak]:
            planning = isinstance(x, jax.ShapeDtypeStruct)
            x = jax.eval_shape(prepared, x) if planning else np.asarray(prepared(x))
            return apply_in_strips(tokenizer.model, variables, x, method=method, budget=budget)

        variables, budget = self.frozen[name], large.memory or device_budget()
        scale = config.factor if method == "encode" else 1
        scores = config.autoencoder.score_bytes(shape[0], shape[1] // scale, shape[2] // scale)
        chosen = plan(convert, in_strips, variables, shape, dtype, budget=budget, mesh=mesh, uncounted=scores)
        large.announce(f"{doing} {chosen}")
        return lambda x: chosen.run(variables, x)


def _host_pictures(pictures: jax.Array, count: int) -> np.ndarray:
    return to_uint8(np.asarray(pictures)[:count])
