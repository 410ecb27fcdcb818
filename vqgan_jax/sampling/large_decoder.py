"""Decoding and encoding grids beyond the trained size: at once where that fits into the device's memory, else exactly
over several devices or strip by strip, or approximately in overlapping tiles. Handed functions, not models."""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vqgan_jax.parallel import compile_if_it_fits, device_bytes, shape_of

Tree = Any
Way = Literal["whole", "sharded", "strips", "tiles"]
Convert = Callable[[Tree, jax.Array], jax.Array]
InStrips = Callable[[Tree, np.ndarray, int], tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How something large is converted.

    Attributes:
      way: "whole", "sharded" over the height, "strips", or the approximate "tiles".
      bytes: of device memory that it takes on each device, by the compiler's account; of strips the budget.
      run: (variables, array) -> the result, on the host.
    """

    way: Way
    bytes: int
    run: Callable[[Tree, np.ndarray], np.ndarray]

    def __str__(self) -> str:
        exact = "approximate" if self.way == "tiles" else "exact"
        return f"{self.way} ({exact}, at most {max(1, self.bytes >> 20)} MiB a device)"


def plan(
    convert: Convert,
    in_strips: InStrips,
    variables: Tree,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    budget: int,
    mesh: Mesh,
    uncounted: int = 0,
) -> Plan:
    """Chooses the first exact way that fits: whole, sharded over as many devices of the mesh as divide the rows, strip
    by strip.

    Args:
      convert: decodes ids [b, h, w], or encodes images [b, h, w, c].
      in_strips: the same within a budget of bytes; returns what it took too.
      variables: what `convert` takes.
      shape: of the array to convert.
      dtype: of the array.
      budget: bytes of memory of each device.
      mesh: of this process's devices.
      uncounted: bytes that it takes where the compiler's account leaves them out: on a CPU attention runs in a library
        that allocates its scores itself.
    """
    if jax.default_backend() != "cpu":
        uncounted = 0
    x, abstract = jax.ShapeDtypeStruct(shape, dtype), jax.tree.map(shape_of, variables)
    compiled = compile_if_it_fits(jax.jit(convert).lower(abstract, x))
    if compiled and (used := device_bytes(compiled) + uncounted) <= budget:
        return Plan("whole", used, lambda variables, x: np.asarray(compiled(variables, x)))
    rows = shape[1], jax.eval_shape(convert, abstract, x).shape[1]
    parts = max(n for n in range(1, mesh.size + 1) if math.gcd(*rows) % n == 0)
    if parts > 1:
        some = mesh if parts == mesh.size else Mesh(mesh.devices.ravel()[:parts], "data")
        sharded, used = compile_sharded(convert, abstract, x, some)
        if sharded and (used := used + uncounted // parts) <= budget:
            return Plan("sharded", used, sharded)
    return Plan("strips", budget, lambda variables, x: in_strips(variables, np.asarray(x), budget)[0])


def compile_sharded(
    convert: Convert, variables: Tree, x: jax.ShapeDtypeStruct, mesh: Mesh
) -> tuple[Callable[[Tree, np.ndarray], np.ndarray] | None, int]:
    """The conversion with the height cut over all devices of the mesh: XLA exchanges the rows that convolutions need
    from their neighbours, and sums GroupNorm's statistics over all.

    Args:
      convert: as in `plan`.
      variables: their shapes.
      x: its shape, [b, h, ...] with h, and that of the result, divisible by the devices.
      mesh: of this process's devices.

    Returns:
      the function, or None where the compiler refuses it, and bytes of memory on each device.
    """
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, mesh.axis_names))
    lowered = jax.jit(convert, in_shardings=(whole, rows), out_shardings=rows).lower(variables, x)
    compiled = compile_if_it_fits(lowered)
    if compiled is None:
        return None, 0

    def run(variables: Tree, x: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(jax.device_put(variables, whole), jax.device_put(x, rows)))

    return run, device_bytes(compiled)


def decode_tiles(
    decode: Convert, variables: Tree, ids: np.ndarray, factor: int, *, tile: int, overlap: int
) -> np.ndarray:
    """Decodes overlapping tiles by themselves and blends them: fast, and approximate, for each tile's norms and
    attention see that tile alone.

    Args:
      decode: (variables, ids int32 [b, h, w]) -> images float32 [b, factor * h, factor * w, c], jitted.
      variables: what it takes.
      ids: int32 [b, h, w], any size.
      factor: pixels a code.
      tile: codes a side.
      overlap: codes that neighbours share at least, over which one fades into the other.

    Returns:
      float32 [b, factor * h, factor * w, c].
    """
    b, height, width = ids.shape
    sizes = min(tile, height), min(tile, width)
    tops, lefts = (_tile_starts(n, size, overlap) for n, size in zip((height, width), sizes, strict=True))
    ramps = [
        _ramps(starts, n, size, factor) for starts, n, size in zip((tops, lefts), (height, width), sizes, strict=True)
    ]
    image = None
    for top, down in zip(tops, ramps[0], strict=True):
        for left, across in zip(lefts, ramps[1], strict=True):
            piece = np.asarray(decode(variables, ids[:, top : top + sizes[0], left : left + sizes[1]]))
            if image is None:
                image = np.zeros((b, factor * height, factor * width, piece.shape[-1]), np.float32)
            rows, columns = (slice(factor * x, factor * (x + s)) for x, s in zip((top, left), sizes, strict=True))
            image[:, rows, columns] += piece * (down[:, None] * across)[..., None]
    return image


def encode_tiles(
    encode: Convert, variables: Tree, x: np.ndarray, factor: int, *, tile: int, overlap: int
) -> np.ndarray:
    """Encodes overlapping tiles by themselves, each the codes up to the middle of what it shares with its neighbours:
    approximate as `decode_tiles`.

    Args:
      encode: (variables, [b, h, w, ...]) -> ids int32 [b, h / factor, w / factor], jitted.
      variables: what it takes.
      x: [b, h, w, ...], any size that `factor` divides.
      factor: pixels a code.
      tile: codes a side.
      overlap: codes that neighbours share at least.

    Returns:
      int32 [b, h / factor, w / factor].
    """
    b, height, width = x.shape[0], x.shape[1] // factor, x.shape[2] // factor
    sizes = min(tile, height), min(tile, width)
    tops, lefts = (_tile_starts(n, size, overlap) for n, size in zip((height, width), sizes, strict=True))
    ids = np.zeros((b, height, width), np.int32)
    for top, from_row in zip(tops, _middles(tops, sizes[0]), strict=True):
        for left, from_column in zip(lefts, _middles(lefts, sizes[1]), strict=True):
            rows, columns = (slice(factor * n, factor * (n + s)) for n, s in zip((top, left), sizes, strict=True))
            piece = np.asarray(encode(variables, x[:, rows, columns]))
            ids[:, from_row : top + sizes[0], from_column : left + sizes[1]] = piece[
                :, from_row - top :, from_column - left :
            ]
    return ids


def _middles(starts: list[int], size: int) -> list[int]:
    """Where each tile takes over from the one before it."""
    return [0, *((before + size + start) // 2 for before, start in itertools.pairwise(starts))]


def decode_begun(decode: Callable[[np.ndarray], np.ndarray], ids: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Pictures of which not all codes are drawn; what is missing is grey.

    Args:
      decode: ids int32 [b, h, w] to images float32 [b, factor * h, factor * w, c].
      ids: int32 [b, h, w], anything where they are not drawn.
      drawn: bool [h, w], somewhere True.

    Returns:
      float32 [b, factor * h, factor * w, c].
    """
    ids = np.array(ids)
    # The decoder's norms see the whole picture: what is missing looks like what there is.
    ids[:, ~drawn] = ids[:, drawn][:, np.arange((~drawn).sum()) % drawn.sum()]
    made = decode(ids)
    factor = made.shape[1] // ids.shape[1]
    return np.where(drawn.repeat(factor, 0).repeat(factor, 1)[None, :, :, None], made, 0)


def _tile_starts(n: int, size: int, overlap: int) -> list[int]:
    """Starts of as few tiles as cover n with the overlap, spread evenly."""
    count = max(1, math.ceil((n - overlap) / max(1, size - overlap)))
    return [round(k * (n - size) / max(1, count - 1)) for k in range(count)]


def _ramps(starts: list[int], n: int, size: int, factor: int) -> list[np.ndarray]:
    """The weight of each tile along one axis, in pixels: together 1 everywhere, falling towards a tile's ends."""
    pixels = np.arange(factor * size)
    hat = np.minimum(pixels + 1, factor * size - pixels).astype(np.float32)
    total = np.zeros(factor * n, np.float32)
    for start in starts:
        total[factor * start : factor * (start + size)] += hat
    return [hat / total[factor * start : factor * (start + size)] for start in starts]


def device_budget(share: float = 0.8) -> int:
    """Bytes of memory that a conversion may use on each device: a share of it, or of the machine's on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * share)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * share / jax.local_device_count() / 2)
