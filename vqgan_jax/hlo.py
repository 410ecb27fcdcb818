"""What a compiled program does, read off its HLO text: FLOPs, bytes of device memory, collectives, and its buffers.

XLA's own cost analysis counts the body of a loop once, an operand whole where a program reads a slice of it, and a
buffer staged in the core's fast memory (layouts with S(1)) once more for every use there.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s4": 1, "u4": 1, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_FREE = {"parameter", "constant", "get-tuple-element", "bitcast", "tuple", "after-all", "partition-id", "while", "call"}
_FREE |= {"conditional", "opt-barrier", "async-update"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_REDUCE_SCATTER = "all-reduce-scatter"  # how the TPU compiler calls a fusion that is one
# Matrix products [t, k] x [s, k] a head in JAX's Pallas kernels of attention, of whose work the text says nothing.
_KERNELS = {"flash_attention": 2, "flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}


class Instruction(NamedTuple):
    """One line of a computation: `name = shape kind(operands), attributes`."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str:
        """The name after `name=`, or ""."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def made_by(self) -> str:
        """The operation of the traced program that it stems from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Collective(NamedTuple):
    """One collective as often as it runs: bytes that a device sends, at least, each time, to others of its slice or to
    other slices."""

    kind: str
    sent: float
    times: float
    between_slices: bool = False


class Buffer(NamedTuple):
    """What an instruction writes to device memory."""

    made_by: str
    shape: str
    size: int


@dataclasses.dataclass
class Counts:
    """Of one device in one run. `unknown_loops`: loops whose length is not in the text; they count once."""

    flops: float = 0.0
    memory: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: "Counts", times: float = 1.0) -> None:
        """Adds what runs `times` times. Parts of one collective, which share a key, count once."""
        self.flops += times * other.flops
        self.memory += times * other.memory
        self.unknown_loops += other.unknown_loops
        for key, c in other.collectives.items():
            self.collectives.setdefault(key, c._replace(times=times * c.times))


Computation = Mapping[str, Instruction]


