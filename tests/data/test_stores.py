"""Stores: the same names and bytes from a folder, a list and a bucket; loops end, odd names are read."""

import os
import pickle

import pytest

from vqgan_jax import storage
from vqgan_jax.config import UserError
from vqgan_jax.data.source import CorruptExample
from vqgan_jax.data.stores import FolderStore, ListStore, open_store, printable, top_folders

NAMES = ["a/1.png", "a/b/2.JPG", "c/3.png"]


def fill(root, names=NAMES):
    for name in names:
        storage.write_bytes(storage.path(root) / name, name.encode())


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")


def test_a_folder_lists_and_reads_what_lies_in_it(root):
    fill(root, [*NAMES, "c/notes.txt", ".hidden/4.png", "c/._3.png"])
    store = open_store(root)
    assert store.names == [*NAMES, "c/notes.txt"]
    pictures = open_store(root, (".png", ".jpg"))
    assert pictures.names == NAMES and pictures.folders() == ("a", "c")
    for store in (pictures, pickle.loads(pickle.dumps(pictures))):
        assert [store.read(name) for name in store.names] == [name.encode() for name in NAMES]
        assert store.read("c/notes.txt") == b"c/notes.txt" and store.where("a/1.png") == f"{root}/a/1.png"
        with pytest.raises(CorruptExample, match=r"a/9\.png.*FileNotFoundError"):
            store.read("a/9.png")


def test_the_classes_are_found_without_walking_the_tree(tmp_path, monkeypatch):
    fill(tmp_path, [*NAMES, "d/notes.txt", ".e/1.png"])
    quick = FolderStore(tmp_path, (".png", ".jpg"))
    assert quick.folders() == ("a", "c") and "names" not in vars(quick)
    assert quick.names and quick.folders() == ("a", "c")
    fill(tmp_path, ["flat.png"])
    assert FolderStore(tmp_path, (".png",)).folders() == () == top_folders(FolderStore(tmp_path, (".png",)).names)


def test_links_are_followed_but_loops_end(tmp_path):
    fill(tmp_path, ["data/a/1.png", "elsewhere/2.png"])
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "self").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "elsewhere" / "3.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "a" / "4.png").symlink_to(tmp_path / "data" / "a" / "4.png")
    store = open_store(tmp_path / "data", (".png",))
    assert store.names == ["a/1.png", "a/4.png", "b/2.png", "b/3.png"] and store.folders() == ("a", "b")
    for broken in ("a/4.png", "b/3.png"):
        with pytest.raises(CorruptExample, match=broken):
            store.read(broken)


def test_names_that_are_no_utf8_are_read_and_can_be_printed(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/\xe9t\xe9")
    with open(os.fsencode(tmp_path) + b"/\xe9t\xe9/\xff.png", "wb") as file:
        file.write(b"odd")
    fill(tmp_path, ["日本/写真.png"])
    odd = os.fsdecode(b"\xe9t\xe9/\xff.png")
    store = pickle.loads(pickle.dumps(open_store(tmp_path)))
    assert store.names == sorted(["日本/写真.png", odd])
    assert store.read(odd) == b"odd" and store.read("日本/写真.png") == "日本/写真.png".encode()
    assert store.where(odd).encode("utf-8").endswith(rb"t\udce9/\udcff.png")
    assert printable(tmp_path / "日本") == f"{tmp_path}/日本"
    (tmp_path / "list").write_bytes(b"\xe9t\xe9/\xff.png\n")
    assert ListStore(tmp_path / "list").read(odd) == b"odd"


def test_what_is_not_there_is_named(root):
    fill(root)
    with pytest.raises(UserError, match=r"config\.data\.path.*nowhere"):
        open_store(f"{root}/nowhere")
    with pytest.raises(UserError, match=r"config\.data\.path.*a/1\.png"):
        open_store(f"{root}/a/1.png")  # neither a folder nor an archive


def test_a_list_keeps_order_and_repetition(root):
    fill(root)
    lines = "\ufeff# a comment\nc/3.png\r\n\n./a/1.png\nc/3.png\n" + f"{root}/a/b/2.JPG\n"
    storage.write_text(f"{root}/all.txt", lines)
    store = ListStore(f"{root}/all.txt")
    assert store.names == ["c/3.png", "a/1.png", "c/3.png", "a/b/2.JPG"] and store.folders() == ("a", "c")
    again = pickle.loads(pickle.dumps(store))
    assert [again.read(name) for name in store.names] == [name.encode() for name in store.names]


def test_a_list_finds_its_files_from_its_own_folder_from_the_root_or_anywhere(tmp_path):
    fill(tmp_path / "data")
    (tmp_path / "lists").mkdir()
    for lines in ("a/1.png", "../data/a/1.png", str(tmp_path / "data/a/1.png")):
        (tmp_path / "lists" / "x.txt").write_text(lines)
        store = ListStore(tmp_path / "lists" / "x.txt", tmp_path / "data")
        assert store.read(store.names[0]) == b"a/1.png"
        assert store.folders() == (() if lines.startswith("..") else ("a",))
    (tmp_path / "lists" / "4.png").write_bytes(b"beside")
    (tmp_path / "lists" / "x.txt").write_text("4.png")
    assert ListStore(tmp_path / "lists" / "x.txt", tmp_path / "data").read("4.png") == b"beside"


def test_a_line_that_names_nothing_is_named_with_its_list(tmp_path):
    fill(tmp_path)
    (tmp_path / "x.txt").write_text("a/1.png\na/missing.png\n")
    with pytest.raises(CorruptExample, match=r"a/missing\.png.*x\.txt") as caught:
        ListStore(tmp_path / "x.txt").read("a/missing.png")
    assert caught.value.path == str(tmp_path / "a/missing.png")
    for text, reason in (("", "names no file"), ("b/1.png\n", "b/1.png"), ("a/1.png 3\n", "one path a line")):
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises(UserError, match=reason) as mistake:
            ListStore(tmp_path / "x.txt", tmp_path / "root")
        assert "\n" not in str(mistake.value)
    with pytest.raises(UserError, match="cannot be read"):
        ListStore(tmp_path / "y.txt")
