"""A Google Cloud Storage of the tests: the JSON API that gcsfs and tensorstore speak, on this machine, in memory.

Both clients run as they do against the real service; only its address is another. So what bites of buckets bites here:
there are no folders, nothing appends, nothing is renamed in one piece, and an upload that breaks off leaves nothing.
A test that takes the fixture `bucket` gets a folder of its own (conftest.py imports it for all).
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

NAME = "bucket"
_folders = itertools.count()


class Bucket:
    """The objects of the one bucket there is, by name, and the server that hands them out."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}  # bytes and generation
        self.lock = threading.RLock()
        self._generations = itertools.count(1_700_000_000_000_000)
        self._uploads: dict[str, tuple[str, bytearray]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put(self, name: str, data: bytes) -> dict:
        """Writes an object whole and returns what the service says of it."""
        with self.lock:
            self.objects[name] = bytes(data), next(self._generations)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        data, generation = self.objects[name]
        moment = "2026-01-01T00:00:00.000000Z"
        return {
            "kind": "storage#object",
            "id": f"{NAME}/{name}/{generation}",
            "bucket": NAME,
            "name": name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "timeCreated": moment,
            "updated": moment,
            "storageClass": "STANDARD",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }

    def listing(self, query: dict[str, str]) -> dict:
        """One page of names by prefix; with a delimiter, what lies deeper is named by its prefix alone."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end, after = query.get("startOffset", ""), query.get("endOffset", ""), query.get("pageToken", "")
        most = int(query.get("maxResults", 1000))
        items, prefixes, last = [], [], ""
        with self.lock:
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name < start or (end and name >= end) or name <= after:
                    continue
                inner = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                folder = prefix + inner[0] + delimiter if inner[1] else ""
                if folder and (folder in prefixes or after.startswith(folder)):
                    continue
                if len(items) + len(prefixes) == most:
                    return {"items": items, "prefixes": prefixes, "nextPageToken": last}
                if folder:
                    prefixes.append(folder)
                else:
                    items.append(self.describe(name))
                last = name
        return {"items": items, "prefixes": prefixes}

    def begin(self, name: str) -> str:
        with self.lock:
            upload = str(len(self._uploads))
            self._uploads[upload] = name, bytearray()
            return upload

    def go_on(self, upload: str, data: bytes, last: bool) -> dict | int:
        """Adds a chunk to a resumable upload; the object is there once the last has come."""
        name, received = self._uploads[upload]
        received += data
        return self.put(name, received) if last else len(received)


class _Handler(BaseHTTPRequestHandler):
    """The requests of both clients."""

    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None: ...

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # gcsfs asks two things at once and hangs up on the slower
            super().handle()

    def do_GET(self) -> None:
        path, query = self._asked()
        if path == f"b/{NAME}":
            return self._json({"kind": "storage#bucket", "name": NAME, "id": NAME})
        if path == f"b/{NAME}/o":
            return self._json(self.bucket.listing(query))
        with self.bucket.lock:
            found = self.bucket.objects.get(name := self._object(path))
            if found is None:
                return self._fail(404)
            data, generation = found
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._reply(304)
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._fail(412)
            if query.get("alt") != "media":
                return self._json(self.bucket.describe(name))
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(generation)}
        if not (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            return self._reply(200, data, headers)
        first, last = asked[1], asked[2]
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            return self._reply(416, b"not satisfiable", {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._reply(206, data[start:stop], headers)

    def do_POST(self) -> None:
        path, query = self._asked()
        body = self._body()
        if self.path.startswith("/batch"):
            return self._batch(body)
        if "upload_id" in query:
            return self._chunk(query["upload_id"], body)
        if self.path.startswith("/upload"):
            return self._upload(path, query, body)
        if moved := re.fullmatch(f"b/{NAME}/o/(.+)/(?:rewriteTo/b/{NAME}/o|moveTo/o)/(.+)", path):
            source, target = map(unquote, moved.groups())
            with self.bucket.lock:
                if source not in self.bucket.objects:
                    return self._fail(404)
                made = self.bucket.put(target, self.bucket.objects[source][0])
                if "/moveTo/" in path and source != target:
                    del self.bucket.objects[source]
            return self._json({"done": True, "resource": made} if "/rewriteTo/" in path else made)
        self._fail(404)

    def do_PUT(self) -> None:
        _, query = self._asked()
        self._chunk(query["upload_id"], self._body())

    def do_DELETE(self) -> None:
        path, query = self._asked()
        self._reply(204 if "upload_id" in query or self._delete(self._object(path)) else 404)

    def _delete(self, name: str) -> bool:
        with self.bucket.lock:
            return self.bucket.objects.pop(name, None) is not None

    def _upload(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path != f"b/{NAME}/o":
            return self._fail(404)
        if query["uploadType"] == "resumable":
            upload = self.bucket.begin(query.get("name") or json.loads(body)["name"])
            return self._reply(200, b"", {"Location": f"{self.bucket.url}{self.path}&upload_id={upload}"})
        if query["uploadType"] == "multipart":
            boundary = re.search(r'boundary="?([^"]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, _ = re.split(rb"(?:\r?\n|^)--" + re.escape(boundary), body)
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
        else:
            name = query["name"]
        with self.bucket.lock:
            if "ifGenerationMatch" in query:  # 0: only where there is none
                there = self.bucket.objects.get(name, (b"", 0))[1]
                if query["ifGenerationMatch"] != str(there):
                    return self._fail(412)
            self._json(self.bucket.put(name, body))

    def _chunk(self, upload: str, body: bytes) -> None:
        total = self.headers["Content-Range"].rpartition("/")[2]
        last = total != "*"
        done = self.bucket.go_on(upload, body, last)
        if last:
            return self._json(done)
        self._reply(308, b"", {"Range": f"bytes=0-{done - 1}"} if done else {})

    def _batch(self, body: bytes) -> None:
        parts = []
        for name in re.findall(rf"DELETE /storage/v1/b/{NAME}/o/([^ ?]+)", body.decode()):
            status = "204 No Content" if self._delete(unquote(name)) else "404 Not Found"
            parts.append(f"--batch_x\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        text = "".join(parts) + "--batch_x--\r\n"
        self._reply(200, text.encode(), {"Content-Type": "multipart/mixed; boundary=batch_x"})

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        path = re.sub(r"^(/upload|/download)?/storage/v1/", "", url.path)
        return path, {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}

    def _object(self, path: str) -> str:
        return unquote(path.removeprefix(f"b/{NAME}/o/")) if path.startswith(f"b/{NAME}/o/") else "\0"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _json(self, value: dict) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _fail(self, status: int) -> None:
        message = {404: "Not Found", 412: "Precondition Failed"}[status]
        self._reply(status, json.dumps({"error": {"code": status, "message": message}}).encode())

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


# gcsfs would ask a second service, over gRPC, what kind of bucket this is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def service() -> Bucket:
    """The service itself, one a process: the clients ask for its address once."""
    made = Bucket()
    os.environ["STORAGE_EMULATOR_HOST"] = os.environ["TENSORSTORE_GCS_HTTP_URL"] = made.url
    os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = made.url  # the C++ client, of array_record
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"
    return made


@pytest.fixture
def bucket(service: Bucket) -> str:
    """The address of an empty folder in the bucket: "gs://bucket/0"."""
    return f"gs://{NAME}/{next(_folders)}"
