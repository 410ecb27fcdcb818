"""Reads PyTorch files (the zip format and the one before 1.6) and safetensors, without PyTorch.

A pickle is a program, so it is not handed to `pickle`: its opcodes are interpreted here, where they can build plain
values, descriptions of tensors and inert placeholders. Nothing that a file names is ever imported or called.
Formats: torch.save (PyTorch's serialization notes), safetensors (its format page), the pickle opcodes (pickletools).
"""

import contextlib
import io
import json
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from vqgan_jax.config import UserError

# Far above any checkpoint of this field (about 30 opcodes and 200 bytes a tensor), far below what hurts a machine.
_HEADER_BYTES = 16 << 20
_OPCODES = 2_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def _table(prefix: str, suffix: str, pairs: str) -> dict[str, np.dtype]:
    """A format's names of types, as numpy dtypes (those that numpy lacks are in ml_dtypes)."""
    names = [pair.split("=") for pair in pairs.split()]
    return {f"{prefix}{theirs}{suffix}": np.dtype(getattr(ml_dtypes, ours, ours)) for theirs, ours in names}


_SAFETENSORS = _table(
    "",
    "",
    "BOOL=bool U8=uint8 U16=uint16 U32=uint32 U64=uint64 I8=int8 I16=int16 I32=int32 I64=int64 F16=float16 "
    "BF16=bfloat16 F32=float32 F64=float64 F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2 C64=complex64",
)
_STORAGES = _table(
    "torch.",
    "Storage",
    "Float=float32 Double=float64 Half=float16 BFloat16=bfloat16 Long=int64 Int=int32 Short=int16 Char=int8 Byte=uint8 "
    "Bool=bool ComplexFloat=complex64 ComplexDouble=complex128 Untyped=uint8 storage.Untyped=uint8",
)
# The types that PyTorch rebuilds from untyped storages because they have no storage class of their own.
_DTYPES = _table(
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


class _Refused(Exception):
    """What is wrong with a file, as a line that lacks only the file's name."""


# What the standard library's parsers raise on hostile bytes, beside the refusals above.
_DAMAGE = (
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
class _Storage:
    """A run of `count` elements, from element `start` of the stored block `key` on."""

    key: str
    dtype: np.dtype
    count: int
    start: int = 0


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
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


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each read from the disk when asked for. Close it, or use it in a `with`.

    Attributes:
      path: the file.
      metadata: the plain values beside the tensors (epoch, global_step, hyper_parameters, ...): dicts, lists, tuples,
        str, bytes, numbers, bool, None. Objects of unknown classes show as the dict they held; the rest is left out.
    """

    def __init__(self, path: Path, tensors: dict[str, _Tensor], metadata: dict, start: Callable, close: Callable):
        self.path = path
        self.metadata = metadata
        self._tensors, self._start, self.close = tensors, start, close

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor, C-contiguous and writable, in the dtype it is stored in. Raises UserError if damaged."""
        tensor = self._tensors[name]
        storage = tensor.storage
        with _one_line(self.path):
            itemsize = storage.dtype.itemsize
            block = np.empty((storage.start + storage.count) * itemsize, np.uint8)
            _fill(block, self._start(storage.key))
            # A bool of any byte but 0 and 1 breaks numpy's arithmetic, so the bytes are compared, not viewed.
            flat = block != 0 if storage.dtype == np.bool_ else block.view(storage.dtype)
            strides = [s * itemsize for s in tensor.strides]
            flat = flat[storage.start + tensor.offset :]
            view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
            whole = view.nbytes == block.nbytes and view.flags.c_contiguous
            return view if whole else np.array(view, order="C")

    def read(self, name: str, dtype: Any = np.float32) -> np.ndarray:
        """Reads one tensor and converts it to `dtype`."""
        return self[name].astype(dtype, copy=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor as stored (bfloat16 and float8 are those of ml_dtypes), without reading it."""
        return self._tensors[name].storage.dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tensors(path: str | os.PathLike) -> TensorFile:
    """Opens a .ckpt / .pth / .pt file of torch.save (either format) or a .safetensors file, and checks its sizes.

    The tensors are those of the state dict: the value of "state_dict" at the top, else the tensors at the top.

    Raises:
      UserError: one line that starts with the path: no such file, an unknown format, a damaged or lying file, no
        tensors inside, or a pickle that would call something ("refused: its pickle would call posix.system").
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder or device, not a file' if path.exists() else 'no such file'}")
    with _one_line(path), contextlib.ExitStack() as opened:
        file = opened.enter_context(open(path, "rb"))
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(512)
        if head.startswith(b"PK\x03\x04"):
            tensors, metadata, start = _open_zip(opened.enter_context(zipfile.ZipFile(file)), size)
        # Before the pickles: the length that a safetensors file starts with can look like a pickle's first byte.
        elif path.suffix == ".safetensors" or head[8:9] == b"{":
            tensors, metadata, start = _open_safetensors(file, size)
        elif head.startswith(b"\x80"):
            tensors, metadata, start = _open_legacy(file, size)
        else:
            raise _Refused(_unknown_format(head))
        # Views that overlap or repeat one element are honest in small numbers; beyond that they are a bomb.
        if sum(t.nbytes for t in tensors.values()) > _room(size):
            raise _Refused(f"refused: its tensors would take far more memory than the {size} bytes of the file")
        return TensorFile(path, tensors, metadata, start, opened.pop_all().close)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_shown(error.strerror or error)})") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory") from None
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged or cut short ({type(error).__name__}: {_shown(error)})") from None


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def _shown(text: object) -> str:
    """A name or message out of a file, fit to stand in one line."""
    return repr(str(text))[1:-1][:120]


