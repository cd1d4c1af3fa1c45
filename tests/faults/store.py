"""A small S3 store over a folder, for campaigns: it can forbid all objects for a while."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "photos"


@dataclass
class Store:
    """objects: the folder, whose files are the bucket's objects. forbids: answers 403 to each read of an object."""

    endpoint: str
    objects: Path
    forbids: bool = False
    refused: int = 0

    def source(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def listing(self, prefix: str, after: str) -> bytes:
        """All objects of a prefix after a key, on one page."""
        paths = sorted((self.objects / prefix).iterdir())
        keys = [(f"{prefix}{path.name}", path) for path in paths if f"{prefix}{path.name}" > after]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>{etag(path)}</ETag></Contents>"
            for key, path in keys
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()


def etag(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    store: Store

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key = unquote(url.path).removeprefix(f"/{BUCKET}").lstrip("/")
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = self.store.objects / key
        if not key:
            self._answer(200, self.store.listing(asked.get("prefix", ""), asked.get("start-after", "")))
        elif self.store.forbids:
            self.store.refused += 1
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        elif path.is_file():
            self._answer(200, path.read_bytes(), etag(path))
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>")

    def _answer(self, status: int, body: bytes, tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_store(objects: Path) -> Iterator[Store]:
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        store = handler.store = Store(endpoint=f"http://127.0.0.1:{server.server_address[1]}", objects=objects)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield store
        server.shutdown()
