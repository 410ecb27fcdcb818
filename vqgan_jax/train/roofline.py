"""What chips can do, what a program asks of them, and how long it takes at least: the roofline model.

Figures of the chips: the makers' data sheets (of TPUs: docs.cloud.google.com/tpu/docs/v6e), dense bfloat16. FLOPs are
counted in the traced program, not asked of XLA, whose cost analysis counts the body of a loop once and the kernels of a
library not at all.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from vqgan_jax.hlo import Module, window_products
from vqgan_jax.parallel import shape_of


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as `jax.Device` counts them. Rates are a second's."""

    name: str
    peak_flops: float  # bfloat16, dense
    memory_bytes: float  # of a TPU what its compiler gives a program
    memory_bandwidth: float
    link_bandwidth: float  # bytes that leave it over all its links to other chips (ICI, NVLink, PCIe)
    network_bandwidth: float  # its share of what leaves its host, to other slices or nodes (DCN); inf: not published


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("TPU v4", 275e12, 30.75 * 2**30, 1228e9, 300e9, math.inf),
        Chip("TPU v5e", 197e12, 15.75 * 2**30, 819e9, 200e9, 25e9 / 8),  # hosts of 8 with 200 Gbit/s
        Chip("TPU v5p", 459e12, 95.74 * 2**30, 2765e9, 600e9, 50e9 / 8),
        Chip("TPU v6e", 918e12, 31.25 * 2**30, 1638e9, 400e9, 100e9 / 8),  # hosts of 8 with 800 Gbit/s
        Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 400e9 / 8),  # of NVIDIA's own nodes, as H100 and A100
        Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, 400e9 / 8),
        Chip("NVIDIA A100", 312e12, 80e9, 2039e9, 300e9, 200e9 / 8),
        Chip("NVIDIA L4", 121e12, 24e9, 300e9, 32e9, math.inf),
    )
}
PLAIN = "cpu"  # the platform without kernels of its own
_KINDS = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"}  # as JAX calls them


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind `jax.Device.device_kind` ("TPU v5 lite", "NVIDIA H100 80GB HBM3"); None where it is not known."""
    kind = _KINDS.get(device_kind, device_kind)
    found = [chip for name, chip in CHIPS.items() if kind == name or kind.startswith((f"{name} ", f"{name}-"))]
    return found[0] if found else None


def trace_plain(f: Callable[..., Any], *args: Any) -> Any:
    """The jaxpr of `f(*args)` as one CPU would run it, where attention is plain products and not a platform's kernel.

    Args:
      f: a function without jit, or one that was not traced for another platform yet.
      args: arrays or ShapeDtypeStructs, of which the shapes count.
    """
    one = AbstractMesh((), (), abstract_device=AbstractDevice(PLAIN, None, PLAIN))
    with jax.sharding.use_abstract_mesh(one):
        return jax.make_jaxpr(f)(*jax.tree.map(shape_of, args))


def count_flops(jaxpr: Any, platform: str = PLAIN) -> float:
    """FLOPs of all matrix products and convolutions of a traced program, loops times their length, on all devices.

    Attention counts in full, masked or not. To count what a model needs, without what rematerialisation adds, trace
    the step of a model with `remat=""`.

    Args:
      jaxpr: of `trace_plain`, or of any trace without kernels of a platform.
      platform: as `parallel.platform`, whose way counts where the program has one for each.
    """
    return sum(times * flops_of(equation) for equation, times in products(jaxpr, platform))


def products(jaxpr: Any, platform: str = PLAIN, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every matrix product and convolution of a traced program (its equation) as one platform runs it, with how often
    it runs."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            yield equation, times
        elif name == "cond":  # one of the branches runs: the platform's, or else the costliest
            taken = _of_platform(params, platform)
            taken = taken or max(params["branches"], key=lambda branch: count_flops(branch, platform))
            yield from products(taken, platform, times)
        else:
            for inner in _inner(params):
                yield from products(inner, platform, times * (params["length"] if name == "scan" else 1))


def _of_platform(params: Mapping[str, Any], platform: str) -> Any | None:
    """Of a `jax.lax.platform_dependent` the branch that a platform takes; None of any other choice."""
    name = "cuda" if platform == "gpu" else platform  # ROCm's ways are CUDA's here
    for branch, names in zip(params["branches"], params.get("branches_platforms") or (), strict=False):
        if names is None or name in names:  # none: for all that are left
            return branch
    return None


def flops_of(equation: Any) -> float:
    """FLOPs of one matrix product or convolution."""
    if equation.primitive.name == "conv_general_dilated":
        return _convolution_flops(equation)
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> float:
    """Products with the zeros that padding and dilation insert do not count: a gradient costs what its layer does."""
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"] * params["batch_group_count"]
    data, kernel, out = (x.aval.shape for x in (*equation.invars, *equation.outvars))
    (batch, features, *space), (_, _, *taps), (_, channels, *result) = (
        [shape[axis] for axis in spec]
        for shape, spec in ((data, numbers.lhs_spec), (kernel, numbers.rhs_spec), (out, numbers.out_spec))
    )
    windows = (params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"])
    products = math.prod(
        window_products(size, width, places, stride, pad[0], spread, apart)
        for size, width, places, stride, pad, spread, apart in zip(space, taps, result, *windows, strict=True)
    )
    return 2 * batch * features * channels * products / groups


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr") and hasattr(v.jaxpr, "eqns")]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind: how many run, and the bytes that a device sends for them."""

    count: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program takes of one device in one run; sizes in bytes."""

    flops: float  # of what is computed, rematerialisation included
    memory_moved: float
    collectives: Mapping[str, Traffic]  # by kind, those within a slice
    between_slices: Mapping[str, Traffic]  # over the data center's network
    arguments: int
    outputs: int  # those that take no argument's place
    temporaries: int
    code: int
    unknown_loops: int  # their bodies count once

    @property
    def peak(self) -> int:
        """Device memory that it takes, its arguments included."""
        return self.arguments + self.outputs + self.temporaries + self.code

    @property
    def sent(self) -> float:
        """Bytes of all collectives within a slice."""
        return sum(traffic.sent for traffic in self.collectives.values())

    @property
    def sent_between_slices(self) -> float:
        """Bytes of all collectives between slices."""
        return sum(traffic.sent for traffic in self.between_slices.values())


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that each part of a program takes at least; they can overlap."""

    compute: float
    memory: float
    links: float
    network: float  # between slices

    @property
    def seconds(self) -> float:
        """What it takes at least."""
        return max(dataclasses.astuple(self))

    @property
    def by(self) -> str:
        """The part that takes longest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=parts.get)


def program_cost(compiled: Any) -> Cost:
    """What `jax.jit(f).lower(*args).compile()` takes of each device."""
    return cost_of(compiled.as_text(), compiled.memory_analysis())


def cost_of(text: str, memory: Any) -> Cost:
    """The same, read off its text and its memory analysis."""
    counts = Module(text).counts()
    within: dict[str, Traffic] = {}
    between: dict[str, Traffic] = {}
    for c in counts.collectives.values():
        kinds = between if c.between_slices else within
        before = kinds.get(c.kind, Traffic(0, 0))
        kinds[c.kind] = Traffic(before.count + c.times, before.sent + c.times * c.sent)
    return Cost(
        flops=counts.flops,
        memory_moved=counts.memory,
        collectives=dict(sorted(within.items())),
        between_slices=dict(sorted(between.items())),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        unknown_loops=counts.unknown_loops,
    )


def bound_of(cost: Cost, chip: Chip) -> Bound:
    """The roofline of a program on a chip."""
    return Bound(
        cost.flops / chip.peak_flops,
        cost.memory_moved / chip.memory_bandwidth,
        cost.sent / chip.link_bandwidth,
        cost.sent_between_slices / chip.network_bandwidth,
    )
