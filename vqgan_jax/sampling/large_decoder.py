"""Decoding and encoding grids beyond the trained size: at once where that fits into the device's memory, else exactly
over several devices or strip by strip, or approximately in overlapping tiles. Handed functions, not models."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vqgan_jax.config import UserError
from vqgan_jax.models.strips import Peak
from vqgan_jax.parallel import compile_if_it_fits, device_bytes, shape_of

Tree = Any
Way = Literal["whole", "sharded", "strips"]
Size = tuple[int, int]
Convert = Callable[[Tree, jax.Array], jax.Array]
InStrips = Callable[[Tree, np.ndarray | jax.ShapeDtypeStruct, int], tuple[np.ndarray, Peak]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How something large is converted.

    Attributes:
      way: "whole", "sharded" over the height, or in "strips"; all exact.
      bytes: of device memory that it takes on each device, by the compiler's account.
      run: (variables, array) -> the result, on the host.
      host: bytes of the host's memory where activations wait in it, 0 where they do not.
    """

    way: Way
    bytes: int
    run: Callable[[Tree, np.ndarray], np.ndarray]
    host: int = 0

    def __str__(self) -> str:
        host = f", {max(1, self.host >> 20)} MiB of the host" if self.host else ""
        return f"{self.way} (exact, at most {max(1, self.bytes >> 20)} MiB a device{host})"


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
      in_strips: the same within a budget of bytes; returns what it took too. Of a shape it does so without running.
      variables: what `convert` takes.
      shape: of the array to convert.
      dtype: of the array.
      budget: bytes of memory of each device.
      mesh: of this process's devices.
      uncounted: bytes that it takes where the compiler's account leaves them out: on a CPU attention runs in a library
        that allocates its scores itself.

    Raises:
      UserError: a budget too small even for strips, or what waits beside them larger than the host's memory.
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
    _, peak = in_strips(variables, x, budget)
    if peak.host > (has := host_bytes()):
        takes = f"in strips activations wait in {peak.host / 2**30:.4g} GiB of the host's memory"
        raise UserError(f"{takes}, which has {has / 2**30:.4g}: a smaller picture or batch, or convert in tiles")
    return Plan("strips", peak.device, lambda variables, x: in_strips(variables, np.asarray(x), budget)[0], peak.host)


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


def spread(convert: Convert, variables: Tree, mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """The conversion of batches that divide over all devices of the mesh, each of which takes its part."""
    everywhere, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))
    program = jax.jit(convert, in_shardings=(everywhere, parts), out_shardings=parts)
    return functools.partial(program, jax.device_put(variables, everywhere))


def decode_tiles(
    decode: Callable[[np.ndarray], jax.Array], ids: np.ndarray, factor: int, *, tile: Size, overlap: Size, together: int
) -> np.ndarray:
    """Decodes overlapping tiles by themselves and blends them: fast, and approximate, for each tile's norms and
    attention see that tile alone.

    Args:
      decode: ids int32 [together * b, h, w] -> images float32 [together * b, factor * h, factor * w, c].
      ids: int32 [b, h, w], any size.
      factor: pixels a code.
      tile: height and width in codes.
      overlap: codes that neighbours share at least, below and beside each other, over which one fades into the other.
      together: tiles that are decoded as one batch.

    Returns:
      float32 [b, factor * h, factor * w, c].
    """
    b, *grid = ids.shape
    starts, sizes = _tiling(grid, tile, overlap)
    ramps = [_ramps(*axis, factor) for axis in zip(starts, grid, sizes, strict=True)]
    image = None
    for (top, left), piece in _convert_tiles(decode, ids, starts, sizes, 1, together):
        if image is None:
            image = np.zeros((b, *(factor * n for n in grid), piece.shape[-1]), np.float32)
        rows, columns = (slice(factor * x, factor * (x + s)) for x, s in zip((top, left), sizes, strict=True))
        image[:, rows, columns] += piece * (ramps[0][top][:, None] * ramps[1][left])[..., None]
    return image


def encode_tiles(
    encode: Callable[[np.ndarray], jax.Array], x: np.ndarray, factor: int, *, tile: Size, overlap: Size, together: int
) -> np.ndarray:
    """Encodes overlapping tiles by themselves, each the codes up to the middle of what it shares with its neighbours:
    approximate as `decode_tiles`.

    Args:
      encode: [together * b, h, w, ...] -> ids int32 [together * b, h / factor, w / factor].
      x: [b, h, w, ...], any size that `factor` divides.
      factor: pixels a code.
      tile: height and width in codes.
      overlap: codes that neighbours share at least, below and beside each other.
      together: tiles that are encoded as one batch.

    Returns:
      int32 [b, h / factor, w / factor].
    """
    grid = [n // factor for n in x.shape[1:3]]
    starts, sizes = _tiling(grid, tile, overlap)
    first = [_middles(*axis) for axis in zip(starts, sizes, strict=True)]
    ids = np.zeros((x.shape[0], *grid), np.int32)
    for (top, left), piece in _convert_tiles(encode, x, starts, sizes, factor, together):
        row, column = first[0][top], first[1][left]
        ids[:, row : top + sizes[0], column : left + sizes[1]] = piece[:, row - top :, column - left :]
    return ids


def _tiling(grid: Sequence[int], tile: Size, overlap: Size) -> tuple[list[list[int]], list[int]]:
    """The starts of tiles along both axes, and their sizes."""
    sizes = [min(n, size) for n, size in zip(grid, tile, strict=True)]
    return [_tile_starts(*axis) for axis in zip(grid, sizes, overlap, strict=True)], sizes


def _convert_tiles(
    convert: Callable[[np.ndarray], jax.Array],
    x: np.ndarray,
    starts: list[list[int]],
    sizes: list[int],
    scale: int,
    together: int,
) -> Iterator[tuple[Size, np.ndarray]]:
    """Tops and lefts of tiles, and what is made of them; the last batch is filled up with repeats."""
    places = list(itertools.product(*starts))
    for begin in range(0, len(places), together):
        some = places[begin : begin + together]
        filled = [some[k % len(some)] for k in range(together)]
        cut = [[slice(scale * n, scale * (n + s)) for n, s in zip(place, sizes, strict=True)] for place in filled]
        made = np.asarray(convert(np.concatenate([x[:, rows, columns] for rows, columns in cut])))
        yield from zip(some, np.split(made, together), strict=False)


def _middles(starts: list[int], size: int) -> dict[int, int]:
    """Where the tile of each start takes over from the one before it."""
    return {0: 0} | {start: (before + size + start) // 2 for before, start in itertools.pairwise(starts)}


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


def _ramps(starts: list[int], n: int, size: int, factor: int) -> dict[int, np.ndarray]:
    """The weight of the tile of each start along one axis, in pixels: together 1 everywhere, falling towards a tile's
    ends."""
    pixels = np.arange(factor * size)
    hat = np.minimum(pixels + 1, factor * size - pixels).astype(np.float32)
    total = np.zeros(factor * n, np.float32)
    for start in starts:
        total[factor * start : factor * (start + size)] += hat
    return {start: hat / total[factor * start : factor * (start + size)] for start in starts}


def device_budget(share: float = 0.8) -> int:
    """Bytes of memory that a conversion may use on each device: a share of it, or of the machine's on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int((stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * share)
    return int(host_bytes() * share / jax.local_device_count() / 2)


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
