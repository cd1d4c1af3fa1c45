"""A small real HTTP proxy before a Label Studio: it can refuse large bodies, and lose or spoil answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@dataclass
class Proxy:
    """max_body: larger ones are answered 413 unread. spoil: what becomes of the next answers to an import (or another
    `spoiled_path`), one each: "500" and "504" replace it, "drop" ends the connection; the server has done its work each
    time. "503" is given before the server sees the request. "late" is answered 504 at once, and the server gets the
    request `late_seconds` afterwards. before_import: called when an import has come, before the server sees it."""

    url: str
    target: str
    max_body: int = 10_000_000
    spoil: list[str] = field(default_factory=list)
    spoiled_path: str = "/import"
    late_seconds: float = 1.0
    before_import: Callable[[], None] = lambda: None
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes of the body
    spoiled: int = 0
    late_on_the_way: int = 0
    handed_on_late: int = 0

    def imports(self) -> list[int]:
        """The sizes of the bodies of all imports, in bytes."""
        return [size for method, path, size in self.requests if method == "POST" and "/import" in path]

    def hand_on_late(self, request: Callable[[], httpx.Response]) -> None:
        """Let the server have a request that was answered long ago, as a gateway with a queue does."""
        time.sleep(self.late_seconds)
        request()
        self.handed_on_late += 1
        self.late_on_the_way -= 1

    def next_spoil(self, path: str) -> str:
        """What becomes of this request's answer; nothing, unless its path is spoiled and one is left."""
        if self.spoiled_path not in path:
            return ""
        self.before_import()
        spoil = self.spoil.pop(0) if self.spoil else ""
        self.spoiled += bool(spoil)
        return spoil


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _forward(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.proxy.requests.append((self.command, self.path, size))
        if size > self.proxy.max_body:
            self.close_connection = True
            self._answer(413, b"<html>413 Request Entity Too Large</html>", "text/html")
            return
        body = self.rfile.read(size)
        spoil = self.proxy.next_spoil(self.path)
        if spoil == "503":
            self._answer(503, b"busy", "text/plain")
        elif spoil == "late":
            self.proxy.late_on_the_way += 1
            # In a thread: the next request may come over this connection, and must not wait for the late one.
            threading.Thread(target=self.proxy.hand_on_late, args=(self._request(body),), daemon=True).start()
            self._answer(504, b"gateway time-out", "text/plain")
        else:
            self._pass_on(self._request(body)(), spoil)

    def _request(self, body: bytes) -> Callable[[], httpx.Response]:
        """This request, ready to go to the server."""
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
        url = self.proxy.target + self.path
        return partial(httpx.request, self.command, url, content=body, headers=headers, timeout=300)

    def _pass_on(self, answer: httpx.Response, spoil: str) -> None:
        if spoil == "drop":
            self.close_connection = True
        elif spoil:
            self._answer(int(spoil), b"the answer was lost", "text/plain")
        else:
            self._answer(answer.status_code, answer.content, answer.headers.get("content-type", ""))

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked was killed
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = _forward

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def proxy_of(target: str) -> Iterator[Proxy]:
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        proxy = handler.proxy = Proxy(url=f"http://127.0.0.1:{server.server_address[1]}", target=target)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield proxy
        server.shutdown()
        thread.join()
