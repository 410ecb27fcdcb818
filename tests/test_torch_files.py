"""The reader of PyTorch files: every kind of tensor in both formats, nothing run, one line for every lie."""

import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vqgan_jax.config import UserError
from vqgan_jax.torch_files import open_tensors

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


# A small assembler of pickle opcodes, to write what no honest program would.
def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def mapping(**pairs: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def call(function: str, *arguments: bytes) -> bytes:
    return name(function) + several(*arguments) + b"R"


def storage(key: str = "0", count: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return several(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(block: bytes | None = None, offset: int = 0, shape: tuple = (4,), strides: tuple = (1,)) -> bytes:
    return call(
        "torch._utils._rebuild_tensor_v2",
        block or storage(),
        number(offset),
        several(*map(number, shape)),
        several(*map(number, strides)),
        b"\x89",
        call("collections.OrderedDict"),
    )


FOUR = np.arange(4, dtype=np.float32)


def write_zip(
    path: Path, value: bytes, blocks: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + value + b".")
        for key, data in ({"0": FOUR.tobytes()} if blocks is None else blocks).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_legacy(path: Path, value: bytes, blocks: dict[str, np.ndarray]) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    with path.open("wb") as file:
        file.write(b"".join(pickle.dumps(part, 2) for part in head))
        file.write(b"\x80\x02" + value + b"." + pickle.dumps(list(blocks), 2))
        for data in blocks.values():
            file.write(struct.pack("<q", data.size) + data.tobytes())
    return path


def refusal(path: Path) -> str:
    """The one line that opening and reading all of `path` ends in."""
    with pytest.raises(UserError) as caught, open_tensors(path) as file:
        for key in file:
            file[key]
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("file", ["torch_kinds.ckpt", "torch_kinds_legacy.ckpt"])
def test_every_kind_of_tensor_equals_what_pytorch_wrote(file):
    # Written by PyTorch 2.13 in its two formats: odd strides, shared storages, all dtypes, parameters, wrapped objects.
    wanted = np.load(GOLDEN / "torch_kinds.npz")
    with open_tensors(GOLDEN / file) as tensors:
        assert list(tensors) == wanted.files
        for key in tensors:
            value = tensors[key]
            assert value.shape == wanted[key].shape == tensors.shape(key)
            assert tensors.dtype(key) == value.dtype == (ml_dtypes.bfloat16 if key == "bf16" else wanted[key].dtype)
            assert value.flags.c_contiguous and value.flags.writeable
            np.testing.assert_array_equal(value.astype(wanted[key].dtype), wanted[key])
        assert tensors.read("half").dtype == np.float32
        assert tensors.metadata["epoch"] == 7
        assert tensors.metadata["optimizer_states"] == [
            {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "betas": (0.5, 0.9)}]}
        ]
        assert tensors.metadata["hyper_parameters"] == {
            "lr": 1e-4,
            "ns": {"a": 1},
            "size": (2, 3),
            "dev": "cuda:1",
            "dt": "torch.float16",
            "s": [1, 2],
            "dd": {"k": [1]},
            "blob": b"\xff\x00",
            "big": 2**70,
        }


def test_both_formats_of_one_model_are_equal():
    with (
        open_tensors(GOLDEN / "vqseg_tiny.ckpt") as new,
        open_tensors(GOLDEN / "vqseg_tiny_legacy_format.ckpt") as old,
    ):
        assert list(new) == list(old) and len(old) == 152
        assert all(np.array_equal(new[key], old[key]) for key in new)
        assert old.metadata["hyper"] == {"best": "x"}


def test_malicious_file_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(GOLDEN / "malicious.ckpt") == "refused: its pickle would call posix.system"
    assert not os.listdir(tmp_path)


class Touch:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_by_name_in_every_protocol(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(Touch(), protocol))
    line = refusal(Path("evil.pth"))
    assert line == "refused: its pickle would call posix.system" if protocol >= 2 else "neither a PyTorch file" in line
    assert os.listdir() == ["evil.pth"]


@pytest.mark.parametrize(
    "attack",
    [
        call("os.system", text("touch ran")),
        b"(" + name("os.system") + text("touch ran") + b"o",
        b"(" + text("touch ran") + b"ios\nsystem\n",
        text("os") + text("system") + b"\x93" + several(text("touch ran")) + b"R",
        call("torch._tensor._rebuild_from_type_v2", name("os.system"), b"N", several(text("touch ran")), b"N"),
    ],
    ids=["reduce", "obj", "inst", "stack_global", "through a builder"],
)
def test_every_way_to_call_is_refused(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor(), x=attack))
    assert refusal(path) == "refused: its pickle would call os.system"
    assert os.listdir() == ["x.ckpt"]


