"""Makes wanted embeddings without a broker: `python -P -m workers.running.encode`, on the CPU, until its stdin ends.

For a reviewer's own machine, where no worker runs. The assist service starts it and holds its stdin.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import time
from typing import NoReturn

from db import embeddings
from db.session import DBAPIError, is_passing, open_engine
from db.settings import settings
from workers.embeddings.store import open_store
from workers.errors import redact
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.running.embedding import embed_wanted
from workers.running.worker import Worker

_POLL_SECONDS = 1.0
_NICENESS = 5  # below the service that answers clicks

log = logging.getLogger(__name__)


def main() -> int:
    """Work until stdin ends. 2 when a setting is missing."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    store, url = open_store(settings()), settings().database_url
    if store is None or url is None:
        log.error("MASKFLEET_EMBEDDINGS and MASKFLEET_DATABASE_URL must be set")
        return 2
    os.nice(_NICENESS)
    worker = Worker(
        name=f"encode@{socket.gethostname()}",
        engine=open_engine(url.get_secret_value()),
        settings=settings(),
        load_model=_load_model,
        load_detector=lambda asked: _no_detector(asked.name),
        draining=lambda: _stdin_ended(0),
        on_hang=lambda: None,
    )
    while not _stdin_ended(_POLL_SECONDS):
        try:
            with worker.engine.begin() as db:
                embeddings.fail_abandoned(db)
            embed_wanted(worker, store)
        except DBAPIError as error:
            if not is_passing(error):
                raise
            log.warning("Postgres does not answer: %s", redact(str(error.orig).strip()))
            time.sleep(_POLL_SECONDS)
    return 0


def _load_model(name: str) -> Model:
    return load_model(find_model(name), "cpu")


def _no_detector(name: str) -> NoReturn:
    raise ValueError(f"{name}: embeddings need no detector")


def _stdin_ended(seconds: float) -> bool:
    """Wait so long at most. True when stdin is at its end; what somebody writes there is ignored."""
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    return bool(readable) and os.read(sys.stdin.fileno(), 4096) == b""


if __name__ == "__main__":
    sys.exit(main())
