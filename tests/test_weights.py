"""The registry of weights: local first, then cached, then downloaded and checked; nothing half or wrong is kept."""

import hashlib
import http.server
import socket
import threading
from dataclasses import replace

import pytest

from vqgan_jax import weights
from vqgan_jax.config import UserError

DATA = bytes(range(256)) * 9000
FLAG = "--config.loss.lpips_weights"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        page = self.path == "/page"
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if page else "application/octet-stream")
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:1000] if self.path == "/short" else DATA)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = 0
    server.handle_error = lambda *_: None  # a client that hangs up on a web page is what is tested
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def register(server, monkeypatch):
    """Puts one more entry in the registry, served at a path of the local server."""

    def register(path: str = "/file", sha256: str = hashlib.sha256(DATA).hexdigest(), port: int = server.server_port):
        entry = replace(weights.REGISTRY["vgg16"], name="ours", url=f"http://127.0.0.1:{port}{path}", sha256=sha256)
        monkeypatch.setitem(weights.REGISTRY, "ours", entry)
        return entry

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return register


@pytest.mark.parametrize("digits", [64, 8, 0])
def test_downloads_once_and_keeps_it(digits, register, cache, server):
    entry = register(sha256=hashlib.sha256(DATA).hexdigest()[:digits])
    path = weights.fetch("ours", flag=FLAG)
    assert path == cache / entry.filename and path.read_bytes() == DATA
    assert weights.fetch("ours", "", flag=FLAG) == path
    assert server.asked == 1 and list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("/file", "0" * 64, hashlib.sha256(DATA).hexdigest()),
        ("/file", "0" * 8, "SHA-256 starts with 00000000"),
        ("/short", "", "after 1000 of 2304000 bytes"),
        ("/page", "", "web page"),
        ("/missing", "", "404"),
    ],
)
def test_what_fails_is_not_kept(path, sha256, reason, register, cache):
    register(path, sha256)
    with pytest.raises(UserError) as caught:
        weights.fetch("ours", flag=FLAG)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_offline_says_what_to_do(register, cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entry = register(port=port)
    with pytest.raises(UserError) as caught:
        weights.fetch("ours", flag=FLAG)
    line = str(caught.value)
    for fact in (entry.url, f"SHA-256 {entry.sha256}", entry.licence, str(cache / entry.filename), f"{FLAG}=FILE"):
        assert fact in line
    assert "\n" not in line


def test_local_file_comes_first(tmp_path, register, cache, server):
    register()
    local = tmp_path / "mine.pth"
    local.write_bytes(b"mine")
    assert weights.fetch("ours", str(local), flag=FLAG) == local
    with pytest.raises(UserError, match=FLAG):
        weights.fetch("ours", str(tmp_path / "none.pth"), flag=FLAG)
    assert server.asked == 0


def test_cache_folder_is_at_home_unless_named(monkeypatch):
    monkeypatch.delenv("VQGAN_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(weights.cache_folder()) == "/home/someone/.cache/vqgan_jax"


def test_unusable_cache_folder_is_one_line(tmp_path, register, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VQGAN_JAX_CACHE", str(tmp_path / "file" / "cache"))
    register()
    with pytest.raises(UserError, match="Not a directory"):
        weights.fetch("ours", flag=FLAG)


def test_unknown_name_is_suggested():
    with pytest.raises(UserError, match="did you mean 'inception'"):
        weights.fetch("inceptoin", flag=FLAG)


@pytest.mark.parametrize("entry", weights.REGISTRY.values(), ids=weights.REGISTRY)
def test_registry_is_consistent(entry):
    assert weights.REGISTRY[entry.name] is entry
    assert entry.url.startswith("https://") and entry.licence and "/" not in entry.filename
    assert len(entry.sha256) in (0, 8, 64) and set(entry.sha256) <= set("0123456789abcdef")
    # PyTorch's hubs put the start of the digest into the file's name.
    stem = entry.url.removesuffix(".pth").rpartition("-")[2]
    assert len(stem) != 8 or entry.sha256.startswith(stem)
    assert len({other.filename for other in weights.REGISTRY.values()}) == len(weights.REGISTRY)