def test_objects_of_unknown_classes_are_inert(tmp_path):
    # NEWOBJ and BUILD of a class that would run code when made or unpickled; SETITEMS and APPENDS onto it.
    thing = name("subprocess.Popen") + several(text("touch ran")) + b"\x81" + mapping(args=text("x")) + b"b"
    filled = name("my.Dict") + b")\x81(" + text("k") + number(1) + b"u(" + number(2) + b"e"
    path = write_zip(tmp_path / "x.ckpt", mapping(state_dict=mapping(w=tensor()), thing=thing, filled=filled))
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["w"], FOUR)
        assert tensors.metadata == {"thing": {"args": "x"}, "filled": {"k": 1}}


LIES = {
    "longer than its storage": (tensor(shape=(5,)), "out of its storage"),
    "stride": (tensor(shape=(2, 2), strides=(3, 2)), "out of its storage"),
    "offset": (tensor(offset=1), "out of its storage"),
    "negative offset": (tensor(offset=-1), "negative or huge"),
    "negative stride": (tensor(strides=(-1,)), "negative or huge"),
    "negative size": (tensor(shape=(-4,)), "negative or huge"),
    "product overflows": (tensor(shape=(2**31,) * 3, strides=(0,) * 3), "no machine holds"),
    "empty but huge": (tensor(shape=(0, 2**61, 8), strides=(1,) * 3), "no machine holds"),
    "offset overflows": (tensor(offset=2**62), "negative or huge"),
    "expanded into a bomb": (tensor(shape=(2**36,), strides=(0,)), "more memory"),
    "strides missing": (tensor(shape=(2, 2), strides=(1,)), "number of strides"),
    "storage too large": (tensor(storage(count=5)), "another size"),
    "storage absent": (tensor(storage(key="1")), "absent"),
    "storage of another place": (tensor(storage(key="../data.pkl")), "another size"),
    "storage with two types": (several(tensor(), tensor(storage(count=2, kind="torch.LongStorage"))), "two sizes"),
    "unsupported type": (tensor(storage(kind="torch.QInt8Storage")), "torch.QInt8Storage"),
    "extension opcode": (b"\x82\x01", "opcode EXT1"),
    "huge integer": (b"\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000, "huge integer"),
    "huge length": (b"\x8e" + struct.pack("<Q", 2**60) + b"x", "damaged"),
    "empty stack": (b"0" * 9, "damaged"),
    "keys that collide": (b"}(" + number(2**61 - 1) + b"N" + number(2**62 - 2) + b"Nu", "no plain value"),
    "key of nested tuples": (b"}" + b"".join([b")"] + [b"2\x86"] * 60) + b"Ns", "no plain value"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_a_zip_file_are_one_line(lie, tmp_path):
    value, reason = LIES[lie]
    assert reason in refusal(write_zip(tmp_path / "x.ckpt", mapping(w=value)))


def test_stride_of_an_axis_of_one_element_is_free(tmp_path):
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor(shape=(1, 4), strides=(2**61, 1))))
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["w"], FOUR[None])


def test_bombs_that_unfold_on_copying_are_left_out(tmp_path):
    doubled = b"".join([b"]"] + [b"2\x86"] * 60)
    nested = b"]" * 100_000 + b"a" * 99_999
    memo = text("here") + b"r" + struct.pack("<I", 2**32 - 1)
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor(), doubled=doubled, nested=nested, memo=memo))
    with open_tensors(path) as tensors:
        assert tensors.metadata == {"memo": "here"}
        np.testing.assert_array_equal(tensors["w"], FOUR)


def test_endless_pickle_is_refused(tmp_path):
    assert "more than 2000000 opcodes" in refusal(write_zip(tmp_path / "x.ckpt", b"N0" * 1_100_000 + tensor()))


def test_deflated_entries_are_read_and_zip_bombs_are_not(tmp_path):
    path = write_zip(tmp_path / "a.ckpt", mapping(w=tensor()), method=zipfile.ZIP_DEFLATED)
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["w"], FOUR)
    count = 40_000_000
    bomb = {"0": bytes(count * 4)}
    path = write_zip(tmp_path / "b.ckpt", mapping(w=tensor(storage(count=count))), bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1e6 and "lies about its size" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_entries_are_refused(tmp_path):
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", FOUR.tobytes())
    assert "one name" in refusal(path)


def test_a_flipped_bit_spoils_its_tensor_alone(tmp_path):
    value = mapping(a=tensor(), b=tensor(storage("1")))
    path = write_zip(tmp_path / "x.ckpt", value, {"0": FOUR.tobytes(), "1": (FOUR + 7).tobytes()})
    data = path.read_bytes()
    path.write_bytes(data.replace((FOUR + 7).tobytes(), (FOUR + 6).tobytes()))
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["a"], FOUR)
        with pytest.raises(UserError, match="CRC"):
            tensors["b"]


