"""Makes the embeddings that reviewers wait for: fetch, decode, encode, write. No masks are made.

A wanted embedding is a row. A message, or the loop of `encode`, only says that there are some. A row is claimed before
anything is read. When the process dies, its claim runs out and the row is tried again, three times in all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from kombu.exceptions import OperationalError as BrokerAway

from db import embeddings
from db.embeddings import EmbeddableAsset, WantedEmbedding
from db.session import DBAPIError, Engine
from db.settings import Settings, settings
from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, embedding_of
from workers.embeddings.store import EmbeddingStore
from workers.errors import AssetError, ErrorKind, redact
from workers.images.decode import decode
from workers.models.files import require_same_weights
from workers.running.app import EMBED_QUEUE, EMBEDS_A_MESSAGE, publish_embeds, waiting_messages
from workers.running.outcomes import judge, storable_text
from workers.running.worker import Worker
from workers.storage.source import open_source

MOST_SENT = 16 * EMBEDS_A_MESSAGE  # wanted rows with a message; a reviewer's next tasks are few

log = logging.getLogger(__name__)


def send_wanted(engine: Engine) -> int:
    """Send messages for wanted embeddings that have none, or whose message was lost. Returns how many embeddings.

    Idempotent, and safe from many processes at once. Raises kombu's OperationalError when the broker is away.
    """
    with engine.begin() as db:
        if not embeddings.has_wanted(db):
            return 0
        embeddings.fail_abandoned(db)
    # While messages wait, an old message may be among them. Otherwise copies would fill a broker without workers.
    may_resend = waiting_messages(EMBED_QUEUE) == 0
    with engine.begin() as db:
        resend_seconds = settings().resend_seconds
        ids = embeddings.take_unsent(db, most=MOST_SENT, resend_seconds=resend_seconds, may_resend=may_resend)
    try:
        publish_embeds(ids)
    except BrokerAway:
        with engine.begin() as db:
            embeddings.unsend(db, ids=ids)
        raise
    return len(ids)


def embed_wanted(worker: Worker, store: EmbeddingStore, ids: Sequence[int] | None = None) -> int:
    """Make the wanted embeddings of these ids, or all that are wanted. Returns how many were stored.

    Stops when the worker drains. Raises ProcessUnfit when the process is broken, and DBAPIError while Postgres is away.
    """
    stored = 0
    for wanted in _claimed(worker, ids):
        try:
            _make(worker, store, wanted)
            stored += 1
        except DBAPIError:
            raise  # about Postgres, not about the image
        except Exception as error:  # noqa: BLE001  one bad image never stops its neighbours
            _record_failure(worker, wanted, error)
    return stored


def _claimed(worker: Worker, ids: Sequence[int] | None) -> Iterator[WantedEmbedding]:
    """Claim rows one by one. Those that a draining worker leaves get a new message."""
    left = None if ids is None else list(ids)
    while left is None or left:
        if worker.draining():
            if left:
                with worker.engine.begin() as db:
                    embeddings.unsend(db, ids=left)
            return
        asked = None if left is None else [left.pop(0)]
        with worker.engine.begin() as db:
            wanted = embeddings.claim(db, seconds=worker.settings.resend_seconds, ids=asked)
        if wanted is not None:
            yield wanted
        elif left is None:
            return


def _make(worker: Worker, store: EmbeddingStore, wanted: WantedEmbedding) -> None:
    from workers.embeddings.codec import encode  # here, because it loads torch

    asset = wanted.asset
    if asset is None:
        raise AssetError(ErrorKind.NOT_FOUND, "its job was deleted")
    version = asset.model_version
    if worker.settings.weights_mirror is not None:
        from workers.models.pulling import Bringing, bring_for_job  # here, because it loads an HTTP client

        bring_for_job(asset.model, lambda spec: require_same_weights(spec, version), Bringing(is_public=False))
    of = embedding_of(asset, EmbeddingFormat(wanted.address.split("/")[1]))
    if of.address != wanted.address:
        raise AssetError(ErrorKind.INTERNAL, f"asset {asset.asset_id} has the address {of.address}")
    image = decode(_read(asset, worker.settings), name=asset.key, max_pixels=worker.settings.max_pixels)
    [embedding] = worker.load_model(of.model).embed([image], fast=asset.fast)
    content = encode(embedding, of)
    store.write(of.address, content)
    with worker.engine.begin() as db:
        embeddings.record_stored(db, sizes={of.address: len(content)})


def _read(asset: EmbeddableAsset, deployment: Settings) -> bytes:
    """The asset's bytes. Raises AssetError when they are not those that the embedding's address names."""
    source = open_source(asset.source, s3_endpoint=deployment.s3_endpoint)
    read = source.read_with_etag(asset.key, deployment.max_object_bytes)
    if read.etag and asset.etag and read.etag != asset.etag:
        raise AssetError(ErrorKind.NOT_FOUND, f"{asset.key}: was changed, and its bytes are no longer there")
    return read.content


def _record_failure(worker: Worker, wanted: WantedEmbedding, error: Exception) -> None:
    """Another try may help, but not with an image that cannot be read, or an embedding that cannot be stored.

    Raises ProcessUnfit when the device is lost.
    """
    _, text = judge(error)
    unusable = isinstance(error, EmbeddingError) and error.fault is EmbeddingFault.UNUSABLE
    lasting = unusable or isinstance(error, AssetError)
    log.warning("embedding %s: %s", wanted.address, redact(text))
    with worker.engine.begin() as db:
        embeddings.record_failed(
            db,
            address=wanted.address,
            error=storable_text(text),
            lasting=lasting,
            retry_seconds=worker.settings.resend_seconds,
        )
