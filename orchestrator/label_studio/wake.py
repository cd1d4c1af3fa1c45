"""A webhook receiver that only wakes whoever waits: Label Studio's webhooks are neither signed nor sent again, so what
they say is not believed, only that there is something to read."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET_HEADER = "X-Maskfleet-Secret"  # noqa: S105  the header's name
_MAX_BODY_BYTES = 64_000_000
_READ_SECONDS = 5  # Label Studio itself waits for one second


@contextmanager
def wake_on_webhook(host: str, port: int, *, secret: str, event: threading.Event) -> Iterator[tuple[str, int]]:
    """Listen while the block runs, and set the event at each POST that carries the secret; yields host and port.

    Answers 204, or 403 without the secret. Bodies are read and thrown away, that the sender hears the answer.
    """

    class Receiver(BaseHTTPRequestHandler):
        timeout = _READ_SECONDS

        def do_POST(self) -> None:
            left = min(int(self.headers.get("Content-Length") or 0), _MAX_BODY_BYTES)
            while left > 0 and (read := len(self.rfile.read(min(left, 2**16)))):
                left -= read
            known = hmac.compare_digest(self.headers.get(SECRET_HEADER, "").encode(), secret.encode())
            if known:
                event.set()
            self.send_response(HTTPStatus.NO_CONTENT if known else HTTPStatus.FORBIDDEN)
            self.send_header("Connection", "close")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """A person's every Submit is no news."""

    server = ThreadingHTTPServer((host, port), Receiver)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="webhooks", daemon=True)
    thread.start()
    try:
        yield str(server.server_address[0]), int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
