"""Interprets the pickles of torch.save, without running them.

A pickle is a program, so it is not handed to `pickle`: its opcodes are interpreted here, where they can build plain
values, descriptions of tensors and inert placeholders. Nothing that a file names is ever imported or called.
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

# Far above any checkpoint of this field (about 30 opcodes a tensor), far below what hurts a machine.
_OPCODES = 2_000_000


def dtypes_by_name(prefix: str, suffix: str, pairs: str) -> dict[str, np.dtype]:
    """A format's names of types, as numpy dtypes (those that numpy lacks are in ml_dtypes)."""
    names = [pair.split("=") for pair in pairs.split()]
    return {f"{prefix}{theirs}{suffix}": np.dtype(getattr(ml_dtypes, ours, ours)) for theirs, ours in names}


_STORAGES = dtypes_by_name(
    "torch.",
    "Storage",
    "Float=float32 Double=float64 Half=float16 BFloat16=bfloat16 Long=int64 Int=int32 Short=int16 Char=int8 Byte=uint8 "
    "Bool=bool ComplexFloat=complex64 ComplexDouble=complex128 Untyped=uint8 storage.Untyped=uint8",
)
# The types that PyTorch rebuilds from untyped storages because they have no storage class of their own.
_DTYPES = dtypes_by_name(
    "torch.",
    "",
    "uint16=uint16 uint32=uint32 uint64=uint64 float8_e4m3fn=float8_e4m3fn float8_e5m2=float8_e5m2",
)
# Callables that old training wrappers hold in their hyper-parameters and callbacks: not called, kept as placeholders.
_INERT = frozenset(
    "argparse.Namespace copyreg._reconstructor copy_reg._reconstructor numpy.dtype "
    "numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct "
    "numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct "
    "pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath".split()
)
_STATES = ("state_dict", "model", "module")  # where training programs put the state dict
# The opcodes that push their argument, and those that push a new value.
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_FRESH: dict[str, Callable] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_NOT_PLAIN = object()


class Refused(Exception):
    """What is wrong with a file, as a line that lacks only the file's name."""


# What the standard library's parsers raise on hostile bytes, beside the refusals above.
DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Storage:
    """A run of `count` elements, from element `start` of the stored block `key` on."""

    key: str
    dtype: np.dtype
    count: int
    start: int = 0


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Name:
    """A class or function that a pickle names. It is never looked up."""

    text: str


@dataclass(eq=False)
class _Object:
    """Stands for an object whose class is not here; holds what the pickle put into it."""

    items: dict | None = None
    state: Any = None


def typed(value: Any, kind: type) -> Any:
    """The value, if it is of this kind. Raises ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def shown(text: object) -> str:
    """A name or message out of a file, fit to stand in one line."""
    return repr(str(text))[1:-1][:120]


def split_state(value: Any) -> tuple[dict[str, Tensor], dict]:
    """What a pickle built, as the tensors of its state dict and the plain values beside them."""
    if isinstance(value, _Object):
        raise Refused("holds a whole Python object, not a state dict; save its .state_dict() with torch.save")
    top = value if isinstance(value, dict) else {}
    key = next((key for key in _STATES if _holds_tensors(top.get(key))), None)
    found = top if key is None else top[key]
    found = found.items if isinstance(found, _Object) else found
    if not _holds_tensors(found):
        keys = ", ".join(shown(key) for key in list(top)[:8]) or "nothing"
        raise Refused(f"holds no tensors, neither under 'state_dict' or 'model' nor at the top, where there is: {keys}")
    tensors = {name: t for name, t in found.items() if isinstance(name, str) and isinstance(t, Tensor)}
    return tensors, _plain({name: entry for name, entry in top.items() if name != key}, [200_000])


def _holds_tensors(value: Any) -> bool:
    value = value.items if isinstance(value, _Object) else value
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _plain(value: Any, room: list[int], depth: int = 0) -> Any:
    """A copy of `value` with plain values only, or _NOT_PLAIN. `room` counts down: shared lists can unfold forever."""
    room[0] -= 1
    if room[0] < 0 or depth > 32:
        return _NOT_PLAIN
    if isinstance(value, _Name):
        return value.text
    if isinstance(value, _Object):
        value = {**(value.state if isinstance(value.state, dict) else {}), **(value.items or {})} or _NOT_PLAIN
    if isinstance(value, dict):
        pairs = [(_key_text(key), _plain(entry, room, depth + 1)) for key, entry in value.items()]
        return {key: entry for key, entry in pairs if entry is not _NOT_PLAIN}
    if isinstance(value, list | tuple):
        entries = []
        for entry in value:
            if (plain := _plain(entry, room, depth + 1)) is _NOT_PLAIN:
                return _NOT_PLAIN
            entries.append(plain)
        return type(value)(entries)
    return value if value is None or isinstance(value, bool | int | float | str | bytes) else _NOT_PLAIN


def _key_text(key: Any) -> Any:
    return key.text if isinstance(key, _Name) else key


def view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Checks that a view stays inside its storage. Extra arguments (gradients, hooks) are of no use here."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Refused("damaged: a tensor without storage, shape or strides")
    if any(type(n) is not int or not 0 <= n < 2**62 for n in (offset, *shape, *strides)):
        raise Refused("damaged: a tensor with a negative or huge size, stride or offset")
    if len(shape) != len(strides) or len(shape) > 32:
        raise Refused("damaged: a tensor with another number of strides than of sizes")
    if math.prod(max(n, 1) for n in shape) * storage.dtype.itemsize >= 2**62:
        raise Refused("refused: a tensor of a size that no machine holds")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return Tensor(replace(storage, count=0, start=0), 0, shape, (0,) * len(shape))
    if last >= storage.count:
        raise Refused("refused: a tensor that reaches out of its storage")
    # The stride of an axis of one element is arbitrary in PyTorch and would only serve to overflow.
    return Tensor(storage, offset, shape, tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)))


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, name: Any, *_: Any):
    dtype = _DTYPES[name.text]
    return view(replace(storage, dtype=dtype, count=storage.count // dtype.itemsize), offset, shape, strides)


def _pairs(pairs: Any = ()) -> dict:
    return {_key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


def _key(key: Any) -> Any:
    """A dict key whose hash is cheap: nested tuples take forever to hash, and huge integers can be made to collide."""
    for part in key if isinstance(key, tuple) else (key,):
        plain = part is None or isinstance(part, float | str | bytes | _Name)
        if not plain and not (isinstance(part, int) and abs(part) < 2**60):
            raise Refused("refused: its pickle has a dict key that is no plain value")
    return key


# The only callables that a pickle may call, by name, and what is done instead of calling them.
_BUILDERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": view,
    "torch._utils._rebuild_tensor_v2": view,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda build, _type, arguments, _state: _reduce(build, arguments),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda kind, index=None: kind if index is None else f"{kind}:{index}",
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": lambda _factory=None, pairs=(): _pairs(pairs),
    "collections.Counter": _pairs,
    "builtins.set": list,
    "__builtin__.set": list,
    "builtins.frozenset": list,
    "__builtin__.frozenset": list,
    "_codecs.encode": lambda text, _encoding: text.encode("latin-1"),
}


def _reduce(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise ValueError("its pickle calls what is no function")
    if function.text in _INERT:
        return _Object()
    if function.text not in _BUILDERS:
        raise Refused(f"refused: its pickle would call {shown(function.text)}")
    return _BUILDERS[function.text](*arguments)


def unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, tuple[np.dtype, int]]]:
    """Interprets one pickle and leaves the stream after it.

    Returns:
      What it built, and every stored block that it names: key -> (dtype, number of elements).
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _OPCODES:
            raise Refused(f"refused: its pickle has more than {_OPCODES} opcodes")
        machine.step(opcode.name, argument)
    return machine.stack.pop(), machine.blocks


