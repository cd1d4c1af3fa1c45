"""Keeps the embeddings of a job that was submitted with --keep-embeddings, behind the commit of its outcomes.

Nothing here can fail an asset: what cannot be kept is a line in the log and a failed row.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from db import embeddings
from db.leases import Asset, ClaimedChunk, NewOutcome
from db.session import Connection, DBAPIError
from workers.embeddings.address import EmbeddingError, EmbeddingFormat, EmbeddingOf, embedding_of
from workers.embeddings.store import EmbeddingStore, open_store
from workers.errors import SourceError, redact
from workers.models.spec import ModelError
from workers.running.from_store import embeddable
from workers.running.looks import model_embedding
from workers.running.outcomes import storable_text
from workers.running.worker import Worker

_WAITING_BATCHES = 2  # their embeddings are in memory, or on the device
_MOST_WAIT_SECONDS = 60.0  # for a slow store; then a batch is not kept
_MOST_FAILURES = 3  # in a row; then nothing more of the chunk is kept

log = logging.getLogger(__name__)


class Keeper:
    """Writes the embeddings of one chunk's labeled assets, in a thread of its own. `keeping` makes and closes it."""

    def __init__(self, worker: Worker, chunk: ClaimedChunk, store: EmbeddingStore) -> None:
        self._worker = worker
        self._chunk = chunk
        self._store = store
        self._noted: dict[int, tuple[Asset, Any]] = {}
        self._failures = 0
        self._is_over = False
        self._batches: queue.Queue[Sequence[tuple[Asset, Any]] | None] = queue.Queue(_WAITING_BATCHES)
        self._thread = threading.Thread(target=self._run, name=f"keep-{chunk.id}", daemon=True)
        self._thread.start()

    def note(self, asset: Asset, encoded: Any) -> None:
        """An asset was labeled. encoded: what `Encode` returned for it. It waits for the commit of its outcome."""
        embedding = model_embedding(encoded)
        if embedding is not None and not self._is_over:
            self._noted[asset.id] = asset, embedding

    def keep(self, outcomes: Sequence[NewOutcome]) -> None:
        """These outcomes are committed: hand over the embeddings of their assets. Waits while the store is slow."""
        ids = [outcome.asset_id for outcome in outcomes if outcome.asset_id in self._noted]
        batch = [self._noted.pop(asset_id) for asset_id in ids]
        if not batch or self._is_over:
            return
        try:
            self._batches.put(batch, timeout=_MOST_WAIT_SECONDS)
        except queue.Full:
            log.warning("chunk %d: %d embeddings are not kept: the store is too slow", self._chunk.id, len(batch))

    def close(self) -> None:
        """Wait until all handed over embeddings are written or given up."""
        self._batches.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            if self._is_over:
                continue
            try:
                self._keep_batch(batch)
            except Exception as error:  # noqa: BLE001  no asset fails because its embedding is not kept
                self._is_over = True
                log.warning("chunk %d: no more embeddings are kept: %s", self._chunk.id, redact(_one_line(error)))

    def _keep_batch(self, batch: Sequence[tuple[Asset, Any]]) -> None:
        of = {asset.id: embeddable(self._worker, self._chunk, asset) for asset, _ in batch}
        addresses = {asset_id: one.address for asset_id, one in of.items()}
        with self._worker.engine.begin() as db:
            seconds = self._worker.settings.resend_seconds
            allowed = _reserve(db, self._worker, self._chunk, addresses, seconds=seconds)
        wanted = [(of[asset.id], embedding) for asset, embedding in batch if addresses[asset.id] in allowed]
        sizes = self._write(wanted)
        if sizes:
            with self._worker.engine.begin() as db:
                embeddings.record_stored(db, sizes=sizes)

    def _write(self, wanted: Sequence[tuple[EmbeddingOf, Any]]) -> Mapping[str, int]:
        """Write each embedding. Returns the bytes of the written ones by address."""
        from workers.embeddings.codec import encode  # here, because it loads torch

        sizes: dict[str, int] = {}
        for of, embedding in wanted:
            try:
                content = encode(embedding, of)
                self._store.write(of.address, content)
            except EmbeddingError as error:
                self._record_failure(of, error)
                continue
            self._failures = 0
            sizes[of.address] = len(content)
        return sizes

    def _record_failure(self, of: EmbeddingOf, error: EmbeddingError) -> None:
        log.warning("chunk %d: the embedding of %s is not kept: %s", self._chunk.id, of.key, redact(str(error)))
        with self._worker.engine.begin() as db:
            embeddings.record_failed(
                db, address=of.address, error=storable_text(str(error)), lasting=True, retry_seconds=0
            )
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            self._is_over = True
            log.warning("chunk %d: no more embeddings are kept after %d failures", self._chunk.id, self._failures)


@contextmanager
def keeping(worker: Worker, chunk: ClaimedChunk) -> Iterator[Keeper | None]:
    """The keeper of a chunk whose job keeps embeddings. None for another job, or where no store is set."""
    store = _store(worker, chunk) if "keep_embeddings" in chunk.asked else None
    keeper = None if store is None else Keeper(worker, chunk, store)
    try:
        yield keeper
    finally:
        if keeper is not None:
            keeper.close()


def _store(worker: Worker, chunk: ClaimedChunk) -> EmbeddingStore | None:
    try:
        store = open_store(worker.settings)
    except SourceError as error:
        log.warning("chunk %d: no embeddings are kept: %s", chunk.id, redact(str(error)))
        return None
    if store is None:
        log.warning("chunk %d: no embeddings are kept: MASKFLEET_EMBEDDINGS is not set here", chunk.id)
    return store


def want_answered(worker: Worker, chunk: ClaimedChunk) -> None:
    """Want the embeddings of the chunk's assets that were answered from an earlier job, if its job keeps embeddings."""
    if "keep_embeddings" not in chunk.asked or worker.settings.embeddings is None:
        return
    try:
        with worker.engine.begin() as db:
            assets = embeddings.answered_assets(db, chunk=chunk)
            kind = EmbeddingFormat(worker.settings.embeddings_format)
            addresses = {asset.asset_id: embedding_of(asset, kind).address for asset in assets}
            _reserve(db, worker, chunk, addresses, seconds=0)  # claimed by nobody, so they are wanted at once
    except (ModelError, DBAPIError) as error:
        log.warning(
            "chunk %d: embeddings of its answered assets are not wanted: %s", chunk.id, redact(_one_line(error))
        )


def _reserve(
    db: Connection, worker: Worker, chunk: ClaimedChunk, addresses: Mapping[int, str], *, seconds: float
) -> set[str]:
    asked = chunk.asked["keep_embeddings"]
    return embeddings.reserve(
        db,
        job_id=chunk.job_id,
        addresses=addresses,
        most=None if asked == "all" else int(asked),
        budget_bytes=worker.settings.embeddings_bytes,
        seconds=seconds,
    )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error.orig if isinstance(error, DBAPIError) else error}".split())
