"""Grids beyond the trained one for a stage-2 model, a part at a time: with progress, and able to go on after a stop."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.sampling.blocks import Blocks, fill_window
from vqgan_jax.sampling.job import SampleFolder
from vqgan_jax.sampling.sliding import Given, Wavefront, WindowLogits, advance
from vqgan_jax.sampling.strategies import Strategy, interleave
from vqgan_jax.transformer import ImageTransformer


@dataclasses.dataclass(frozen=True)
class LargeOptions:
    """How pictures beyond the trained size are made.

    Attributes:
      stride: of block windows in codes, see `blocks`; 0 for the exact window.
      memory: bytes of each device for encoding, decoding and the block windows that run at once; 0 for what there is.
      tiles: encode and decode in overlapping tiles of the trained size, approximate.
      folder: keeps what is drawn of a picture, so that a job that was stopped goes on in its midst; None: nowhere.
      every: the folder gets the picture as it is after so many more rows of codes; 0: not.
      finish: (index, uint8 picture) -> as it is written, for the pictures of `every`.
      begun: called with the share of a batch that the folder held.
      progress: called with the share of a batch that is done.
      announce: called with a line that says how conditions are encoded and pictures decoded, or that windows wait.
    """

    stride: int = 0
    memory: int = 0
    tiles: bool = False
    folder: SampleFolder | None = None
    every: int = 0
    finish: Callable[[int, np.ndarray], np.ndarray] = lambda index, picture: picture
    begun: Callable[[float], None] = lambda share: None
    progress: Callable[[float], None] = lambda share: None
    announce: Callable[[str], None] = lambda line: None


_SHAPES = 4  # in which block windows of a kind run: more leave fewer to draw twice and take longer to compile


def _up_to(n: int, step: int) -> int:
    """The next multiple."""
    return -(-n // step) * step


def centre_of(model: ImageTransformer) -> str:
    """Where the exact window has its centre, see `sliding.window_start`: the reference has layouts' apart."""
    return "lower" if "boxes" in model.condition.keys else "upper"


def window_logits(
    model: ImageTransformer, params: Any, condition: jax.Array, grid: tuple[int, int], strategy: Strategy
) -> WindowLogits:
    """What `sliding.advance` is handed: the model's logits of windows [s, b, length] of b pictures.

    Args:
      model: the stage-2 model.
      params: split.
      condition: local ids of whole pictures, int32 [b, t].
      grid: of the whole pictures.
      strategy: whether both passes are asked for.
    """

    def logits(windows: jax.Array, top: jax.Array, left: jax.Array, at: jax.Array) -> jax.Array:
        s, b, length = windows.shape
        conditions = _cut(model, condition, grid, top, left).reshape(s * b, -1)
        windows = windows.reshape(s * b, length)
        at = jnp.repeat(at, b)
        if strategy.guided:
            conditions = interleave(conditions, model.null_condition)
            windows, at = interleave(windows, windows), jnp.repeat(at, 2)
        return model.window_logits(params, conditions, windows, at).reshape(s, -1, model.layout.head_size)

    return logits


def _cut(
    model: ImageTransformer, condition: jax.Array, grid: tuple[int, int], top: jax.Array, left: jax.Array
) -> jax.Array:
    """Conditions of windows [s, b, t]."""
    return jax.vmap(lambda t, u: model.condition.window(condition, grid, t, u, model.config.grid))(top, left)