class _Machine:
    """The stack machine of the pickle opcodes (protocols 0 to 5), less everything that could run code."""

    def __init__(self):
        self.stack: list = []
        self.blocks: dict[str, tuple[np.dtype, int]] = {}
        self._below: list[list] = []  # the stacks under each open MARK
        self._memo: dict[int, Any] = {}

    def _mark(self) -> list:
        """Takes the values above the last MARK."""
        items, self.stack = self.stack, self._below.pop()
        return items

    def _extend(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], _Object):
            raise ValueError("its pickle appends to what is no list")

    def _update(self, items: list) -> None:
        """Sets the pairs of [key, value, key, value, ...] in the dict on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, _Object):
            target.items = target.items or {}
            target = target.items
        typed(target, dict).update(_pairs(zip(items[::2], items[1::2], strict=True)))

    def _storage(self, kind: Any, named: Any, key: Any, _device: Any, count: Any, view: Any = None) -> Storage:
        """A persistent id of torch.save: ("storage", class, key, device, elements[, view of it in the old format])."""
        if kind != "storage" or type(count) is not int or not 0 <= count < 2**56:
            raise ValueError("its pickle names a storage in an unknown way")
        name = typed(named, _Name).text.replace("torch.cuda.", "torch.")
        if name not in _STORAGES:
            raise Refused(f"holds tensors of the unsupported type {shown(name)}")
        block = (_STORAGES[name], count)
        if self.blocks.setdefault(typed(key, str), block) != block:
            raise Refused(f"damaged: storage '{shown(key)}' is said to have two sizes or types")
        if view is None:
            return Storage(key, *block)
        _, start, size = view
        if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > count:
            raise Refused(f"refused: a view that reaches out of storage '{shown(key)}'")
        return Storage(key, block[0], size, start)

    def step(self, op: str, arg: Any) -> None:
        """Executes one opcode, named as pickletools names it."""
        stack = self.stack
        match op:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[arg] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "POP_MARK":
                self._mark()
            case "POP":
                stack.pop() if stack else self._mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                items = self._mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(op[-1])
                if len(stack) < size:
                    raise IndexError("its pickle takes from an empty stack")
                stack[-size:] = [tuple(stack[-size:])]
            case "LIST" | "FROZENSET":
                items = self._mark()
                self.stack.append(items)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self._extend(self._mark())
            case "DICT":
                items = self._mark()
                self.stack.append({})
                self._update(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._mark())
            case "GLOBAL":
                stack.append(_Name(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = typed(stack.pop(), str), typed(stack.pop(), str)
                stack.append(_Name(f"{module}.{name}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_reduce(function, arguments))
            case "OBJ" | "INST":
                items = self._mark()
                name = items.pop(0) if op == "OBJ" else _Name(arg.replace(" ", ".", 1))
                self.stack.append(_reduce(name, tuple(items)))
            case "NEWOBJ" | "NEWOBJ_EX":
                # Making an instance runs nothing of an unknown class: there is no class, only a placeholder.
                arguments = [stack.pop() for _ in range(2 if op == "NEWOBJ" else 3)]
                name = arguments.pop()
                known = isinstance(name, _Name) and name.text in _BUILDERS
                stack.append(_reduce(name, arguments[-1]) if known else _Object())
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Object):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(self._storage(*typed(stack.pop(), tuple)))
            case _ if op in _FRESH:
                stack.append(_FRESH[op]())
            case _ if op in _LITERALS:
                if isinstance(arg, int) and arg.bit_length() > 128:
                    raise ValueError("its pickle holds a huge integer")
                stack.append(arg)
            case _:
                raise Refused(f"refused: its pickle uses the opcode {op}")