def test_big_endian_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    assert "big-endian" in refusal(path)


def test_old_format_knows_views_of_storages_and_their_lies(tmp_path):
    def view(start: int, size: int) -> bytes:
        parts = (text("0"), text("cpu"), number(6), several(text("v"), number(start), number(size)))
        return several(text("storage"), name("torch.cuda.FloatStorage"), *parts) + b"Q"

    blocks = {"0": np.arange(6, dtype=np.float32)}
    path = write_legacy(tmp_path / "x.pth", mapping(w=tensor(view(2, 4)), whole=tensor(storage(count=6))), blocks)
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["w"], FOUR + 2)
        np.testing.assert_array_equal(tensors["whole"], FOUR)
    path.write_bytes(path.read_bytes()[:-1])
    assert "ends before its last storage" in refusal(path)
    assert "reaches out" in refusal(write_legacy(path, mapping(w=tensor(view(3, 4))), blocks))
    assert "another size" in refusal(write_legacy(path, mapping(w=tensor()), blocks))
    assert "ends before its last storage" in refusal(write_legacy(path, mapping(w=tensor()), {}))


def test_bools_of_any_byte_are_true(tmp_path):
    value = mapping(w=tensor(storage(kind="torch.BoolStorage")))
    with open_tensors(write_zip(tmp_path / "x.ckpt", value, {"0": bytes([0, 1, 2, 255])})) as tensors:
        assert tensors["w"].view(np.uint8).tolist() == [0, 1, 1, 1]


