"""A claimed chunk's lease while its worker is at it: a heartbeat that ends when the work stands still."""

from __future__ import annotations

import logging
import threading
import time

from db import leases
from db.leases import ClaimedChunk, LeaseLost
from db.session import DBAPIError
from workers.errors import redact
from workers.running.worker import Worker

log = logging.getLogger(__name__)


class HeldLease:
    """Extends the lease while a `with` block runs and assets get finished.

    A process without progress for hang_seconds is given up: its lease expires, and another one takes the chunk.
    """

    def __init__(self, worker: Worker, chunk: ClaimedChunk) -> None:
        self._worker = worker
        self._chunk = chunk
        self._lost = threading.Event()
        self._over = threading.Event()
        self._progress_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{chunk.id}", daemon=True)

    def __enter__(self) -> HeldLease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def progress(self) -> None:
        """Note that the work goes on."""
        self._progress_at = time.monotonic()

    def go_on(self) -> None:
        """Note that the work goes on. Raises LeaseLost when the lease was lost."""
        if self._lost.is_set():
            raise LeaseLost(f"chunk {self._chunk.id}: the lease was lost while it ran")
        self.progress()

    def _beat(self) -> None:
        deployment = self._worker.settings
        while not self._over.wait(deployment.lease_seconds / 4):
            if time.monotonic() - self._progress_at > deployment.hang_seconds:
                said = "chunk %d: no asset finished for %g s"
                log.error(said, self._chunk.id, deployment.hang_seconds, extra=log_ids(self._chunk))
                self._worker.on_hang()
                return
            try:
                with self._worker.engine.begin() as db:
                    leases.extend_lease(db, chunk=self._chunk, lease_seconds=deployment.lease_seconds)
            except LeaseLost:
                self._lost.set()
                return
            except DBAPIError as error:
                said = "chunk %d: heartbeat failed: %s"
                log.warning(said, self._chunk.id, redact(str(error)), extra=log_ids(self._chunk))


def log_ids(chunk: ClaimedChunk) -> dict[str, int]:
    """What a log line about a chunk carries apart from its text."""
    return {"job": chunk.job_id, "chunk": chunk.id}