def _room(size: int) -> int:
    """How many bytes a file of `size` bytes may grow to in memory."""
    return 16 * size + (64 << 20)


def _unknown_format(head: bytes) -> str:
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull'"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not weights; the download went to a page that asks something, fetch it in a browser"
    return "is neither a PyTorch file (.ckpt, .pth, .pt) nor a .safetensors file"


def _fill(block: np.ndarray, stream: IO[bytes]) -> None:
    """Reads block.size bytes in pieces, so that a storage is in memory once."""
    done = 0
    while done < block.size:
        piece = stream.read(min(1 << 20, block.size - done))
        if not piece:
            raise EOFError(f"{block.size - done} bytes are missing")
        block[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)


def _open_zip(archive: zipfile.ZipFile, size: int) -> tuple[dict[str, _Tensor], dict, Callable]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise _Refused("refused: two entries of the zip file have one name")
    if sum(entry.compress_size for entry in entries.values()) > size:
        raise _Refused("refused: entries of the zip file overlap")
    for entry in entries.values():
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not stored and (entry.compress_type != zipfile.ZIP_DEFLATED or entry.file_size > _room(size)):
            raise _Refused(f"refused: the entry '{_shown(entry.filename)}' of the zip file lies about its size")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise _Refused("is a zip file, but not one of torch.save: no data.pkl")
    root = roots[0]
    if f"{root}byteorder" in entries and archive.open(f"{root}byteorder").read(16).strip() != b"little":
        raise _Refused("was written on a big-endian machine; save it again on a little-endian one")
    if entries[f"{root}data.pkl"].file_size > _HEADER_BYTES:
        raise _Refused(f"refused: its pickle is longer than {_HEADER_BYTES >> 20} MiB")
    value, blocks = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))
    for key, (dtype, count) in blocks.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size != count * dtype.itemsize:
            raise _Refused(f"damaged: storage '{_shown(key)}' is absent or has another size than its pickle says")
    return *_split(value), lambda key: archive.open(f"{root}data/{key}")


def _seeker(file: IO[bytes], starts: dict[str, int]) -> Callable[[str], IO[bytes]]:
    def start(key: str) -> IO[bytes]:
        file.seek(starts[key])
        return file

    return start


