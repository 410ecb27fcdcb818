"""Archives: what is read in place is what unpacking would give; what is damaged is named in one line."""

import io
import os
import pickle
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data import archives
from vqgan_jax.data.archives import ArchiveStore
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.stores import FolderStore, open_store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "archives"


def contents(count=9, seed=0):
    """Names in folders and random bytes, some compressible, one of them empty."""
    rng = np.random.default_rng(seed)
    files = {f"{'ab日'[i % 3]}/{i}.png": rng.bytes(int(rng.integers(1, 3000))) for i in range(count)}
    return files | {"a/zeros.png": bytes(5000), "b/empty.png": b"", f"b/{'long' * 40}.png": b"long name"}


def tar_bytes(files, format=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):  # a link
                info.type, info.linkname = data
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def nested_bytes(files, **how):
    """A tar of one tar a folder, as ImageNet comes."""
    folders = {}
    for name, data in files.items():
        folder, inner = name.split("/")
        folders.setdefault(folder, {})[inner] = data
    return tar_bytes({f"{folder}.tar": tar_bytes(inner, **how) for folder, inner in folders.items()}, **how)


def zip_bytes(files, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


KINDS = {
    "stored.zip": lambda files: zip_bytes(files, zipfile.ZIP_STORED),
    "deflated.zip": zip_bytes,
    "prefixed.zip": lambda files: b"#!/bin/sh\n" * 50 + zip_bytes(files),
    "pax.tar": tar_bytes,
    "gnu.tar": lambda files: tar_bytes(files, tarfile.GNU_FORMAT),
    "nested.tar": nested_bytes,
}


def assert_holds(store, files):
    assert store.names == sorted(files)
    assert {name: store.read(name) for name in store.names} == files


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_holds_what_unpacking_it_would_give(tmp_path, kind):
    path, files = tmp_path / kind, contents()
    path.write_bytes(KINDS[kind](files))
    store = open_store(path)
    assert_holds(store, files)
    assert_holds(pickle.loads(pickle.dumps(store)), files)
    assert store.folders() == ("a", "b", "日") and store.where("a/0.png") == f"{path}/a/0.png"
    assert open_store(path, (".jpg",)).names == []
    with pytest.raises(CorruptExample, match=r"c/1\.png: not in the archive"):
        store.read("c/1.png")


@pytest.mark.parametrize("kind", ["deflated.zip", "pax.tar", "nested.tar"])
def test_a_folder_inside_an_archive_is_a_path_like_any_other(tmp_path, kind):
    path, files = tmp_path / kind, contents()
    path.write_bytes(KINDS[kind](files))
    store = open_store(path / "a")
    assert_holds(store, {name[2:]: data for name, data in files.items() if name.startswith("a/")})
    assert store.folders() == () and store.where("0.png") == f"{path}/a/0.png"
    with pytest.raises(UserError, match=r"no folder 'aa'.*'a'"):
        open_store(path / "aa")


def test_tars_in_tars_in_tars_are_folders_too(tmp_path):
    inner = tar_bytes({"1.png": b"one"})
    (tmp_path / "x.tar").write_bytes(tar_bytes({"z.png": b"zero", "a.tar": tar_bytes({"y.png": b"y", "b.tar": inner})}))
    assert_holds(open_store(tmp_path / "x.tar"), {"a/b/1.png": b"one", "a/y.png": b"y", "z.png": b"zero"})


def test_zip_members_lie_behind_their_names_and_extra_fields(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for length in (0, 9, 1000):
            info = zipfile.ZipInfo(f"a/{length}.png")
            info.extra = b"\xfe\xca" + length.to_bytes(2, "little") + bytes(length)
            archive.writestr(info, f"{length} bytes")
    assert_holds(open_store(tmp_path / "x.zip"), {f"a/{n}.png": f"{n} bytes".encode() for n in (0, 9, 1000)})


def test_an_archive_may_be_empty(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_bytes({}))
    (tmp_path / "x.tar").write_bytes(tar_bytes({}))
    for name in ("x.zip", "x.tar") * 2:  # found, and found in the cache
        assert open_store(tmp_path / name).names == [] == list(open_store(tmp_path / name).folders())


@pytest.mark.parametrize("kind", ["deflated.zip", "pax.tar", "nested.tar"])
def test_an_archive_in_a_bucket_is_read_in_place(bucket, kind):
    files = contents()
    storage.write_bytes(f"{bucket}/{kind}", KINDS[kind](files))
    assert_holds(pickle.loads(pickle.dumps(open_store(f"{bucket}/{kind}"))), files)
    assert len(open_store(f"{bucket}/{kind}/a").names) == 4


def test_the_index_is_built_once_and_anew_for_a_changed_archive(tmp_path, cache, monkeypatch):
    path, files = tmp_path / "x.tar", contents()
    path.write_bytes(tar_bytes(files))
    open_store(path)
    build = archives._sorted_members
    monkeypatch.setattr(archives, "_sorted_members", None)
    assert_holds(open_store(path), files)
    monkeypatch.setattr(archives, "_sorted_members", build)
    changed = contents(seed=1)
    path.write_bytes(tar_bytes(changed))
    assert_holds(open_store(path), changed)
    assert len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damage is no obstacle
    assert_holds(open_store(path), changed)


def test_an_index_that_cannot_be_kept_is_built_every_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "file"))
    (tmp_path / "x.zip").write_bytes(zip_bytes(contents()))
    assert_holds(open_store(tmp_path / "x.zip"), contents())


