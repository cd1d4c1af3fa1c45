"""A webhook receiver that only wakes the waiting reader. Label Studio's webhooks are not signed and not sent again. So
their content is not used; they only mean that there is something to read."""

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
    """Listen while the block runs, and set the event at each POST with the secret. Yields host and port.

    Answers 204, or 403 without the secret. Bodies are read and dropped, so that the sender gets the answer.
    """

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """No traceback for a request that breaks off or is none: it wakes nobody."""

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
            """No log line for each request: every Submit of a person sends one."""

    server = Server((host, port), Receiver)
    thread = threading.Thread(target=server.serve_forever, name="webhooks", daemon=True)
    thread.start()
    try:
        yield str(server.server_address[0]), int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
