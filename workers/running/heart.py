"""A command's heartbeat: a thread that writes the rows of its processes, so that people and other commands see them.

It has a connection of its own and never blocks the command's work: while Postgres is away, rows are just not written.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version

from db import processes
from db.processes import BEAT_SECONDS, Beat
from db.session import DBAPIError, open_engine
from db.states import ProcessKind
from workers.errors import redact

_STATEMENT_SECONDS = 5.0
_GOODBYE_SECONDS = 1.0

log = logging.getLogger(__name__)


class Heart:
    """Writes the rows that `look` returns, every BEAT_SECONDS, while a `with` block runs. It removes them at its end.

    look: called in the heart's thread.
    """

    def __init__(self, database_url: str, look: Callable[[], Sequence[Beat]]) -> None:
        self._engine = open_engine(database_url, statement_timeout_seconds=_STATEMENT_SECONDS, pool_size=1)
        self._look = look
        self._over = threading.Event()
        self._is_away = False
        # A daemon, because a frozen Postgres may hold it in a call without end.
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_GOODBYE_SECONDS)

    def _run(self) -> None:
        while True:
            self._write(processes.beat)
            if self._over.wait(BEAT_SECONDS):
                break
        self._write(processes.leave)
        self._engine.dispose()

    def _write(self, write: Callable[..., None]) -> None:
        try:
            beats = self._look()
            with self._engine.begin() as db:
                write(db, beats=beats)
        except DBAPIError as error:
            if not self._is_away:  # the command's work says more
                log.warning("no heartbeat can be stored: %s", redact(" ".join(str(error.orig).split())))
            self._is_away = True
        else:
            self._is_away = False


def own_beat(kind: ProcessKind) -> Beat:
    """The row of a command that is one process."""
    host = socket.gethostname()
    return Beat(kind=kind, name=f"{kind}@{host}", host=host, pid=os.getpid(), version=version("maskfleet"))
