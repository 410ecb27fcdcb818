"""Pictures larger than the device's memory: the autoencoder's own layers, one after the other, strip by strip.

`apply_in_strips` runs a method of a VQGAN with whole activations on the host and strips of rows on the device. The
result is that of the plain model, for each layer sees what it would see: a convolution the rows beyond its strip,
GroupNorm the statistics of the whole picture (in two passes), attention all keys. Only the order of sums differs. Of a
shape alone it tells what that will take.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vqgan_jax.config import UserError
from vqgan_jax.models import layers, quantizers
from vqgan_jax.models.vqgan import VQGAN
from vqgan_jax.parallel import compile_if_it_fits, device_bytes, shape_of

Params = Mapping[str, Any]
Array = np.ndarray
_COPIES = 3  # of a strip's input and output that a layer's program holds, at a first guess


@dataclasses.dataclass
class Peak:
    """The most bytes at once.

    Attributes:
      device: what a program takes, by the compiler's account; never above the budget.
      host: the activations that a program reads and makes.
    """

    device: int = 0
    host: int = 0


class Strips:
    """Runs programs over strips of rows within a budget of device memory.

    Attributes:
      peak: of what was run, or planned, so far.
    """

    def __init__(self, budget: int, planning: bool = False):
        """`planning`: programs are compiled, but not run; arrays are stand-ins."""
        self.budget, self.planning, self.peak = budget, planning, Peak()

    def sweep(
        self,
        program: Callable[..., Any],
        inputs: tuple[Array, ...],
        consts: Any = None,
        *,
        unit: tuple[int, int] = (1, 1),
        halo: tuple[int, int] = (0, 0),
        unit_bytes: int,
    ) -> Array:
        """Runs `program(consts, inside, *strips)` over all rows; [b, h', ...].

        Args:
          program: jitted; `inside` bool [rows] says which rows of the strips lie in the picture (beyond it stand
            zeros). Its first axes are batch and rows.
          inputs: arrays [b, h, w, c] of one height.
          consts: what every call gets.
          unit: rows that go in and come out together.
          halo: rows beyond the strip, before and after, that go in too.
          unit_bytes: of input, output and workspace a unit, at a first guess.

        Raises:
          UserError: not even one unit fits into the budget.
        """
        units = inputs[0].shape[1] // unit[0]
        count = max(1, min(units, self.budget // (_COPIES * unit_bytes)))
        while True:
            rows = count * unit[0] + sum(halo)
            shapes = [jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype) for x in inputs]
            inside = jax.ShapeDtypeStruct((rows,), bool)
            compiled, used = _compile(program, jax.tree.map(shape_of, consts), inside, *shapes)
            if used is not None and used <= self.budget:
                break
            if count == 1:
                takes = "more than the device has" if used is None else f"{used / 2**20:.4g} MiB"
                has = f"the memory budget of {self.budget / 2**20:.4g} MiB a device"
                raise UserError(f"{has} is too small, a row of a layer takes {takes}: give more, or convert in tiles")
            count = count // 2 if used is None else min(count - 1, count * self.budget // used) or 1
        made = jax.eval_shape(program, jax.tree.map(shape_of, consts), inside, *shapes)
        shape = (made.shape[0], units * unit[1], *made.shape[2:])
        whole = stand_in(shape, made.dtype) if self.planning else np.empty(shape, made.dtype)
        held = sum(x.nbytes for x in (*inputs, *jax.tree.leaves(consts), whole))
        self.peak = Peak(max(self.peak.device, used), max(self.peak.host, held))
        if self.planning:
            return whole
        consts = jax.device_put(consts)
        for first in range(0, units, count):
            first = min(first, units - count)  # the last may repeat rows of the one before
            top = first * unit[0] - halo[0]
            strips = [_rows(x, top, rows) for x in inputs]
            inside = (np.arange(rows) + top >= 0) & (np.arange(rows) + top < inputs[0].shape[1])
            whole[:, first * unit[1] : (first + count) * unit[1]] = jax.device_get(compiled(consts, inside, *strips))
        return whole


class _StandIn(np.ndarray):
    """Zeros of any shape in the memory of one: a view of it, which must not become a copy."""

    def astype(self, dtype: Any) -> "_StandIn":
        return stand_in(self.shape, dtype)


def stand_in(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array to plan with."""
    return np.broadcast_to(np.zeros((), dtype).view(_StandIn), shape, subok=True)


def _rows(x: Array, top: int, rows: int) -> Array:
    """Rows top..top + rows - 1 of [b, h, ...], zeros where there are none."""
    inner = x[:, max(top, 0) : top + rows]
    before = max(-top, 0)
    if inner.shape[1] == rows:
        return inner
    return np.pad(inner, [(0, 0), (before, rows - before - inner.shape[1])] + [(0, 0)] * (x.ndim - 2))


_COMPILED: dict[Any, tuple[Any, int | None]] = {}


def _compile(program: Callable[..., Any], *shapes: Any) -> tuple[Any, int | None]:
    """The compiled program and the bytes of device memory that it takes; None where that is more than there are."""
    leaves, structure = jax.tree.flatten(shapes)
    key = (program, structure, tuple((x.shape, str(x.dtype)) for x in leaves))
    if key not in _COMPILED:
        compiled = compile_if_it_fits(program.lower(*shapes))
        _COMPILED[key] = compiled, device_bytes(compiled) if compiled else None
    return _COMPILED[key]


@jax.jit
def _sums(shift: jax.Array, inside: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of x - shift and of its square over each row and group: [b, h, 2, groups], with shift [b, groups]."""
    b, h, w, c = x.shape
    groups = shift.shape[-1]
    x = x.astype(jnp.float32).reshape(b, h, w, groups, c // groups) - shift[:, None, None, :, None]
    return jnp.stack([x.sum((2, 4)), jnp.square(x).sum((2, 4))], axis=2)


def _statistics(strips: Strips, x: Array) -> tuple[Array, Array]:
    """Mean and variance of each group over the whole picture, float32 [b, groups], in two passes."""
    b, h, w, c = x.shape
    shift = np.zeros((b, layers.GROUPS), np.float32)
    count = h * w * c // layers.GROUPS
    for _ in range(2):
        rows = strips.sweep(_sums, (x,), shift, unit_bytes=b * w * c * 4)  # [b, h, 2, groups]
        first, second = np.moveaxis(rows.astype(np.float64).sum(1), 1, 0) / count
        mean, variance = shift + first, second - np.square(first)
        shift = mean.astype(np.float32)  # around which the second pass measures
    return mean.astype(np.float32), variance.astype(np.float32)


def _normalise(norm: Any, x: jax.Array, dtype: Any, swish: bool) -> jax.Array:
    """GroupNorm with given statistics; `norm` is (mean, variance, parameters)."""
    mean, variance, params = norm
    width = x.shape[-1] // mean.shape[-1]
    mean, variance = (jnp.repeat(a, width, axis=-1)[:, None, None] for a in (mean, variance))
    y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(variance + layers.EPSILON) * params["scale"]) + params["bias"]
    return nn.swish(y.astype(dtype)) if swish else y.astype(dtype)


@functools.cache
def _norm_program(dtype: Any, swish: bool) -> Any:
    return jax.jit(lambda norm, inside, x: _normalise(norm, x, dtype, swish))


@functools.cache
def _conv_program(stride: int, padding: tuple[int, int], dtype: Any, upsample: bool) -> Any:
    """A convolution, of what is normed and activated if the constants hold a norm, plus a residual if there is one."""

    def program(consts: Any, inside: jax.Array, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        if consts["norm"] is not None:
            x = _normalise(consts["norm"], x, dtype, True)
        x = jnp.where(inside[:, None, None], x.astype(dtype), 0)
        if upsample:  # of the doubled rows beyond the strip the convolution needs one on each side
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, 1:-1]
        y = _convolve(x, consts["conv"], stride, ((0, 0), padding))
        if residual is not None:
            halo = (residual.shape[1] - y.shape[1]) // 2
            residual = residual[:, halo : halo + y.shape[1]]
            y = y + (_convolve(residual.astype(dtype), consts["shortcut"]) if consts["shortcut"] else residual)
        return y

    return jax.jit(program)


def _convolve(x: jax.Array, params: Params, stride: int = 1, padding: layers.Padding = ((0, 0), (0, 0))) -> jax.Array:
    y = layers.conv2d(x, params["kernel"].astype(x.dtype), stride, padding)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def _conv(
    strips: Strips,
    x: Array,
    params: Params,
    dtype: Any,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    upsample: bool = False,
    norm: Any = None,
    residual: Array | None = None,
    shortcut: Params | None = None,
) -> Array:
    b, _, w, c = x.shape
    features, scale = params["kernel"].shape[-1], 2 if upsample else 1
    unit_bytes = 4 * b * w * (stride * c + scale**2 * features + (residual.shape[-1] if residual is not None else 0))
    consts = {"conv": params, "norm": norm, "shortcut": shortcut}
    inputs = (x,) if residual is None else (x, residual)
    program = _conv_program(stride, padding, jnp.dtype(dtype), upsample)
    return strips.sweep(program, inputs, consts, unit=(stride, scale), halo=padding, unit_bytes=unit_bytes)


def _run_conv(strips: Strips, module: layers.Conv, params: Params, x: Array) -> Array:
    return _conv(strips, x, params, module.dtype, stride=module.stride, padding=module.padding)


def _run_norm(strips: Strips, module: layers.GroupNorm, params: Params, x: Array) -> Array:
    program = _norm_program(jnp.dtype(module.dtype), module.swish)
    norm = (*_statistics(strips, x), params)
    return strips.sweep(program, (x,), norm, unit_bytes=8 * x[:, 0].size)


def _run_resnet(strips: Strips, module: layers.ResnetBlock, params: Params, x: Array) -> Array:
    norm = (*_statistics(strips, x), params["norm1"])
    h = _conv(strips, x, params["conv1"], module.dtype, norm=norm)
    norm = (*_statistics(strips, h), params["norm2"])
    return _conv(strips, h, params["conv2"], module.dtype, norm=norm, residual=x, shortcut=params.get("shortcut"))


def _run_downsample(strips: Strips, module: layers.Downsample, params: Params, x: Array) -> Array:
    return _conv(strips, x, params, module.dtype, stride=2, padding=(0, 1))


def _run_upsample(strips: Strips, module: layers.Upsample, params: Params, x: Array) -> Array:
    return _conv(strips, x, params, module.dtype, upsample=True)


@functools.cache
def _attention_programs(dtype: Any) -> tuple[Any, Any]:
    def project(consts: Any, inside: jax.Array, x: jax.Array) -> jax.Array:
        return _convolve(_normalise(consts["norm"], x, dtype, False), consts["conv"])

    def attend(consts: Any, inside: jax.Array, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        query = project({"norm": consts["norm"], "conv": consts["query"]}, inside, x).reshape(b, h * w, c)
        key, value = (consts[name].reshape(b, -1, c) for name in ("keys", "values"))
        scores = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) * c**-0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        y = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(b, h, w, c)
        return x + _convolve(y, consts["out"])

    return jax.jit(project), jax.jit(attend)


def _run_attention(strips: Strips, module: layers.AttentionBlock, params: Params, x: Array) -> Array:
    b, h, w, c = x.shape
    project, attend = _attention_programs(jnp.dtype(module.dtype))
    norm = (*_statistics(strips, x), params["norm"])
    key, value = (
        strips.sweep(project, (x,), {"norm": norm, "conv": params[name]}, unit_bytes=8 * b * w * c)
        for name in ("key", "value")
    )
    consts = {"norm": norm, "keys": key, "values": value, "query": params["query"], "out": params["out"]}
    return strips.sweep(attend, (x,), consts, unit_bytes=4 * b * w * (2 * c + h * w))


_RUN: dict[type[nn.Module], Callable[..., Array]] = {
    layers.Conv: _run_conv,
    layers.GroupNorm: _run_norm,
    layers.ResnetBlock: _run_resnet,
    layers.AttentionBlock: _run_attention,
    layers.Downsample: _run_downsample,
    layers.Upsample: _run_upsample,
}


def apply_in_strips(
    model: VQGAN,
    variables: Mapping[str, Any],
    x: Array | jax.ShapeDtypeStruct,
    *,
    method: str,
    budget: int,
) -> tuple[Array, Peak]:
    """`model.apply(variables, x, method=method)` for pictures of any size.

    Args:
      model: without remat.
      variables: of the model; they come to the device layer by layer.
      x: "decode": ids int32 [b, h, w]; "encode": images float32 [b, h, w, c]. Of a shape alone all is compiled and
        nothing run: the result is a stand-in without memory.
      method: "decode" or "encode".
      budget: bytes of device memory that any layer may take.

    Returns:
      What the method returns, on the host, and the memory that it took.

    Raises:
      UserError: a budget too small for one row of the widest layer.
    """
    planning = isinstance(x, jax.ShapeDtypeStruct)
    x, strips = stand_in(x.shape, x.dtype) if planning else x, Strips(budget, planning)

    def run(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if not args or isinstance(args[0], jax.core.Tracer):  # a quantizer, already cut
            return next_fun(*args, **kwargs)
        if isinstance(module, tuple(quantizers.MODULES.values())) and context.method_name in _QUANTIZER:
            return _QUANTIZER[context.method_name](strips, module, np.asarray(args[0]))
        if context.method_name != "__call__" or type(module) not in _RUN:
            return next_fun(*args, **kwargs)
        return _RUN[type(module)](strips, module, module.variables["params"], np.asarray(args[0]))

    with nn.intercept_methods(run):
        made = model.apply(variables, x, method=method)
    return np.asarray(made), strips.peak


def _quantize(strips: Strips, module: nn.Module, z: Array) -> tuple[None, Array, None]:
    """The ids of z [b, h, w, e], rows of their distances to the codebook at a time."""
    b, _, w, e = z.shape
    return None, _swept(strips, module, "__call__", z, 4 * b * w * (module.codebook_size + e)), None


def _codes(strips: Strips, module: nn.Module, ids: Array) -> Array:
    """The vectors of ids [b, h, w]."""
    b, _, w = ids.shape
    return _swept(strips, module, "codes", ids, 4 * b * w * module.dim)


def _swept(strips: Strips, module: nn.Module, method: str, x: Array, unit_bytes: int) -> Array:
    alone = module.clone(parent=None, name=None)
    variables = jax.tree.map(np.asarray, dict(module.variables))
    return strips.sweep(_quantizer_program(alone, method), (x,), variables, unit_bytes=unit_bytes)


@functools.cache
def _quantizer_program(module: nn.Module, method: str) -> Callable[..., Any]:
    """A quantizer's ids, or vectors, of some rows, as `Strips.sweep` runs it."""
    if method == "codes":
        return jax.jit(lambda variables, inside, ids: module.apply(variables, ids, method="codes"))
    return jax.jit(lambda variables, inside, z: module.apply(variables, z, train=False, step=0)[1])


_QUANTIZER = {"__call__": _quantize, "codes": _codes}
