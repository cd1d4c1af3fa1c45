"""Embeddings that are kept already: a job with a tuned decoder reads them, and its images are not encoded again.

Only for a tuned decoder. Kept embeddings are rounded, so masks from them may differ in a few pixels from masks of a
fresh encoding. Other models' masks stay those of their encoder. `--fresh` encodes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from db import embeddings
from db.embeddings import EmbeddableAsset
from db.leases import Asset, ClaimedChunk
from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, EmbeddingOf, embedding_of
from workers.embeddings.store import EmbeddingStore, open_store
from workers.errors import SourceError, redact
from workers.machine import pinned_device
from workers.models.registry import find_model
from workers.running.worker import Worker

log = logging.getLogger(__name__)


class FromStore:
    """Reads the kept embeddings of one chunk's assets. `from_store` makes it. Every fault only costs an encoding."""

    def __init__(self, worker: Worker, chunk: ClaimedChunk, store: EmbeddingStore) -> None:
        self._worker = worker
        self._chunk = chunk
        self._store = store
        self._is_away = False

    def read(self, assets: Sequence[Asset]) -> dict[int, Any]:
        """The embeddings, by asset, of those of these assets that are kept. On the device of the chunk's model.

        assets: with the etags of the bytes that were read. So an image that changed has no embedding here.
        """
        if self._is_away or not assets:
            return {}
        of = {asset.id: embeddable(self._worker, self._chunk, asset) for asset in assets}
        with self._worker.engine.begin() as db:
            stored = embeddings.stored_of(db, addresses=[one.address for one in of.values()])
            embeddings.touch(db, addresses=sorted(stored))
        found = {asset_id: self._read_one(one) for asset_id, one in of.items() if one.address in stored}
        return {asset_id: embedding for asset_id, embedding in found.items() if embedding is not None}

    def _read_one(self, of: EmbeddingOf) -> Any:
        from workers.embeddings.codec import decode, to_device  # here, because it loads torch

        try:
            return to_device(decode(self._store.read(of.address), of.stamp), pinned_device())
        except EmbeddingError as error:
            log.warning("chunk %d: %s is encoded again: %s", self._chunk.id, of.key, redact(str(error)))
            self._is_away = error.fault is EmbeddingFault.AWAY
            if not self._is_away:
                with self._worker.engine.begin() as db:
                    embeddings.want_again(db, address=of.address)
            return None


def from_store(worker: Worker, chunk: ClaimedChunk) -> FromStore | None:
    """The reader of a chunk whose job has a tuned decoder and no detector. None for another job, or without a store."""
    if find_model(chunk.model).base is None or chunk.fresh or chunk.asked.get("detector"):
        return None
    try:
        store = open_store(worker.settings)
    except SourceError as error:
        log.warning("chunk %d: no kept embeddings are read: %s", chunk.id, redact(str(error)))
        return None
    return None if store is None else FromStore(worker, chunk, store)


def embeddable(worker: Worker, chunk: ClaimedChunk, asset: Asset) -> EmbeddingOf:
    """What the embedding of a chunk's asset is of. Raises what `embedding_of` raises."""
    one = EmbeddableAsset(
        asset_id=asset.id,
        source=chunk.source,
        key=asset.key,
        etag=asset.etag,
        model=chunk.model,
        model_version=chunk.model_version,
        fast=chunk.asked.get("params", {}).get("precision") == "fast",
    )
    return embedding_of(one, EmbeddingFormat(worker.settings.embeddings_format))