def test_safetensors_round_trip(tmp_path):
    wanted = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "a": np.arange(4, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(2.5, np.float64),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(wanted, path, metadata={"format": "pt"})
    with open_tensors(path) as tensors:
        assert set(tensors) == set(wanted) and tensors.metadata == {"format": "pt"}
        for key, value in wanted.items():
            assert tensors[key].dtype == value.dtype and tensors.shape(key) == value.shape
            np.testing.assert_array_equal(tensors[key], value)


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode().ljust(128)
    path = tmp_path / "no_suffix"
    path.write_bytes(struct.pack("<Q", 128) + header + FOUR.tobytes())
    with open_tensors(path) as tensors:
        np.testing.assert_array_equal(tensors["a"], FOUR)


def test_tensors_at_the_top_leave_the_rest_as_metadata(tmp_path):
    with open_tensors(write_zip(tmp_path / "x.pth", mapping(w=tensor(), step=number(5), none=b"N"))) as tensors:
        assert list(tensors) == ["w"] and tensors.metadata == {"step": 5, "none": None}


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [4, 12]}}, "overlaps"),
        ({"a": {**F32, "data_offsets": [0, 8]}, "b": {**F32, "data_offsets": [12, 20]}}, "hole"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, "overlaps"),
        ({"a": {**F32, "data_offsets": [0, 16]}}, "another size"),
        ({"a": {**F32, "data_offsets": [0, 8]}}, "the file has"),
        ({"a": {**F32, "shape": [-2], "data_offsets": [0, 8]}}, "negative"),
        ({"a": {**F32, "dtype": "F31", "data_offsets": [0, 8]}}, "damaged"),
        ({"a": {**F32, "shape": [2.0], "data_offsets": [0, 8]}}, "negative or huge"),
        ({"a": 3}, "damaged"),
        ([], "damaged"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
    ],
)
def test_lies_in_a_safetensors_header_are_one_line(header, reason, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("<Q", 2**63) + b"{}", "no .safetensors file"),
        (struct.pack("<Q", 50_000) + b"[" * 50_000, "damaged"),
        (struct.pack("<Q", 17) + b'{"a":{}, "a": {}}', "twice"),
    ],
)
def test_other_bad_safetensors_headers(data, reason, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"GIF89a..", "neither a PyTorch file"),
        (pickle.dumps({"a": 1}, 2), "not one of torch.save"),
        (b"PK\x03\x04", "damaged"),
    ],
)
def test_other_files_are_named_for_what_they_are(data, reason, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    assert reason in refusal(path)


def test_no_file_and_no_tensors(tmp_path):
    assert refusal(tmp_path) == "is a folder or device, not a file"
    assert refusal(tmp_path / "none.ckpt") == "no such file"
    assert "there is: a, b" in refusal(write_zip(tmp_path / "x.ckpt", mapping(a=b"N", b=b"N")))
    assert "whole Python object" in refusal(write_zip(tmp_path / "x.ckpt", name("my.Module") + b")\x81"))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    count = 2_000_000
    value = mapping(**{f"w{k}": tensor(storage(str(k), count), shape=(count,)) for k in range(5)})
    zeros = np.zeros(count, np.float32)
    write_zip(tmp_path / "x.ckpt", value, {str(k): zeros.tobytes() for k in range(5)})
    write_legacy(tmp_path / "x.pth", value, {str(k): zeros for k in range(5)})
    safetensors.numpy.save_file({f"w{k}": zeros for k in range(5)}, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        with open_tensors(path) as tensors:
            tracemalloc.start()
            for key in tensors:
                assert tensors[key].size == count
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2.5 * zeros.nbytes, path


def test_names_do_not_read(tmp_path):
    path = write_zip(tmp_path / "x.ckpt", mapping(w=tensor()))
    path.write_bytes(path.read_bytes().replace(FOUR.tobytes(), bytes(16)))
    with open_tensors(path) as tensors:
        assert "w" in tensors and "v" not in tensors and len(tensors) == 1 and tensors.shape("w") == (4,)
        assert tensors.get("v") is None
        with pytest.raises(UserError, match="CRC"):
            tensors["w"]


# Runs by itself with little memory: flips bytes, cuts, and swaps pieces; an audit hook ends it if anything is run.
SURVIVE = """
import encodings.raw_unicode_escape  # loaded here, because the hook takes any later import for an attack
import random, resource, sys
from pathlib import Path
from vqgan_jax.config import UserError
from vqgan_jax.torch_files import open_tensors

def attempt(path):
    try:
        with open_tensors(path) as tensors:
            for key in tensors:
                tensors[key]
        return "read"
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\\n" not in str(error), error
        return "refused"

def mutate(data, random):
    data = bytearray(data)
    def where():
        return random.randrange(min(len(data), random.choice([400, len(data)])))
    kind = random.choice(["bytes", "bits", "cut", "swap", "insert", "end"])
    if kind == "cut":
        del data[where():]
    elif kind == "swap":
        size, a, b = random.randrange(1, 64), where(), where()
        data[a:a + size], data[b:b + size] = data[b:b + size], data[a:a + size]
    elif kind == "insert":
        a = where()
        data[a:a] = random.randbytes(random.randrange(1, 9))
    elif kind == "end":
        a = len(data) - 1 - random.randrange(min(len(data), 600))
        data[a] = random.randrange(256)
    else:
        for _ in range(random.choice([1, 1, 2, 8, 64])):
            a = where()
            byte = random.choice([0, 255, random.randrange(256)])
            data[a] = byte if kind == "bytes" else data[a] ^ 1 << random.randrange(8)
    return bytes(data)

count, folder, *sources = sys.argv[1:]
sources = [Path(source) for source in sources]
for source in sources:
    attempt(source)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

def hook(event, arguments):
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "import",
                 "pickle.find_class", "socket.connect"):
        print("RAN", event, arguments, flush=True)
        import os
        os._exit(3)

random = random.Random(20)
tally = {}
sys.addaudithook(hook)
for k in range(int(count)):
    source = sources[k % len(sources)]
    path = Path(folder) / f"mutated{source.suffix}"
    path.write_bytes(mutate(source.read_bytes(), random))
    result = source.suffix + " " + attempt(path)
    tally[result] = tally.get(result, 0) + 1
print(tally)
"""


def survive(count: int, folder: Path) -> dict[str, int]:
    value = mapping(state_dict=mapping(w=tensor(shape=(2, 2), strides=(1, 2)), v=tensor(storage("1"))), epoch=number(3))
    blocks = {"0": FOUR, "1": FOUR + 1}
    sources = [
        GOLDEN / "torch_kinds.ckpt",
        GOLDEN / "torch_kinds_legacy.ckpt",
        GOLDEN / "malicious.ckpt",
        write_zip(folder / "small.pt", value, {key: data.tobytes() for key, data in blocks.items()}),
        write_legacy(folder / "small.pth", value, blocks),
        folder / "small.safetensors",
    ]
    safetensors.numpy.save_file({"w": FOUR, "v": FOUR.astype(np.float16).reshape(2, 2)}, sources[-1])
    command = [sys.executable, "-c", SURVIVE, str(count), str(folder), *map(str, sources)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    return eval(run.stdout)


def test_mutated_files_are_read_or_refused(tmp_path):
    tally = survive(300, tmp_path)
    assert sum(tally.values()) == 300
    assert all(tally[f"{suffix} refused"] > 5 for suffix in (".ckpt", ".pt", ".pth", ".safetensors"))