class Module:
    """A parsed program."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry, current = "", {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif found := _LINE.match(line):
                root, name, shape, kind, rest = found.groups()
                inside, _, attributes = _split(rest)
                operands = re.findall(r"%([\w.-]+)", inside)
                attributes = inside + ", " + attributes if kind in ("parameter", "constant") else attributes
                current[name] = Instruction(name, shape, kind, operands, attributes, bool(root))

    def counts(self) -> Counts:
        """What one run takes."""
        return self._count(self._entry, fused=False)

    def buffers(self) -> Iterator[Buffer]:
        """What the instructions write to device memory, those inside loops included; not what is fused."""
        for name in self._running(self._entry):
            for line in self._computations[name].values():
                if line.kind not in _FREE and not line.kind.endswith("-done"):
                    yield Buffer(line.made_by, _plain(line.shape), _size(_outside(line.shape)))

    def _running(self, name: str) -> Iterator[str]:
        yield name
        for line in self._computations[name].values():
            for called in self._called(line):
                yield from self._running(called)

    def _called(self, line: Instruction) -> list[str]:
        """Computations that an instruction runs on buffers of their own."""
        if line.kind == "while":
            return [line.attribute("body")]
        if line.kind == "call":
            return [line.attribute("to_apply")]
        if line.kind == "conditional":
            found = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
            named = found[1] if found else " ".join(map(line.attribute, ("true_computation", "false_computation")))
            return re.findall(r"[\w.-]+", named)
        return []

    def _count(self, name: str, *, fused: bool) -> Counts:
        lines, total = self._computations[name], Counts()
        for line in lines.values():
            if line.kind == "while":
                length, body = self._length(lines, line), line.attribute("body")
                inner = self._count(body, fused=False)
                # A channel is one collective within a loop; the rounds that a compiler takes out of it come on top.
                inner.collectives = {f"{body}/{key}": c for key, c in inner.collectives.items()}
                total.add(inner, length or 1)
                total.unknown_loops += length is None
            elif line.kind == "conditional":  # one of them runs
                total.add(max((self._count(b, fused=False) for b in self._called(line)), key=lambda c: c.memory))
            elif line.kind == "call":
                total.add(self._count(line.attribute("to_apply"), fused=False))
            elif line.kind in ("fusion", "async-start"):
                inner = self._count(line.attribute("calls"), fused=True)
                if _REDUCE_SCATTER in line.attribute("calls"):
                    inner.collectives = {
                        key: c._replace(kind="reduce-scatter", sent=c.sent / 2) for key, c in inner.collectives.items()
                    }
                total.add(inner)
            elif line.kind in ("convolution", "dot"):
                total.flops += _flops(lines, line)
            elif line.kind.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", line.attributes)
                total.collectives[channel[1] if channel else f"{name}/{line.name}"] = _collective(lines, line)
            elif line.kind == "send" and (kind := _BETWEEN.search(line.attributes)):
                total.collectives[f"{name}/{line.name}"] = _between_slices(lines, line, kind[1])
            elif line.kind == "custom-call":
                total.flops += _kernel_flops(lines, line)
            if not fused:
                total.memory += self._moved(lines, line)
        return total

    def _length(self, lines: Computation, loop: Instruction) -> float | None:
        """How often a loop runs: as XLA wrote it down, or from its counter's start, step and limit."""
        if known := re.search(r'known_trip_count"?:?\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes):
            return float(known[1])
        condition, body = (self._computations[loop.attribute(name)] for name in ("condition", "body"))
        test = next(line for line in condition.values() if line.root)
        if test.kind == "fusion":  # a compare of the counter and a limit, both handed to it
            inner = next(line for line in self._computations[test.attribute("calls")].values() if line.root)
            test = inner._replace(operands=test.operands)
        if test.kind != "compare" or "direction=LT" not in test.attributes or len(test.operands) != 2:
            return None
        counter, limit = (condition[name] for name in test.operands)
        place = counter.attribute("index")
        result = next(line for line in body.values() if line.root)
        if counter.kind != "get-tuple-element" or result.kind != "tuple":
            return None
        start = _constant(lines, lines[loop.operands[0]].operands[int(place)]) if loop.operands[0] in lines else None
        limit, step = _constant(condition, limit.name), self._step(body, result.operands[int(place)])
        if start is None or limit is None or not step:
            return None
        return max(0, math.ceil((limit - start) / step))

    def _step(self, body: Computation, name: str) -> int | None:
        """What a loop's body adds to its counter."""
        line = body[name]
        while line.kind in ("copy", "bitcast") and line.operands[0] in body:
            line = body[line.operands[0]]
        if line.kind == "fusion":
            inside = self._computations[line.attribute("calls")]
            root = self._root(line.attribute("calls"))
            if root.kind != "add":
                return None
            found = [_constant(inside, operand) for operand in root.operands]
            found += [_constant(body, operand) for operand in line.operands]
        elif line.kind == "add":
            found = [_constant(body, operand) for operand in line.operands]
        else:
            return None
        return next((step for step in found if step is not None), None)

    def _moved(self, lines: Computation, line: Instruction) -> int:
        """Bytes that an instruction reads from device memory and writes to it."""
        if line.kind in _FREE or line.kind.endswith("-done") or 'target="AllocateBuffer"' in line.attributes:
            return 0
        if line.kind == "slice-start":  # to fast memory; the second of its results is what was read
            return _size(_SHAPE.findall(line.shape)[1:2])
        if line.kind == "copy-start":  # results: to, from, context
            return sum(_size(_outside_of(array)) for array in _SHAPE.findall(line.shape)[:2])
        read = 0
        for place, name in enumerate(line.operands):
            if name not in lines or (line.kind == "dynamic-update-slice" and place == 0):
                continue
            whole = _size(_outside(lines[name].shape))
            if line.kind in ("dynamic-slice", "slice", "gather") and place == 0:
                whole = min(whole, _size(_SHAPE.findall(line.shape)))
            read += min(whole, self._used(line.attribute("calls"), place, whole)) if line.kind == "fusion" else whole
        return read + self._written(lines, line)

    def _written(self, lines: Computation, line: Instruction) -> int:
        """Bytes that an instruction writes: of a buffer updated in place the update."""
        if line.kind == "send":  # its result is its operand
            return 0
        if line.kind == "dynamic-update-slice":
            return 0 if line.operands[1] not in lines else _size(_outside(lines[line.operands[1]].shape))
        if line.kind.endswith("-start"):
            arrays = _outside(line.shape)
            return _size(arrays[len(line.operands) : 2 * len(line.operands)] if line.shape[0] == "(" else arrays)
        if line.kind != "fusion":
            return _size(_outside(line.shape))
        inside = self._computations[line.attribute("calls")]
        root = self._root(line.attribute("calls"))
        results = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
        total = 0
        for shape, result in zip(_SHAPE.findall(line.shape), results, strict=False):
            whole = _size(_outside_of(shape))
            while result.kind in ("bitcast", "copy") and result.operands[0] in inside:
                result = inside[result.operands[0]]
            if result.kind == "dynamic-update-slice":
                whole = min(whole, _size(_SHAPE.findall(inside[result.operands[1]].shape)))
            total += whole
        return total

    def _used(self, name: str, place: int, whole: int) -> int:
        """How much of a fused computation's parameter it reads: all, or slices."""
        used, names = 0, self._aliases(name, place)
        for line in self._computations[name].values():
            for at, operand in enumerate(line.operands):
                if operand not in names or line.name in names:
                    continue
                if line.kind in ("slice", "dynamic-slice", "gather") and at == 0:
                    used += _size(_SHAPE.findall(line.shape))
                elif line.kind == "fusion":
                    used += self._used(line.attribute("calls"), at, whole)
                elif line.kind != "dynamic-update-slice" or at:
                    used += whole
        return min(used, whole)

    def _aliases(self, name: str, place: int) -> set[str]:
        """A fused computation's parameter, and what gives it another shape and no more."""
        names: set[str] = set()
        for line in self._computations[name].values():
            if line.kind == "parameter":
                same = line.attributes.startswith(f"{place}, ")
            elif line.kind == "fusion":
                called = line.attribute("calls")
                places = [at for at, operand in enumerate(line.operands) if operand in names]
                same = any(self._root(called).name in self._aliases(called, at) for at in places)
            else:
                same = line.kind == "bitcast" and line.operands[0] in names
            if same:
                names.add(line.name)
        return names

    def _root(self, name: str) -> Instruction:
        return next(line for line in self._computations[name].values() if line.root)


def _split(rest: str) -> tuple[str, str, str]:
    """What stands behind "kind(": the operands, and the attributes after the closing bracket."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:at], ")", rest[at + 1 :].removeprefix(", ")
    return rest, "", ""


def _constant(lines: Computation, name: str) -> int | None:
    """The value of an integer constant, through copies."""
    line = lines.get(name)
    while line is not None and line.kind in ("copy", "bitcast", "convert"):
        line = lines.get(line.operands[0])
    if line is None or line.kind != "constant":
        return None
    found = re.match(r"-?\d+", line.attributes)
    return int(found[0]) if found else None


def _collective(lines: Computation, line: Instruction) -> Collective:
    kind = line.kind.removesuffix("-start")
    size = _size([array for name in line.operands if name in lines for array in _SHAPE.findall(lines[name].shape)])
    return Collective(kind, _sent(kind, _group(line.attributes)) * size, 1)


def _between_slices(lines: Computation, line: Instruction, transfer: str) -> Collective:
    """Of libtpu's Multislice runtime: a host hands its chips' operands to those of other slices."""
    kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer, transfer.lower().replace("_", "-"))
    size = _size(_SHAPE.findall(lines[line.operands[0]].shape)[:1])
    members = re.search(r'_xla_megascale_target="?\{+([\d,]*)', line.attributes)  # "{1,2}x{0:3}" or {{1,9},{2,10}}
    return Collective(kind, _sent(kind, len(members[1].split(",")) if members else 2) * size, 1, True)


_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _sent(kind: str, n: int) -> float:
    """What one of n devices sends at least, in sizes of its operand."""
    return {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)


def _group(attributes: str) -> int:
    """How many devices take part in a collective together: replica_groups in any of its three spellings."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^{]*)\{([^}]*)\}", attributes):  # of axes, or of parts of them
        sizes = dict(re.findall(r"'([\w.-]+)'=(\d+)", found[1]))
        axes = re.findall(r"'([\w.-]+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2  # not said: all devices; the least that it can be


def _kernel_flops(lines: Computation, line: Instruction) -> float:
    """Of a kernel written by hand: those of _KERNELS by name, from queries and keys [b, n, t, k]; of others what the
    program says of them, mostly nothing."""
    products = [times for name, times in _KERNELS.items() if line.name.startswith(name)]
    if products and all(name in lines for name in line.operands[:2]):
        query, key = (_dimensions(lines[name].shape) for name in line.operands[:2])
        return 2 * products[0] * math.prod(query) * key[2]
    said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', line.attributes)
    return float(said[1]) if said else 0


def _flops(lines: Computation, line: Instruction) -> float:
    if any(name not in lines for name in line.operands):
        return 0
    left, right, out = (_dimensions(shape) for shape in (*(lines[n].shape for n in line.operands), line.shape))
    if line.kind == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
        contracted = [left[int(axis)] for axis in axes[1].split(",")] if axes and axes[1] else []
        return 2 * math.prod(out) * math.prod(contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", line.attributes) or ["", ""])[1]))
    spatial = [label for label in labels[3] if label.isdigit()]

    def each(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    products = 1
    dilations, pads = zip(each("lhs_dilate", "1"), each("rhs_dilate", "1"), strict=True), each("pad", "0_0")
    for label, stride, pad, (spread, apart) in zip(sorted(spatial), each("stride", "1"), pads, dilations, strict=True):
        size, width, places = (
            dims[names.index(label)] for dims, names in ((left, labels[1]), (right, labels[2]), (out, labels[3]))
        )
        products *= window_products(size, width, places, int(stride), int(pad.split("_")[0]), int(spread), int(apart))
    batch, features = left[labels[1].index("b")], right[labels[2].index("i")]
    groups = re.search(r"batch_group_count=(\d+)", line.attributes)
    return 2 * batch * features * right[labels[2].index("o")] * products / (int(groups[1]) if groups else 1)


@functools.cache
def window_products(size: int, width: int, places: int, stride: int, below: int, spread: int, apart: int) -> int:
    """Products along one axis of a convolution, those with the zeros of padding and dilation left out.

    Args:
      size: of the data.
      width: of the kernel.
      places: of the result.
      stride: of the window.
      below: padding in front.
      spread: dilation of the data.
      apart: dilation of the kernel.
    """
    last = (size - 1) * spread
    starts = range(-below, -below + places * stride, stride)
    return sum(
        1
        for start in starts
        for at in range(start, start + width * apart, apart)
        if 0 <= at <= last and at % spread == 0
    )


def _dimensions(shape: str) -> list[int]:
    return [int(n) for n in filter(None, _SHAPE.search(shape)[2].split(","))]


def _outside(shape: str) -> list[tuple[str, str, str]]:
    """The arrays of a shape that lie in device memory."""
    return [array for array in _SHAPE.findall(shape) if "S(" not in array[2]]


def _outside_of(array: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    return [] if "S(" in array[2] else [array]


def _plain(shape: str) -> str:
    return ", ".join(f"{dtype}[{dimensions}]" for dtype, dimensions, _ in _outside(shape)[:3])


def _size(arrays: Sequence[tuple[str, str, str]]) -> int:
    return sum(
        _BYTES[dtype] * math.prod(int(n) for n in filter(None, dimensions.split(",")))
        for dtype, dimensions, _ in arrays
    )