def windows_at_once(model: ImageTransformer, rows: int, budget: int) -> int:
    """How many block windows a budget of bytes has room for, at least one: of each a cache, which a loop may copy, and
    a layer's scores and hidden activations while it is begun.

    Args:
      model: the stage-2 model.
      rows: of a window: the pictures that are drawn together, twice with guidance.
      budget: bytes.
    """
    cache = jax.eval_shape(lambda: model.decoder({})[1](1))
    length, gpt = cache.keys[0].shape[1], model.gpt
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return max(1, budget // (rows * (2 * kept + 4 * length * (gpt.heads * length + gpt.hidden))))


class LargeSampler:
    """Draws pictures of one grid beyond the trained one: exactly with a window a token, or block by block.

    Attributes:
      total: positions from start to end.
      tokens: tokens of one picture.
      together: windows of one picture that may run at once.
    """

    def __init__(
        self,
        model: ImageTransformer,
        grid: tuple[int, int],
        *,
        centre: str = "",
        serial: bool = False,
        stride: int = 0,
        parts: int = 1,
        batch: int = 1,
        steps: int = 64,
    ):
        """Plans it.

        Args:
          model: the stage-2 model.
          grid: height and width in codes.
          centre: of the exact window, see `sliding.window_start`; by default that of `centre_of`.
          serial: of the exact window: one token after the other, as the reference; the same tokens, slowly.
          stride: 0 for the exact window; else codes by which block windows advance, see `blocks`.
          parts: of the mesh, over which the windows that run together are spread: filled up so that they divide.
          batch: pictures that are drawn together.
          steps: of the exact window in a part: enough to hide the call, few enough for a bar.

        Raises:
          UserError: a grid below the trained one, a stride that does not fit, or an order that is not raster.
        """
        if model.config.order != "row_major":
            raise UserError(
                f"the sliding window needs tokens in row-major order, this model's is '{model.config.order}'"
            )
        self.model, self.grid, self._most = model, grid, steps
        self._multiple = parts // math.gcd(parts, batch)
        self.tokens = grid[0] * grid[1]
        centre = centre or centre_of(model)
        self._blocks = Blocks(grid, model.config.grid, stride) if stride else None
        self._wavefront = None if stride else Wavefront(grid, model.config.grid, centre, serial, self._multiple)
        self._longest: dict[tuple[int, int], int] = {}  # of the batches of block windows, by where their blocks start
        batches = list(self._blocks.batches()) if stride else []
        for windows, block in batches:
            self._longest[block] = max(len(windows), self._longest.get(block, 0))
        self.total = len(batches) if stride else self._wavefront.steps
        self.together = max(self._longest.values()) if stride else self._wavefront.slots

    def drawn(self, position: int) -> np.ndarray:
        """Which tokens there are at a position: bool [H, W]."""
        return (self._wavefront or self._blocks).drawn(position)

    def share(self, position: int) -> float:
        """Of the work that is done at a position."""
        return position / self.total if self._wavefront else float(self.drawn(position).mean())

    def rows(self, position: int) -> int:
        """Rows that are drawn to their ends at a position."""
        return int(self.drawn(position).all(1).cumprod().sum())

    def whole(
        self, params: Any, condition: jax.Array, keys: jax.Array, strategy: Strategy, given: Given | None = None
    ) -> jax.Array:
        """Every token at once, int32 [b, H, W]; arguments as of `__call__`."""
        for ids, _ in self(params, condition, keys, strategy, given):  # noqa: B007  the last counts
            pass
        return ids

    def __call__(
        self,
        params: Any,
        condition: jax.Array,
        keys: jax.Array,
        strategy: Strategy,
        given: Given | None = None,
        *,
        begun: tuple[jax.Array, int] | None = None,
        most: int = 0,
    ) -> Iterator[tuple[jax.Array, int]]:
        """Yields the ids int32 [b, H, W] after each part, valid until the next is asked for, and the position reached.

        Args:
          params: split.
          condition: local ids of the whole pictures, int32 [b, t].
          keys: one a picture [b].
          strategy: how to draw.
          given: (ids, mask), both [b, H, W].
          begun: what was yielded where an earlier run stopped.
          most: block windows of a picture that are drawn at once; 0: all that do not see each other.
        """
        ids, position = begun or (jnp.zeros((keys.shape[0], *self.grid), jnp.int32), 0)
        run = self._advance if self._wavefront else functools.partial(self._fill_all, most)
        for last, part in self._parts():
            if last > position:
                ids = run(params, condition, keys, strategy, given, ids, *part)
                yield ids, last

    def programs(self) -> dict[Any, list[int]]:
        """Parts that cost the same: where each begins, by what its program is compiled for and how long it runs."""
        found, position = {}, 0
        for last, part in self._parts():
            kind = (part[1] - part[0], part[2]) if self._wavefront else part[1:]
            found.setdefault(kind, []).append(position)
            position = last
        return found

    def _parts(self) -> Iterator[tuple[int, tuple]]:
        return self._steps() if self._wavefront else self._windows()

    def _steps(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Parts of the wavefront: where they end, and what `_advance` takes."""
        for first, last, length in self._wavefront.segments(self._most):
            yield last, (first, last, length)

    @functools.cached_property
    def _advance(self) -> Any:
        def run(params, condition, keys, strategy, given, ids, first, last, length):
            logits = window_logits(self.model, params, condition, self.grid, strategy)
            return advance(self._wavefront, logits, ids, keys, strategy, first, last, length, given)

        return jax.jit(run, static_argnums=8, donate_argnums=5)

    def _windows(self) -> Iterator[tuple[int, tuple[np.ndarray, int, tuple[int, int]]]]:
        """Batches of block windows: how many there were by then, their tops and lefts [n, 2], how many they are filled
        up to, so that few shapes are compiled and few windows drawn twice, and where their blocks start."""
        for number, (windows, block) in enumerate(self._blocks.batches(), 1):
            longest = self._longest[block]
            count = min(_up_to(len(windows), -(-longest // _SHAPES)), longest)
            yield number, (np.asarray(windows, np.int32), _up_to(count, self._multiple), block)

    def _fill_all(
        self,
        most: int,
        params: Any,
        condition: jax.Array,
        keys: jax.Array,
        strategy: Strategy,
        given: Given | None,
        ids: jax.Array,
        windows: np.ndarray,
        count: int,
        block: tuple[int, int],
    ) -> jax.Array:
        """A batch of block windows, `most` at once; what fills it up repeats windows, which draw the same again."""
        most = max(most // self._multiple, 1) * self._multiple if most else count
        size = min(most, count)
        for start in range(0, len(windows), size):
            top, left = np.resize(windows[start : start + size], (size, 2)).T
            ids = self._fill(params, condition, keys, strategy, given, ids, top, left, block)
        return ids

    @functools.cached_property
    def _fill(self) -> Any:
        model, (height, width), (h, w) = self.model, self.grid, self.model.config.grid

        def cut(x: jax.Array, top: jax.Array, left: jax.Array) -> jax.Array:
            """Windows [s, b, h, w] of [b, H, W]."""
            return jax.vmap(lambda t, u: jax.lax.dynamic_slice(x, (0, t, u), (x.shape[0], h, w)))(top, left)

        def run(params, condition, keys, strategy, given, ids, top, left, block):
            s, b = top.shape[0], ids.shape[0]
            apply, empty = model.decoder(params)
            flat = lambda x: x.reshape(s * b, *x.shape[2:])  # noqa: E731
            numbers = jnp.arange(height * width).reshape(1, height, width)
            numbers = jnp.broadcast_to(cut(numbers, top, left), (s, b, h, w))
            windows = fill_window(
                apply,
                empty,
                model.layout.condition(flat(_cut(model, condition, self.grid, top, left))),
                flat(cut(ids, top, left)),
                block,
                jnp.tile(keys, s),
                flat(numbers),
                height * width,
                strategy,
                given and tuple(flat(cut(x, top, left)) for x in given),
                null_bt=model.layout.condition(model.null_condition) if strategy.guided else None,
            ).reshape(s, b, h, w)
            rows, columns = top[:, None] + jnp.arange(block[0], h), left[:, None] + jnp.arange(block[1], w)
            drawn = windows[:, :, block[0] :, block[1] :].swapaxes(0, 1)  # [b, s, rows, columns]
            return ids.at[:, rows[:, :, None], columns[:, None, :]].set(drawn)

        return jax.jit(run, static_argnums=8, donate_argnums=5)
