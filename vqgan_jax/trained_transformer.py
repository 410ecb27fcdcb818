"""A stage-2 model with its parameters and frozen stages, ready to draw pictures of any size."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vqgan_jax import parallel
from vqgan_jax.images import to_uint8
from vqgan_jax.models.strips import apply_in_strips
from vqgan_jax.sampling.large import Large, LargeSampler
from vqgan_jax.sampling.large_decoder import decode_tiles, device_budget, plan
from vqgan_jax.sampling.sampler import make_sampler
from vqgan_jax.sampling.strategies import Strategy, row_keys
from vqgan_jax.tokenizer import Tokenizer
from vqgan_jax.transformer import ImageTransformer

Tree = Any


@dataclasses.dataclass(frozen=True)
class Stages:
    """The frozen stages of a stage-2 workdir. `frozen` holds their variables by name, `digest` what identifies them."""

    first: Tokenizer
    cond: Tokenizer | None
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
        """Conditions and keys, ids of the trained grid, and pictures, each compiled once however often one samples."""
        model = self.model  # not self, whose parameters would live as long as the programs
        tokens = jax.jit(
            lambda frozen, rows, seed: (model.condition.tokens(frozen, rows), row_keys(seed, rows["index"]))
        )
        return tokens, make_sampler(model, model.config.grid), jax.jit(model.decode)

    @functools.cached_property
    def _large_sampler(self) -> Callable[..., LargeSampler]:
        """By grid, stride and parts of a batch, compiled once."""
        model = self.model
        return functools.cache(lambda grid, stride, parts: LargeSampler(model, grid, stride=stride, multiple=parts))

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
        large: Large | None = None,
    ) -> Iterator[np.ndarray]:
        """Draws picture i under condition i, `batch` at a time: uint8 [up to batch, h, w, c].

        Picture i depends on the seed and on i, not on the batch, its place in it, or the devices. One compiled shape:
        the last batch is filled up and cut. While a batch is handed over, the next is already being drawn.

        Args:
          conditions: labels, int32, one a picture; or `(indices [n]) -> batch arrays [n, ...]` as the condition needs.
          grid: height and width in codes.
          seed: of all pictures.
          batch: pictures at once; rounded up to what the mesh divides.
          strategy: how to draw.
          indices: which pictures; where None all that have a label.
          mesh: of this process's own devices (hosts sample apart); by default one copy of the model on each.
          large: how pictures beyond the trained size are made.
        """
        mesh = mesh or parallel.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}, jax.local_devices())
        rows_of = conditions if callable(conditions) else lambda chosen: {"label": conditions[chosen]}
        indices = np.arange(len(conditions)) if indices is None else np.asarray(indices)
        if tuple(grid) != self.model.config.grid:
            yield from self._large_samples(rows_of, grid, indices, seed, batch, strategy, mesh, large or Large())
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
                condition, keys = tokens(frozen, parallel.put_batch(rows, mesh, batch), seed)
                pictures = decode(frozen, draw(params, condition, keys, strategy, None))
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
        large: Large,
    ) -> Iterator[np.ndarray]:
        """`samples` of a grid beyond the trained one: the windows that run at once are spread over the mesh."""
        parts = math.prod(mesh.shape[name] for name in parallel.BATCH_AXES)
        sampler = self._large_sampler(tuple(grid), large.stride, parts)
        tokens, (params, frozen) = self._programs[0], self._placed(mesh)
        decode = None
        for start in range(0, len(indices), batch):
            chosen = np.resize(indices[start : start + batch], batch)
            rows = {"index": chosen.astype(np.int32), **rows_of(chosen)}
            with jax.set_mesh(mesh):
                condition, keys = tokens(frozen, rows, seed)
                for ids, position in sampler(params, condition, keys, strategy):
                    jax.block_until_ready(ids)  # or the bar would be at its end at once
                    large.progress(position / sampler.total)
            ids = np.asarray(ids)
            decode = decode or self._large_decoder(ids.shape, mesh, large)
            yield to_uint8(decode(ids))[: len(indices) - start]

    def _large_decoder(self, shape: tuple[int, ...], mesh: Mesh, large: Large) -> Callable[[np.ndarray], np.ndarray]:
        """Ids of this shape to images, as the memory allows."""
        first = self.model.first_stage
        variables = jax.device_put(self.frozen["first_stage"])

        def convert(variables: Tree, ids: jax.Array) -> jax.Array:
            return self.model.decode({"first_stage": variables}, ids)

        def in_strips(variables: Tree, ids: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
            ids = np.minimum(ids, first.codebook_size - 1)
            return apply_in_strips(first.model, self.frozen["first_stage"], ids, method="decode", budget=budget)

        if large.tiles:
            large.announce("decoding in overlapping tiles (approximate)")
            program = jax.jit(convert)
            return lambda ids: decode_tiles(program, variables, ids, first.factor)
        budget = large.memory or device_budget()
        chosen = plan(convert, in_strips, variables, shape, np.int32, budget=budget, mesh=mesh)
        large.announce(f"decoding {chosen}")
        return lambda ids: chosen.run(variables, ids)


def _host_pictures(pictures: jax.Array, count: int) -> np.ndarray:
    return to_uint8(np.asarray(pictures)[:count])
