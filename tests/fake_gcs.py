"""A Google Cloud Storage in this process: what gcsfs, orbax and TensorStore use of its JSON API.

https://cloud.google.com/storage/docs/json_api/v1 says what each request means.
"""

import base64
import hashlib
import http
import itertools
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class FakeGCS(ThreadingHTTPServer):
    """Serves `buckets`, {bucket: {name: (content, generation)}}, at `url` until it is closed."""

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.buckets: dict[str, dict[str, tuple[bytes, int]]] = {name: {} for name in buckets}
        self.refuses = False  # whether every request lacks a permission
        self.generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, str]] = {}  # begun: id -> (bucket, name)
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        """What sends the clients here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which would ask by gRPC
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore's
        }

    def __enter__(self) -> "FakeGCS":
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()


class _Failure(Exception):
    """An answer with this status."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeGCS

    def log_message(self, *args: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self._send(*self._answer(self.command, self.path, body))

    do_GET = do_POST = do_DELETE = _handle

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of the answer to a request."""
        url = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            if self.server.refuses:
                raise _Failure(403)
            return self._dispatch(method, url.path, query, body)
        except _Failure as failure:
            (code,) = failure.args
            error = {"error": {"code": code, "message": http.HTTPStatus(code).phrase}}
            return code, b"" if code == 304 else json.dumps(error).encode(), {}

    def _dispatch(
        self, method: str, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        if "upload_id" in query:
            if not self.headers["Content-Range"].endswith(f"/{len(body)}"):
                raise _Failure(501)
            return self._write(*self.server.uploads[query["upload_id"]], query, body)
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if not found:
            raise _Failure(400)
        service, bucket, name = found[1], found[2], unquote(found[3] or "")
        if bucket not in self.server.buckets:
            raise _Failure(404)
        objects = self.server.buckets[bucket]
        if service == "/upload":
            return self._upload(bucket, query, body)
        if "/moveTo/o/" in name:
            source, _, target = name.partition("/moveTo/o/")
            if source not in objects:
                raise _Failure(404)
            return self._write(bucket, target, query, objects.pop(source)[0])
        if name:
            self._check(objects.get(name), query)
            if name not in objects:
                raise _Failure(404)
            if method == "DELETE":
                del objects[name]
                return 204, b"", {}
            if query.get("alt") == "media":
                return self._read(*objects[name])
            return self._json(_metadata(bucket, name, objects[name]))
        if path.endswith("/o"):
            return self._json(_listing(bucket, objects, query))
        return self._json({"kind": "storage#bucket", "name": bucket})

    def _upload(self, bucket: str, query: dict, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if query["uploadType"] == "media":
            return self._write(bucket, query["name"], query, body)
        number = str(len(self.server.uploads))  # resumable; it comes in one piece
        self.server.uploads[number] = (bucket, query["name"])
        location = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
        return 200, b"{}", {"Location": location}

    def _write(
        self, bucket: str, name: str, query: dict, content: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        objects = self.server.buckets[bucket]
        self._check(objects.get(name), query)
        objects[name] = (content, next(self.server.generations))
        return self._json(_metadata(bucket, name, objects[name]))

    def _check(self, stored: tuple[bytes, int] | None, query: dict) -> None:
        """The preconditions of a request; generation 0 is that of no object."""
        generation = stored[1] if stored else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise _Failure(412)
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Failure(304)

    def _read(self, content: bytes, generation: int) -> tuple[int, bytes, dict[str, str]]:
        headers = {"x-goog-generation": str(generation)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, content, headers
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            raise _Failure(416)
        part = content[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return 206, part, headers

    def _json(self, value: dict) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {}

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _metadata(bucket: str, name: str, stored: tuple[bytes, int]) -> dict:
    content, generation = stored
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "size": str(len(content)),
        "generation": str(generation),
        "metageneration": "1",
        "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


def _listing(bucket: str, objects: dict[str, tuple[bytes, int]], query: dict) -> dict:
    """A page of a bucket's objects; with a delimiter, what is below it counts as one prefix."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    entries: dict[str, dict | None] = {}
    for name in sorted(objects):
        if not name.startswith(prefix):
            continue
        head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
        if found:
            entries[prefix + head + found] = None
        else:
            entries[name] = _metadata(bucket, name, objects[name])
    names = [name for name in entries if name > query.get("pageToken", "")]
    page = names[: min(int(query.get("maxResults", 1000)), 5)]  # short, to have several
    result = {
        "kind": "storage#objects",
        "items": [entries[name] for name in page if entries[name]],
        "prefixes": [name for name in page if not entries[name]],
    }
    return result | ({"nextPageToken": page[-1]} if len(page) < len(names) else {})