@pytest.mark.parametrize("kind", ["stored.zip", "nested.tar"])
def test_threads_read_one_store(tmp_path, kind):
    path, files = tmp_path / kind, contents(60)
    path.write_bytes(KINDS[kind](files))
    store = open_store(path)
    start = threading.Barrier(8)

    def read_all(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(store.names)
        return all(store.read(str(name)) == files[name] for name in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))


def test_hidden_members_folders_and_leading_dots_are_no_names(tmp_path):
    files = {"./a/1.png": b"1", "__MACOSX/a/._1.png": b"m", "/a/2.png": b"2", ".git/3.png": b"3", "a\\4.png": b"4"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    (tmp_path / "x.zip").write_bytes(zip_bytes(files | {"a/": b""}))
    assert open_store(tmp_path / "x.tar").names == ["a/1.png", "a/2.png", "a\\4.png"]
    assert open_store(tmp_path / "x.zip").names == ["a/1.png", "a/2.png", "a/4.png"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_of_a_name_that_is_there_twice_the_last_counts(tmp_path, caplog, kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for data in (b"first", b"last"):
                archive.writestr("a/1.png", data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for data in (b"first", b"last"):
                info = tarfile.TarInfo("a/1.png")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (tmp_path / f"x.{kind}").write_bytes(buffer.getvalue())
    assert_holds(open_store(tmp_path / f"x.{kind}"), {"a/1.png": b"last"})
    assert "a/1.png" in caplog.text and "more than once" in caplog.text


def test_links_in_a_tar_are_followed_and_lead_nowhere_by_name(tmp_path):
    files = {
        "a/1.png": b"one",
        "a/hard.png": (tarfile.LNKTYPE, "a/1.png"),
        "b/soft.png": (tarfile.SYMTYPE, "../a/hard.png"),
        "b/gone.png": (tarfile.SYMTYPE, "../a/2.png"),
        "b/self.png": (tarfile.SYMTYPE, "self.png"),
    }
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    store = open_store(tmp_path / "x.tar")
    assert store.names == sorted(files)
    assert store.read("a/hard.png") == store.read("b/soft.png") == b"one"
    for name in ("b/gone.png", "b/self.png"):
        with pytest.raises(CorruptExample, match=f"{name}: a link"):
            store.read(name)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_refused_with_the_mend(tmp_path, kind):
    path = tmp_path / f"x.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(__file__, "a/1.png")
    mend = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz"}[kind]
    for where in (path, path / "a"):
        with pytest.raises(UserError, match=rf"config\.data\.path.*{mend} '{path}'"):
            open_store(where)


@pytest.mark.parametrize("kind", ["pax.tar", "nested.tar", "deflated.zip"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.95])
def test_an_archive_that_is_cut_off_is_refused_by_name(tmp_path, kind, share):
    data = KINDS[kind](contents())
    (tmp_path / kind).write_bytes(data[: int(len(data.rstrip(bytes(1))) * share)])
    with pytest.raises(UserError, match=rf"config\.data\.path.*{kind}.*fetch it again") as mistake:
        open_store(tmp_path / kind)
    assert "\n" not in str(mistake.value)


def test_a_damaged_tar_inside_a_tar_is_named(tmp_path):
    inner = tar_bytes({"1.png": bytes(2000), "2.png": bytes(2000)})
    for damage in (inner[:3000], inner[:2560] + b"x" * 512 + inner[3072:], b"no tar" * 100):
        (tmp_path / "x.tar").write_bytes(tar_bytes({"a.tar": inner, "b.tar": damage}))
        with pytest.raises(UserError, match=r"'b\.tar' in .*x\.tar"):
            open_store(tmp_path / "x.tar")


def test_a_tar_without_an_end_mark_is_read_but_said(tmp_path, caplog):
    whole = tar_bytes({"a/1.png": bytes(512)})
    (tmp_path / "x.tar").write_bytes(whole[:1024])
    assert open_store(tmp_path / "x.tar").names == ["a/1.png"] and "may be cut off" in caplog.text


def test_a_member_whose_bytes_are_gone_is_one_corrupt_example(tmp_path):
    files = {f"a/{i}.png": np.random.default_rng(i).bytes(1000) for i in range(3)}
    data = bytearray(zip_bytes(files, zipfile.ZIP_STORED))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        offsets = [archive.getinfo(name).header_offset for name in files]
    data[offsets[0] + 200] ^= 1  # one bit of the first member
    data[offsets[1] : offsets[1] + 4] = b"gone"  # the second member's header
    (tmp_path / "x.zip").write_bytes(data)
    store = open_store(tmp_path / "x.zip")
    assert store.read("a/2.png") == files["a/2.png"]
    for name, reason in (("a/0.png", "checksum"), ("a/1.png", "damaged")):
        with pytest.raises(CorruptExample, match=reason) as caught:
            store.read(name)
        assert caught.value.path == f"{tmp_path}/x.zip/{name}"
    os.truncate(tmp_path / "x.zip", offsets[2] + 500)  # after it was opened
    with pytest.raises(CorruptExample, match="ends inside"):
        store.read("a/2.png")


def test_a_tar_that_is_cut_off_while_it_is_open_gives_corrupt_examples(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a/1.png": b"1" * 600, "a/2.png": b"2" * 600}))
    store = open_store(tmp_path / "x.tar")
    os.truncate(tmp_path / "x.tar", 512 + 1024 + 512 + 100)
    assert store.read("a/1.png") == b"1" * 600
    with pytest.raises(CorruptExample, match=r"a/2\.png.*ends inside"):
        store.read("a/2.png")


def test_a_zip_by_a_rare_method_or_with_a_password_is_named(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_bytes({"a/1.png": bytes(100)}, zipfile.ZIP_LZMA))
    with pytest.raises(CorruptExample, match="deflate"):
        open_store(tmp_path / "x.zip").read("a/1.png")
    data = bytearray(zip_bytes({"a/1.png": bytes(100)}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "y.zip").write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        open_store(tmp_path / "y.zip")


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no archive.*x\.tar"):
        ArchiveStore(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"no folder and no archive.*x\.tar"):
        open_store(tmp_path / "x.tar")
    with pytest.raises(UserError, match="no folder"):
        FolderStore(tmp_path / "nowhere")
