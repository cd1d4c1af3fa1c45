"""The HTTP service that Label Studio calls: its ML backend protocol (version 1.23), behind a user and a password."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import orjson
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, stream_request_body

from orchestrator.assist.credential import AssistError, Credential

# Label Studio sends all predictions of a task with each click.
MAX_BODY_BYTES = 64_000_000
_VERSION = "maskfleet"

log = logging.getLogger(__name__)


@stream_request_body
class _Handler(RequestHandler):
    """Refuses a request without the right credential before its body is read."""

    def initialize(self, credential: Credential, decoders: Callable[[], int]) -> None:
        self.credential = credential
        self.decoders = decoders
        self.body = bytearray()

    def prepare(self) -> None:
        if not self.credential.fits(self.request.headers.get("Authorization", "")):
            self.set_status(401)
            self.set_header("WWW-Authenticate", 'Basic realm="maskfleet"')
            self.set_header("Connection", "close")
            self.finish(b'{"detail": "wrong user or password"}')

    def data_received(self, chunk: bytes) -> None:
        self.body += chunk

    def reply(self, document: dict[str, Any]) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(orjson.dumps(document))

    def log_exception(self, *_: Any) -> None:
        """A body or an address of a request is never logged."""
        log.error("%s: a request could not be answered", self.request.path.partition("?")[0][:40])


class _Fixed(_Handler):
    """/health, /setup, /versions, /webhook: one answer whatever the body. /health also counts decoders that are up."""

    ANSWERS: ClassVar[dict[str, dict[str, Any]]] = {
        "health": {"status": "UP", "model_class": _VERSION},
        "setup": {"model_version": _VERSION},
        "versions": {"versions": [_VERSION]},
        "webhook": {},
    }

    def get(self, name: str) -> None:
        self.reply(self.ANSWERS[name] | ({"decoders": self.decoders()} if name == "health" else {}))

    post = get


class _Predict(_Handler):
    """/predict: answered in a thread, so that /health stays quick."""

    def initialize(  # type: ignore[override]  # tornado hands each handler its own route's arguments
        self,
        credential: Credential,
        decoders: Callable[[], int],
        answer: Callable[[bytes], dict[str, Any]],
        threads: ThreadPoolExecutor,
    ) -> None:
        super().initialize(credential, decoders)
        self.answer = answer
        self.threads = threads

    async def post(self) -> None:
        loop = asyncio.get_running_loop()
        self.reply(await loop.run_in_executor(self.threads, self.answer, bytes(self.body)))


def serve(
    answer: Callable[[bytes], dict[str, Any]],
    credential: Credential,
    stop: threading.Event,
    *,
    host: str,
    port: int,
    threads: int,
    started: Callable[[int], None] = lambda _: None,
    decoders: Callable[[], int] = lambda: 0,
) -> None:
    """Answer requests until `stop` is set. started: called with the port once requests are taken (port 0: any free).
    decoders: how many decoder children are up, for /health.

    Raises AssistError when the port is taken.
    """
    about = {"credential": credential, "decoders": decoders}
    asyncio.run(_serve(answer, about, stop, host=host, port=port, threads=threads, started=started))


async def _serve(
    answer: Callable[[bytes], dict[str, Any]],
    about: dict[str, Any],
    stop: threading.Event,
    *,
    host: str,
    port: int,
    threads: int,
    started: Callable[[int], None],
) -> None:
    with ThreadPoolExecutor(threads, thread_name_prefix="answer") as pool:
        routes: list[Any] = [
            (r"/(health|setup|versions|webhook)/?", _Fixed, about),
            (r"/predict/?", _Predict, {**about, "answer": answer, "threads": pool}),
            (r"/.*", _Unknown, about),
        ]
        application = Application(routes, log_function=lambda _: None)
        server = HTTPServer(application, max_body_size=MAX_BODY_BYTES, idle_connection_timeout=120)
        try:
            sockets = bind_sockets(port, host)
        except OSError as error:
            raise AssistError(f"cannot listen at {host}:{port} ({error.strerror}): choose another --port") from error
        server.add_sockets(sockets)
        started(sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, stop.wait)
        server.stop()
        await server.close_all_connections()


class _Unknown(_Handler):
    """Every other path."""

    def get(self) -> None:
        self.set_status(404)
        self.reply({"detail": "unknown path: this is an ML backend of Label Studio"})

    post = put = patch = delete = head = options = get
