"""Bytes that a compiled TPU program moves to and from HBM, read off its text.

XLA's own cost analysis counts an operand whole where a program reads a slice of it, and a buffer that is staged in the
core's fast memory (layouts with S(1)) once more for every use there.
"""

import re
from typing import NamedTuple

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_SHAPE = re.compile(rf"({'|'.join(_SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_FREE = {"parameter", "constant", "get-tuple-element", "bitcast", "tuple", "copy-done", "slice-done", "after-all"}


class Instruction(NamedTuple):
    """One line of a computation."""

    shape: str
    kind: str
    operands: list[str]
    calls: str
    number: int  # of a parameter


def hbm_bytes(text: str) -> int:
    """Bytes read and written by the entry computation of `compiled.as_text()`; a program without loops."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry: dict[str, Instruction] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = current if head[1] else entry
        elif found := _LINE.match(line):
            name, shape, kind, rest = found.groups()
            calls = re.search(r"calls=%?([\w.-]+)", rest)
            number = int(rest.partition(")")[0]) if kind == "parameter" else -1
            operands = re.findall(r"%([\w.-]+)", re.split(r"\)(?:, |$)", rest, maxsplit=1)[0])
            current[name] = Instruction(shape, kind, operands, calls[1] if calls else "", number)
    return sum(_moved(entry, line, computations) for line in entry.values() if line.kind not in _FREE)


def _moved(entry: dict[str, Instruction], line: Instruction, computations: dict) -> int:
    if line.kind == "slice-start":  # HBM to fast memory; the second of its results is what was read
        return _bytes(_SHAPE.findall(line.shape)[1:2])
    read = 0
    for place, name in enumerate(line.operands):
        if name not in entry or (line.kind == "dynamic-update-slice" and place == 0):
            continue
        whole = _bytes(_outside(entry[name].shape))
        read += min(whole, _used(computations, line.calls, place, whole)) if line.calls else whole
    in_place = line.kind in ("copy-start", "dynamic-update-slice")
    return read + (0 if in_place else _bytes(_outside(line.shape)))


def _used(computations: dict, name: str, place: int, whole: int) -> int:
    """How much of a fused computation's parameter it reads: all, or slices."""
    lines = computations[name]
    parameter = next((n for n, line in lines.items() if line.number == place), None)
    used = 0
    for line in lines.values():
        for at, operand in enumerate(line.operands):
            if operand != parameter:
                continue
            if line.kind in ("slice", "dynamic-slice"):
                used += _bytes(_SHAPE.findall(line.shape))
            elif line.calls:
                used += _used(computations, line.calls, at, whole)
            elif line.kind != "dynamic-update-slice" or at:
                used += whole
    return min(used, whole)


def _outside(shape: str) -> list[tuple[str, str, str]]:
    """The arrays of a shape that lie in HBM."""
    return [array for array in _SHAPE.findall(shape) if "S(" not in array[2]]


def _bytes(arrays: list[tuple[str, str, str]]) -> int:
    total = 0
    for dtype, dimensions, _ in arrays:
        size = _SIZES[dtype]
        for n in filter(None, dimensions.split(",")):
            size *= int(n)
        total += size
    return total
