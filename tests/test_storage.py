"""Paths that users name, local and in a bucket: what is written is whole or not there, and what is read is what lies
there now. The bucket is that of tests/bucket.py, under the clients that real ones have."""

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from vqgan_jax import images, storage
from vqgan_jax.config import UserError


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path) -> epath.Path:
    """An empty folder of either kind."""
    return storage.path(tmp_path if request.param == "local" else request.getfixturevalue("bucket"))


def names(folder: epath.Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in storage.files(folder)]


def test_a_home_is_expanded_and_both_kinds_of_path_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(storage.path("~/runs")) == "/home/someone/runs"
    assert str(storage.path("runs/a")) == "runs/a"
    assert str(storage.path("runs/12:30/a")) == "runs/12:30/a"
    assert str(storage.path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert str(storage.absolute("gs://bucket/a")) == "gs://bucket/a"
    assert str(storage.absolute("a")) == str(Path.cwd() / "a")


@pytest.mark.parametrize("text", ["gs:/bucket/a", "gs://", "gs:///a", "s3://bucket/a", "https://x.org/a.zip"])
def test_an_address_that_is_no_bucket_is_named_in_one_line(text):
    with pytest.raises(UserError, match=f"^{text}: only local paths and gs://BUCKET"):
        storage.path(text)


def test_a_bucket_without_its_client_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://b/a: buckets need gcsfs; pip install -r requirements-gcs.txt"):
        storage.path("gs://b/a")


def test_what_is_written_is_read_back_and_nothing_else_is_left(folder):
    storage.write_bytes(folder / "a" / "b", b"1")
    storage.write_bytes(folder / "a" / "b", b"23")
    storage.write_text(folder / "t.txt", "é\n")
    storage.write_json(folder / "j.json", {"x": [1]})
    storage.save_npz(folder / "deep" / "er" / "n.npz", x=np.arange(5), y=np.zeros((0, 2)))
    images.save_png(folder / "p" / "q.png", np.zeros((2, 2, 3), np.uint8))
    assert (folder / "a" / "b").read_bytes() == b"23"
    assert (folder / "t.txt").read_text() == "é\n"
    assert json.loads((folder / "j.json").read_text()) == {"x": [1]}
    read = storage.load_npz(folder / "deep" / "er" / "n.npz")
    assert set(read) == {"x", "y"} and read["x"].tolist() == [0, 1, 2, 3, 4] and read["y"].shape == (0, 2)
    assert names(folder) == ["a/b", "deep/er/n.npz", "j.json", "p/q.png", "t.txt"]
    assert names(folder / "none") == []


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_half_one(folder):
    storage.write_bytes(folder / "x", b"old")
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), storage.staged(folder / "x") as partial:
            partial.write_bytes(b"ne")
            raise error
    assert (folder / "x").read_bytes() == b"old"
    assert names(folder) == ["x"]


def test_of_several_that_create_a_file_one_does(folder):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda k: storage.create(folder / "a" / "b", b"%d" % k), range(8)))
    assert made.count(True) == 1 and (folder / "a" / "b").read_bytes() == b"%d" % made.index(True)
    assert not storage.create(folder / "a" / "b", b"x") and names(folder) == ["a/b"]


def test_without_hard_links_one_creates_a_file_too(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert storage.create(tmp_path / "x", b"1") and not storage.create(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def test_a_large_file_goes_up_in_pieces_and_comes_down_whole(bucket):
    data = np.random.default_rng(0).bytes(12_000_000)  # gcsfs sends 5 MiB at once
    with storage.staged(f"{bucket}/x") as partial:
        partial.write_bytes(data)
    with storage.fetched(f"{bucket}/x") as local:
        assert local.read_bytes() == data
    assert not local.exists()
    assert storage.sha256(f"{bucket}/x") == storage.hashlib.sha256(data).hexdigest()


def test_a_local_file_is_fetched_as_itself(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    with storage.fetched(tmp_path / "x") as local:
        assert local == tmp_path / "x"
    assert local.exists()


def test_a_folder_that_is_filled_is_uploaded_even_after_an_error(folder):
    with pytest.raises(ValueError), storage.staged_folder(folder / "trace") as local:
        (local / "deep").mkdir()
        (local / "deep" / "x").write_text("1")
        raise ValueError
    assert names(folder) == ["trace/deep/x"]


def test_a_bucket_is_never_remembered_as_it_was(bucket, service):
    """Other hosts, and Orbax, write there too."""
    folder = storage.path(bucket)
    storage.write_text(folder / "x", "1")
    assert names(folder) == [path.name for path in folder.iterdir()] == ["x"] and not (folder / "y").exists()
    service.put(f"{bucket.removeprefix('gs://bucket/')}/y", b"2")
    assert (folder / "y").exists() and names(folder) == ["x", "y"]
    assert [path.name for path in folder.iterdir()] == ["x", "y"]


def test_a_folder_is_proved_writable_and_left_empty(folder):
    made = storage.make_folder(folder / "run", "--workdir=x")
    assert made == folder / "run" and names(folder) == []


def test_an_unwritable_folder_is_one_line_with_the_flag(tmp_path, service):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=w: cannot be written \(Not a directory\); name another folder"):
        storage.make_folder(tmp_path / "file" / "w", "--workdir=w")
    with pytest.raises(UserError, match=r"--out=gs://other/w: cannot be written \(no such bucket\)"):
        storage.make_folder("gs://other/w", "--out=gs://other/w")


def test_a_growing_file_is_in_the_bucket_after_each_push_and_goes_on_where_it_stood(folder):
    mirror = storage.Mirror(folder / "log" / "x")
    for text in ("1\n", "2\n"):
        with mirror.local.open("a") as file:
            file.write(text)
        mirror.push()
    assert (folder / "log" / "x").read_text() == "1\n2\n"
    mirror.close()
    again = storage.Mirror(folder / "log" / "x")
    with again.local.open("a") as file:
        file.write("3\n")
    again.close()
    assert (folder / "log" / "x").read_text() == "1\n2\n3\n"
    assert mirror.remote == again.remote == (not mirror.local.exists())


def test_a_file_that_has_not_grown_is_not_uploaded_again(bucket, service):
    mirror = storage.Mirror(f"{bucket}/x")
    mirror.local.write_text("1")
    mirror.push()
    before = dict(service.objects)
    mirror.push()
    mirror.close()
    assert service.objects == before


def test_errors_of_a_buckets_client_are_told_from_our_own():
    from gcsfs.retry import HttpError

    assert storage.is_bucket_error(HttpError({"code": 401, "message": "Invalid Credentials"}))
    assert not any(map(storage.is_bucket_error, (ValueError("x"), OSError("x"), UserError("x"))))
