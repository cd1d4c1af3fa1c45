"""Deletes a job: its assets, outcomes, masks, prompts and kept embeddings, in transactions of about a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from db import deletion
from db.session import DBAPIError, Engine
from workers.embeddings.address import EmbeddingError
from workers.embeddings.store import EmbeddingStore
from workers.errors import redact

_FIRST_CHUNKS, _MOST_CHUNKS = 4, 256
_SHORT_SECONDS, _LONG_SECONDS = 0.3, 1.0  # of a transaction; the next one takes more or fewer chunks

log = logging.getLogger(__name__)


class JobRunsError(RuntimeError):
    """The job is listing or running. Cancel it first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """assets: deleted now, without those of an earlier try that was interrupted. left_embeddings: files that the store
    did not delete; the sweep of `maskfleet assist` deletes them later."""

    assets: int
    left_embeddings: int


def delete_job(
    engine: Engine, job_id: int, *, store: EmbeddingStore | None, progress: Callable[[int], None] = lambda _: None
) -> Deleted:
    """Delete a job, or go on with a deletion that was interrupted. What was published stays in Label Studio.

    From the first transaction on no command finds the job. store: where its embeddings are kept, None: nowhere.
    progress: called with the number of assets deleted by each transaction. Raises JobRunsError.
    """
    with engine.begin() as db:
        if not deletion.begin_deletion(db, job_id=job_id):
            raise JobRunsError(f"job {job_id} is at work: `maskfleet cancel {job_id}` first")
    _empty_partitions(engine, job_id)
    assets, left, most = 0, 0, _FIRST_CHUNKS
    while True:
        began = time.monotonic()
        with engine.begin() as db:
            gone = deletion.delete_chunks(db, job_id=job_id, most=most)
        if gone is None:
            break
        took = time.monotonic() - began
        left += 0 if store is None else _delete_bytes(store, gone.addresses)
        assets += gone.assets
        progress(gone.assets)
        if took > _LONG_SECONDS:
            most = max(most // 2, 1)
        elif took < _SHORT_SECONDS:
            most = min(most * 2, _MOST_CHUNKS)
    while True:
        with engine.begin() as db:
            if not deletion.delete_prompts(db, job_id=job_id):
                deletion.end_deletion(db, job_id=job_id)
                return Deleted(assets=assets, left_embeddings=left)


def _empty_partitions(engine: Engine, job_id: int) -> None:
    """Empty at once the partitions of masks that are the job's alone. One that is in use is left to the chunks."""
    with engine.begin() as db:
        whole = deletion.whole_partitions(db, job_id=job_id)
    for partition in whole:
        try:
            with engine.begin() as db:
                deletion.empty_partition(db, job_id=job_id, partition=partition)
        except DBAPIError as error:
            log.info("partition %s is in use: %s", partition.table, redact(str(error.orig).strip()))
        except deletion.SharedPartition as error:
            log.info("%s", error)


def _delete_bytes(store: EmbeddingStore, addresses: Sequence[str]) -> int:
    """Delete the bytes of embeddings whose rows are gone. Returns how many could not be deleted."""
    left = 0
    for address in addresses:
        try:
            store.delete(address)
        except EmbeddingError as error:
            left += 1
            log.warning("embedding %s is not deleted: %s", address, redact(str(error)))
    return left
