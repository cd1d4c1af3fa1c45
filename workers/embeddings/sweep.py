"""The sweep: deletes embeddings that are too old, annotated or over the budget, and what killed processes left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from db import embedding_sweep
from db.session import Connection, Engine
from db.settings import Settings
from workers.embeddings.address import EmbeddingError, is_ours
from workers.embeddings.store import EmbeddingStore
from workers.errors import redact

_YOUNG_SECONDS = 3600.0  # a file without a row may belong to a writer that has not stored its row yet
_ADDRESSES_A_QUERY = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """How many embeddings were deleted, by reason. without_row: files; without_file: rows; all others: both."""

    expired: int = 0
    annotated: int = 0
    over_budget: int = 0
    without_row: int = 0
    without_file: int = 0


def sweep(engine: Engine, store: EmbeddingStore, settings: Settings, *, compare: bool = True) -> Swept | None:
    """Sweep once. None when another process sweeps now. Two at once would do no harm, only twice the work.

    compare: also compare the files with the rows. That lists the whole store, which costs requests on S3.

    A row is deleted before its file. So whatever kills this process, a reader finds both, or no row; a file that
    remains is deleted by a later sweep. Raises EmbeddingError when the store cannot be listed.
    """
    with embedding_sweep.sweep_lock(engine) as db:
        if db is None:
            return None
        with db.begin():
            expired = embedding_sweep.drop_expired(db, days=settings.embeddings_days)
            annotated = embedding_sweep.drop_annotated(db)
            over_budget = embedding_sweep.drop_over_budget(db, budget_bytes=settings.embeddings_bytes)
        _delete(store, [*expired, *annotated, *over_budget])
        without_row, without_file = _compare(db, store) if compare else (0, 0)
    return Swept(
        expired=len(expired),
        annotated=len(annotated),
        over_budget=len(over_budget),
        without_row=without_row,
        without_file=without_file,
    )


def _compare(db: Connection, store: EmbeddingStore) -> tuple[int, int]:
    """Delete files without a row, and rows without a file. Returns how many of each."""
    # The rows are read before the files: a file is written before its row, so each of these rows had one.
    with db.begin():
        rows = embedding_sweep.stored_embeddings(db)
    before = time.time() - _YOUNG_SECONDS
    names: set[str] = set()
    old: list[str] = []
    for found in store.stored():
        names.add(found.name)
        if found.changed_at < before and is_ours(found.name):  # images may lie in the same bucket
            old.append(found.name)
    lost = [row for row in rows if row.address not in names]
    with db.begin():
        without_file = embedding_sweep.drop_without_file(db, rows=lost) if lost else 0
        known: set[str] = set()
        for k in range(0, len(old), _ADDRESSES_A_QUERY):
            known |= embedding_sweep.known_addresses(db, addresses=old[k : k + _ADDRESSES_A_QUERY])
    return _delete(store, [name for name in old if name not in known]), without_file


def _delete(store: EmbeddingStore, names: Iterable[str]) -> int:
    """Delete files. One that cannot be deleted now is left to a later sweep. Returns how many were deleted."""
    deleted = 0
    for name in names:
        try:
            store.delete(name)
            deleted += 1
        except EmbeddingError as error:
            log.warning("embedding %s is not deleted: %s", name, redact(str(error)))
    return deleted
