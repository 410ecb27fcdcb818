"""Reads PyTorch files (the zip format and the one before 1.6) and safetensors, without PyTorch.

Nothing in a file is run: see `torch_pickle` for what becomes of its pickle.
Formats: torch.save (PyTorch's serialization notes), safetensors (its format page).
"""

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from vqgan_jax.config import UserError
from vqgan_jax.storage import path as user_path
from vqgan_jax.torch_pickle import (
    DAMAGE,
    Refused,
    Storage,
    Tensor,
    dtypes_by_name,
    shown,
    split_state,
    typed,
    unpickle,
    view,
)

# Far above any checkpoint of this field (about 200 bytes a tensor), far below what hurts a machine.
_HEADER_BYTES = 16 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


_SAFETENSORS = dtypes_by_name(
    "",
    "",
    "BOOL=bool U8=uint8 U16=uint16 U32=uint32 U64=uint64 I8=int8 I16=int16 I32=int32 I64=int64 F16=float16 "
    "BF16=bfloat16 F32=float32 F64=float64 F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2 C64=complex64",
)


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of a file by name, each read from the disk when asked for. Close it, or use it in a `with`.

    Attributes:
      path: the file.
      metadata: the plain values beside the tensors (epoch, global_step, hyper_parameters, ...): dicts, lists, tuples,
        str, bytes, numbers, bool, None. Objects of unknown classes show as the dict they held; the rest is left out.
    """

    def __init__(self, path: epath.Path, tensors: dict[str, Tensor], metadata: dict, start: Callable, close: Callable):
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

    The tensors are those of the state dict: the value of "state_dict", "model" or "module" at the top, whichever holds
    tensors, else the tensors at the top.

    Raises:
      UserError: one line that starts with the path: no such file, an unknown format, a damaged or lying file, no
        tensors inside, or a pickle that would call something ("refused: its pickle would call posix.system").
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder or device, not a file' if path.exists() else 'no such file'}")
    with _one_line(path), contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("rb"))
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
            raise Refused(_unknown_format(head))
        # Views that overlap or repeat one element are honest in small numbers; beyond that they are a bomb.
        if sum(t.nbytes for t in tensors.values()) > _room(size):
            raise Refused(f"refused: its tensors would take far more memory than the {size} bytes of the file")
        return TensorFile(path, tensors, metadata, start, opened.pop_all().close)


@contextlib.contextmanager
def _one_line(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({shown(error.strerror or error)})") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory") from None
    except DAMAGE as error:
        raise UserError(f"{path}: damaged or cut short ({type(error).__name__}: {shown(error)})") from None


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


def _open_zip(archive: zipfile.ZipFile, size: int) -> tuple[dict[str, Tensor], dict, Callable]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise Refused("refused: two entries of the zip file have one name")
    if sum(entry.compress_size for entry in entries.values()) > size:
        raise Refused("refused: entries of the zip file overlap")
    for entry in entries.values():
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not stored and (entry.compress_type != zipfile.ZIP_DEFLATED or entry.file_size > _room(size)):
            raise Refused(f"refused: the entry '{shown(entry.filename)}' of the zip file lies about its size")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("is a zip file, but not one of torch.save: no data.pkl")
    root = roots[0]
    if f"{root}byteorder" in entries and archive.open(f"{root}byteorder").read(16).strip() != b"little":
        raise Refused("was written on a big-endian machine; save it again on a little-endian one")
    if entries[f"{root}data.pkl"].file_size > _HEADER_BYTES:
        raise Refused(f"refused: its pickle is longer than {_HEADER_BYTES >> 20} MiB")
    value, blocks = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))
    for key, (dtype, count) in blocks.items():
        entry = entries.get(f"{root}data/{key}")
        if entry is None or entry.file_size != count * dtype.itemsize:
            raise Refused(f"damaged: storage '{shown(key)}' is absent or has another size than its pickle says")
    return *split_state(value), lambda key: archive.open(f"{root}data/{key}")


def _seeker(file: IO[bytes], starts: dict[str, int]) -> Callable[[str], IO[bytes]]:
    def start(key: str) -> IO[bytes]:
        file.seek(starts[key])
        return file

    return start


def _open_legacy(file: IO[bytes], size: int) -> tuple[dict[str, Tensor], dict, Callable]:
    file.seek(0)
    stream = io.BytesIO(file.read(_HEADER_BYTES))
    magic, _ = unpickle(stream)
    if magic != _LEGACY_MAGIC:
        raise Refused("is a pickle, but not one of torch.save")
    protocol, _ = unpickle(stream)
    system, _ = unpickle(stream)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("was written by an unknown version of torch.save or on a big-endian machine")
    value, blocks = unpickle(stream)
    keys, _ = unpickle(stream)
    position, starts = stream.tell(), {}
    for key in keys:
        dtype, count = blocks.pop(typed(key, str))
        file.seek(position)
        if int.from_bytes(file.read(8), "little", signed=True) != count:
            raise Refused(f"damaged: storage '{shown(key)}' has another size than its pickle says")
        starts[key] = position + 8
        position += 8 + count * dtype.itemsize
    if blocks or position > size:
        raise Refused("cut short: it ends before its last storage")
    return *split_state(value), _seeker(file, starts)


def _open_safetensors(file: IO[bytes], size: int) -> tuple[dict[str, Tensor], dict, Callable]:
    def unique(pairs: list[tuple[str, Any]]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise Refused("refused: its header says one name twice")
        return dict(pairs)

    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, _HEADER_BYTES):
        raise Refused(f"is no .safetensors file: its header would be {length} bytes long")
    header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    base, end, tensors = 8 + length, 0, {}
    metadata = header.pop("__metadata__", {})
    if not all(type(text) is str for text in metadata.values()):
        raise Refused("damaged: its header's __metadata__ holds something other than text")
    ends = sorted((entry["data_offsets"], name) for name, entry in header.items())
    for (first, last), name in ends:
        if type(first) is not int or type(last) is not int or first != end or last < first:
            raise Refused(f"damaged: the data of '{shown(name)}' overlaps other data or leaves a hole")
        dtype, shape = _SAFETENSORS[header[name]["dtype"]], tuple(header[name]["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        tensors[name] = view(Storage(name, dtype, (last - first) // dtype.itemsize), 0, shape, strides)
        if tensors[name].nbytes != last - first:
            raise Refused(f"damaged: '{shown(name)}' has another size than its shape says")
        end = last
    if base + end != size:
        raise Refused(f"damaged: its header tells of {base + end} bytes, the file has {size}")
    starts = {name: base + first for (first, _), name in ends}
    return {name: tensors[name] for name in header}, metadata, _seeker(file, starts)
