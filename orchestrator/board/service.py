"""The board over HTTP. It only reads."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from orchestrator.board import door, handlers
from orchestrator.board.board import Board
from orchestrator.board.password import BoardError, Password
from orchestrator.board.photos import Photos

_READ_THREADS, _PHOTO_THREADS = 4, 2
_MOST_BODY_BYTES = 10_000
_POLL_SECONDS = 0.2


def serve(
    board: Board,
    photos: Photos,
    password: Password,
    stop: threading.Event,
    *,
    host: str,
    port: int,
    started: Callable[[int], None] = lambda _: None,
) -> None:
    """Answer until `stop` is set. started: called with the port once requests are taken (port 0: any free one).

    Raises BoardError when the port is taken.
    """
    with (
        ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read") as reading,
        ThreadPoolExecutor(_PHOTO_THREADS, thread_name_prefix="photo") as decoding,
    ):
        served = door.Served(board, photos, password, stop, reading, decoding)
        asyncio.run(_serve(served, host=host, port=port, started=started))


async def _serve(served: door.Served, *, host: str, port: int, started: Callable[[int], None]) -> None:
    given = {"served": served}
    routes: list[Any] = [
        (r"/", handlers.Home, given),
        (r"/events", handlers.Events, given),
        (r"/jobs/([0-9]{1,18})", handlers.JobPage, given),
        (r"/jobs/([0-9]{1,18})/events", handlers.Events, given),
        (r"/jobs/([0-9]{1,18})/photos/([0-9]{1,18})", handlers.Photo, given),
        (r"/login", door.Login, given),
        (r"/logout", door.Logout, given),
        (r"/health", door.Health, given),
        (r"/(board\.css|board\.js)", door.File, given),
        (r"/.*", door.Unknown, given),
    ]
    # The cookies' secret lives as long as this process: after a restart everybody logs in again.
    application = Application(routes, cookie_secret=secrets.token_bytes(32), log_function=lambda _: None)
    server = HTTPServer(application, max_body_size=_MOST_BODY_BYTES, xheaders=True)
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        raise BoardError(f"cannot listen at {host}:{port} ({error.strerror}): choose another --port") from error
    server.add_sockets(sockets)
    started(sockets[0].getsockname()[1])
    while not served.stop.is_set():
        await asyncio.sleep(_POLL_SECONDS)
    server.stop()
    served.ending.set()
    await asyncio.sleep(_POLL_SECONDS)  # for events to end
    await server.close_all_connections()
