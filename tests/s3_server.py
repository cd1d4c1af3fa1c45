"""An S3 API on loopback: moto's server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moto.backends import get_backend
from moto.server import ThreadedMotoServer


@contextmanager
def serve_s3() -> Iterator[str]:
    """The address of a server without a bucket. One at a time in a process: they share moto's memory.

    It is emptied first. It belongs to the process, and still has the buckets of tests in other files, which depend on
    how pytest-xdist has spread the files.
    """
    for account in list(get_backend("s3").values()):
        account.reset()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
