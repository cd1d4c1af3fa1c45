"""The assist service with everything beside it: decoder children, the thread that looks ahead, an encoder process."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from db.clicks import ClickedTask, models_of_projects
from db.publishing import LsProject
from db.session import DBAPIError, Engine
from db.settings import settings
from orchestrator.assist.ahead import keep_ahead
from orchestrator.assist.answers import AnswerKind, Assistant
from orchestrator.assist.children import Children
from orchestrator.assist.credential import AssistError, Credential
from orchestrator.assist.decoding import Decoder
from orchestrator.assist.service import serve
from orchestrator.label_studio.client import LabelStudio
from workers.embeddings.address import EmbeddingFormat
from workers.embeddings.store import EmbeddingStore, open_store
from workers.embeddings.sweep import sweep
from workers.errors import redact
from workers.prompts import Prompt

_CHILD = ("-P", "-m", "workers.clicks.child")
_ENCODER = ("-P", "-m", "workers.running.encode")
_CLICK_SECONDS = 5.0  # how long a click waits for its decoder; then a stored mask answers it
_PICK_THREADS = 6
_COMPARE_SECONDS = 3600.0

log = logging.getLogger(__name__)


def run_assist(
    engine: Engine,
    client: LabelStudio,
    projects: Sequence[int],
    credential: Credential,
    stop: threading.Event,
    *,
    host: str,
    port: int,
    as_: AnswerKind,
    processes: int,
    ahead: int,
    encode: bool,
    started: Callable[[int], None],
) -> None:
    """Serve until `stop` is set. Without a store of embeddings, stored masks answer every click.

    processes: decoder children. ahead: how many next tasks of each project have their embeddings ready. encode: make
    wanted embeddings in a process of this machine. Raises AssistError for `ahead` or `encode` without a store.
    """
    store = open_store(settings())
    if store is None and (ahead or encode):
        raise AssistError("--ahead and --encode keep embeddings: set MASKFLEET_EMBEDDINGS to a folder or s3:// prefix")
    embedding_format = EmbeddingFormat(settings().embeddings_format)
    children = Children(
        _CHILD,
        processes if store is not None else 0,
        seconds=_CLICK_SECONDS,
        models=lambda: _models(engine, client.url, projects),
    )
    decode = _no_decoder if store is None else Decoder(engine, children, embedding_format)
    assistant = Assistant(engine, client.url, projects, decode=decode, as_=as_)
    looking = _Looking(
        lambda: keep_ahead(
            engine,
            client,
            projects,
            stop,
            ahead=ahead,
            embedding_format=embedding_format,
            after_each=_tidy(engine, store),
        ),
        stop,
    )
    with children, looking, _encoder(encode):
        serve(
            assistant.answer,
            credential,
            stop,
            host=host,
            port=port,
            threads=2 * processes + _PICK_THREADS,
            started=started,
            decoders=children.ready,
        )


class _Looking:
    """The thread that looks ahead, for a `with` block. Its error ends the service, and the block raises it."""

    def __init__(self, look: Callable[[], None], stop: threading.Event) -> None:
        self._look, self._stop = look, stop
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ahead")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._look()
        except Exception as error:  # noqa: BLE001  raised above, in the thread that can end the service
            self._error = error
            self._stop.set()


def _models(engine: Engine, server: str, projects: Sequence[int]) -> list[str]:
    """The models of the predictions that the projects hold, to be loaded before the first click."""
    try:
        with engine.begin() as db:
            return models_of_projects(db, ls_projects=[LsProject(server, number) for number in projects])
    except DBAPIError as error:  # the first click on a model then waits for its weights
        log.warning("the projects' models are not known: %s", redact(str(error.orig).strip()))
        return []


def _no_decoder(task: ClickedTask, prompt: Prompt, mask_counts: str | None) -> None:
    """Without a store there is no embedding to decode."""


def _tidy(engine: Engine, store: EmbeddingStore | None) -> Callable[[], None]:
    """What follows each look ahead: messages for the workers, and the deletion of what is no longer needed.

    Files are compared with rows once an hour: that lists the whole store.
    """
    compared_at = -math.inf

    def tidy() -> None:
        nonlocal compared_at
        if settings().broker_url is not None:
            # Imported here, because the module reads the broker's address when it loads.
            from workers.running.tasks import top_up_or_say

            top_up_or_say(engine)
        if store is not None:
            is_due = time.monotonic() - compared_at > _COMPARE_SECONDS
            sweep(engine, store, settings(), compare=is_due)
            compared_at = time.monotonic() if is_due else compared_at

    return tidy


@contextmanager
def _encoder(is_wanted: bool) -> Iterator[None]:
    """A process that makes wanted embeddings on the CPU. It ends when its input ends, so also with this process."""
    if not is_wanted:
        yield
        return
    with subprocess.Popen([sys.executable, *_ENCODER], stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