def _open_legacy(file: IO[bytes], size: int) -> tuple[dict[str, _Tensor], dict, Callable]:
    file.seek(0)
    stream = io.BytesIO(file.read(_HEADER_BYTES))
    magic, _ = _unpickle(stream)
    if magic != _LEGACY_MAGIC:
        raise _Refused("is a pickle, but not one of torch.save")
    protocol, _ = _unpickle(stream)
    system, _ = _unpickle(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _Refused("was written by an unknown version of torch.save or on a big-endian machine")
    value, blocks = _unpickle(stream)
    keys, _ = _unpickle(stream)
    position, starts = stream.tell(), {}
    for key in keys:
        dtype, count = blocks.pop(_typed(key, str))
        file.seek(position)
        if int.from_bytes(file.read(8), "little", signed=True) != count:
            raise _Refused(f"damaged: storage '{_shown(key)}' has another size than its pickle says")
        starts[key] = position + 8
        position += 8 + count * dtype.itemsize
    if blocks or position > size:
        raise _Refused("cut short: it ends before its last storage")
    return *_split(value), _seeker(file, starts)


def _open_safetensors(file: IO[bytes], size: int) -> tuple[dict[str, _Tensor], dict, Callable]:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise _Refused("refused: its header says one name twice")
        return dict(pairs)

    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _HEADER_BYTES):
        raise _Refused(f"is no .safetensors file: its header would be {length} bytes long")
    header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    base, end, tensors = 8 + length, 0, {}
    metadata = header.pop("__metadata__", {})
    if not all(type(text) is str for text in metadata.values()):
        raise _Refused("damaged: its header's __metadata__ holds something other than text")
    ends = sorted((entry["data_offsets"], name) for name, entry in header.items())
    for (first, last), name in ends:
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise _Refused(f"damaged: the data of '{_shown(name)}' overlaps other data or leaves a hole")
        dtype, shape = _SAFETENSORS[header[name]["dtype"]], tuple(header[name]["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors[name] = _tensor(_Storage(name, dtype, (last - first) // dtype.itemsize), 0, shape, strides)
        if tensors[name].nbytes != last - first:
            raise _Refused(f"damaged: '{_shown(name)}' has another size than its shape says")
        end = last
    if base + end != size:
        raise _Refused(f"damaged: its header tells of {base + end} bytes, the file has {size}")
    starts = {name: base + first for (first, _), name in ends}
    return {name: tensors[name] for name in header}, metadata, _seeker(file, starts)


def _split(value: Any) -> tuple[dict[str, _Tensor], dict]:
    """What a pickle built, as the tensors of its state dict and the plain values beside them."""
    if isinstance(value, _Object):
        raise _Refused("holds a whole Python object, not a state dict; save its .state_dict() with torch.save")
    top = value if isinstance(value, dict) else {}
    found = top.get("state_dict", top)
    found = found.items if isinstance(found, _Object) else found
    if not isinstance(found, dict) or not any(isinstance(tensor, _Tensor) for tensor in found.values()):
        keys = ", ".join(_shown(key) for key in list(top)[:8]) or "nothing"
        raise _Refused(f"holds no tensors, neither under 'state_dict' nor at the top, where there is: {keys}")
    tensors = {name: t for name, t in found.items() if isinstance(name, str) and isinstance(t, _Tensor)}
    return tensors, _plain({key: entry for key, entry in top.items() if key != "state_dict"}, [200_000])


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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Checks that a view stays inside its storage. Extra arguments (gradients, hooks) are of no use here."""
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise _Refused("damaged: a tensor without storage, shape or strides")
    if any(type(n) is not int or not 0 <= n < 2**62 for n in (offset, *shape, *strides)):
        raise _Refused("damaged: a tensor with a negative or huge size, stride or offset")
    if len(shape) != len(strides) or len(shape) > 32:
        raise _Refused("damaged: a tensor with another number of strides than of sizes")
    if math.prod(max(n, 1) for n in shape) * storage.dtype.itemsize >= 2**62:
        raise _Refused("refused: a tensor of a size that no machine holds")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return _Tensor(replace(storage, count=0, start=0), 0, shape, (0,) * len(shape))
    if last >= storage.count:
        raise _Refused("refused: a tensor that reaches out of its storage")
    # The stride of an axis of one element is arbitrary in PyTorch and would only serve to overflow.
    return _Tensor(storage, offset, shape, tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)))


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, name: Any, *_: Any):
    dtype = _DTYPES[name.text]
    return _tensor(replace(storage, dtype=dtype, count=storage.count // dtype.itemsize), offset, shape, strides)


def _pairs(pairs: Any = ()) -> dict:
    return {_key(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


def _key(key: Any) -> Any:
    """A dict key whose hash is cheap: nested tuples take forever to hash, and huge integers can be made to collide."""
    for part in key if isinstance(key, tuple) else (key,):
        plain = part is None or isinstance(part, float | str | bytes | _Name)
        if not plain and not (isinstance(part, int) and abs(part) < 2**60):
            raise _Refused("refused: its pickle has a dict key that is no plain value")
    return key


# The only callables that a pickle may call, by name, and what is done instead of calling them.
_BUILDERS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
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
        raise _Refused(f"refused: its pickle would call {_shown(function.text)}")
    return _BUILDERS[function.text](*arguments)


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, tuple[np.dtype, int]]]:
    """Interprets one pickle and leaves the stream after it.

    Returns:
      What it built, and every stored block that it names: key -> (dtype, number of elements).
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > _OPCODES:
            raise _Refused(f"refused: its pickle has more than {_OPCODES} opcodes")
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
        _typed(target, dict).update(_pairs(zip(items[::2], items[1::2], strict=True)))

    def _storage(self, kind: Any, named: Any, key: Any, _device: Any, count: Any, view: Any = None) -> _Storage:
        """A persistent id of torch.save: ("storage", class, key, device, elements[, view of it in the old format])."""
        if kind != "storage" or type(count) is not int or not 0 <= count < 2**56:
            raise ValueError("its pickle names a storage in an unknown way")
        name = _typed(named, _Name).text.replace("torch.cuda.", "torch.")
        if name not in _STORAGES:
            raise _Refused(f"holds tensors of the unsupported type {_shown(name)}")
        block = (_STORAGES[name], count)
        if self.blocks.setdefault(_typed(key, str), block) != block:
            raise _Refused(f"damaged: storage '{_shown(key)}' is said to have two sizes or types")
        if view is None:
            return _Storage(key, *block)
        _, start, size = view
        if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > count:
            raise _Refused(f"refused: a view that reaches out of storage '{_shown(key)}'")
        return _Storage(key, block[0], size, start)

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
                name, module = _typed(stack.pop(), str), _typed(stack.pop(), str)
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
                stack.append(self._storage(*_typed(stack.pop(), tuple)))
            case _ if op in _FRESH:
                stack.append(_FRESH[op]())
            case _ if op in _LITERALS:
                if isinstance(arg, int) and arg.bit_length() > 128:
                    raise ValueError("its pickle holds a huge integer")
                stack.append(arg)
            case _:
                raise _Refused(f"refused: its pickle uses the opcode {op}")
