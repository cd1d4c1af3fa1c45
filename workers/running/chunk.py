"""From a chunk's assets to their outcomes. Fetching and decoding run ahead of the model, storing runs behind it.

The failure contract depends on the order of writes. An asset is put into the chunk's `in_flight` column, and that is
committed, before anything reads the asset. Its outcome is committed together with the next `in_flight`. So whatever
kills this process, the reaper knows the few assets that it worked on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from db import leases, prompts
from db.leases import Asset, ClaimedChunk, LeaseLost, NewOutcome
from db.session import DBAPIError, is_passing
from workers.errors import ErrorKind, TransientError, redact
from workers.images.pixels import RgbImage
from workers.models.spec import ModelError
from workers.running.fetching import DecodeStuck, FetchAhead, NotFetched
from workers.running.from_store import FromStore, from_store
from workers.running.held_lease import HeldLease, log_ids
from workers.running.keeping import Keeper, keeping, want_answered
from workers.running.looks import Encode, Look, encode_and_look
from workers.running.metrics import count_stored, timed
from workers.running.outcomes import ProcessUnfit, failed_outcome, judge, labeled_outcome, storable_text
from workers.running.same_bytes import SameBytes, answer_by_etag, is_deduped
from workers.running.worker import Draining, ModelAway, Worker, release, unfit
from workers.storage.source import open_source

_LOOKAHEAD = 2  # batches marked and decoded ahead of the one on the device, so that the device waits for no commit
_MODEL_AWAY_FAILURES = 3  # of MAX_TRANSIENT_FAILURES: a mirror that is away for hours leaves some tries to each asset

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReport:
    """The counts of one run of a chunk. Flower shows them as the task's result."""

    labeled: int = 0
    failed: int = 0
    answered: int = 0
    left: int = 0


def run_chunk(worker: Worker, chunk_id: int) -> ChunkReport | None:
    """Claim a chunk and work through it. None when there is nothing to claim: the message was late or came twice.

    Raises ProcessUnfit, and DBAPIError while Postgres is away. Every other problem ends in outcomes or in the chunk's
    release.
    """
    with worker.engine.begin() as db:
        chunk = leases.claim_chunk(
            db, chunk_id=chunk_id, worker=worker.name, lease_seconds=worker.settings.lease_seconds, pid=os.getpid()
        )
        if chunk is None:
            return None
        answered = 0 if chunk.fresh else leases.answer_from_stored(db, chunk=chunk)
        assets = leases.pending_assets(db, chunk=chunk)
        if is_deduped(chunk) and assets:
            known = answer_by_etag(db, chunk, assets, lease_seconds=worker.settings.lease_seconds)
            assets, answered = [asset for asset in assets if asset.id not in known], answered + len(known)
    if answered:
        want_answered(worker, chunk)
    run = _ChunkRun(worker, chunk)
    try:
        run.work_through(assets)
    except (LeaseLost, Draining, DecodeStuck, TransientError) as end:
        _end(worker, chunk, end)
    except ModelError as error:  # some parts of a model are loaded at their first use
        raise unfit(worker, chunk, chunk.model, error) from error
    except ProcessUnfit:
        raise
    except Exception as error:
        if isinstance(error, DBAPIError) and is_passing(error):
            raise
        judge(error)  # ends the process when the device is lost
        # Otherwise its lease would run out without a word, and again at the next worker, for ever.
        log.exception("chunk %d of job %d is released", chunk.id, chunk.job_id, extra=log_ids(chunk))
        release(worker, chunk, pause=True, error=redact(f"{type(error).__name__}: {error}"))
    return ChunkReport(
        labeled=run.labeled,
        failed=run.failed,
        answered=answered + run.answered,
        left=len(assets) - run.labeled - run.failed - run.answered,
    )


def _end(worker: Worker, chunk: ClaimedChunk, end: LeaseLost | Draining | DecodeStuck | TransientError) -> None:
    """Release a chunk whose run ended before all was done."""
    about = log_ids(chunk)
    if isinstance(end, LeaseLost):
        log.warning("%s", end, extra=about)
        release(worker, chunk)  # has an effect only when the chunk is still ours, because its job was cancelled
    elif isinstance(end, Draining):
        log.info("chunk %d of job %d is released: the worker stops", chunk.id, chunk.job_id, extra=about)
        release(worker, chunk)
    elif isinstance(end, DecodeStuck):
        said = "chunk %d of job %d: a decode does not end, and only the end of this process ends it"
        log.error(said, chunk.id, chunk.job_id, extra=about)
        release(worker, chunk)
        worker.on_hang()
    else:
        log.warning("chunk %d of job %d is released: %s", chunk.id, chunk.job_id, redact(str(end)), extra=about)
        most = _MODEL_AWAY_FAILURES if isinstance(end, ModelAway) else None
        release(worker, chunk, pause=True, error=str(end), most_failures=most)


class _ChunkRun:
    """The state of one chunk while it runs: its heartbeat, its fetching threads, and its one storing thread."""

    def __init__(self, worker: Worker, chunk: ClaimedChunk) -> None:
        self.labeled = 0
        self.failed = 0
        self._worker = worker
        self._settings = worker.settings
        self._chunk = chunk
        self._keeper: Keeper | None = None
        self._from_store: FromStore | None = None
        self._transient: TransientError | None = None
        self._lease = HeldLease(worker, chunk)
        self._same_bytes = SameBytes(worker, chunk) if is_deduped(chunk) else None

    @property
    def answered(self) -> int:
        """Assets that were answered after they were read, and not by the model."""
        return 0 if self._same_bytes is None else self._same_bytes.answered

    def work_through(self, assets: Sequence[Asset]) -> None:
        """Find the outcome of every asset, then mark the chunk done. Suspects run last, each alone."""
        with self._lease:
            if assets:
                self._segment_all(assets)
            if self.answered:
                want_answered(self._worker, self._chunk)
            if self._transient is not None:
                raise self._transient
            with self._worker.engine.begin() as db:
                leases.finish_chunk(db, chunk=self._chunk)

    def _segment_all(self, assets: Sequence[Asset]) -> None:
        if self._chunk.asked.get("prompts"):
            assets = self._skip_unprompted(assets)
        if not assets:
            return
        encode, look = encode_and_look(self._worker, self._chunk, self._lease.go_on)
        self._from_store = from_store(self._worker, self._chunk)
        self._lease.progress()
        size = self._settings.batch_size
        trusted = [asset for asset in assets if asset.deaths_alone is None]
        suspects = [[asset] for asset in assets if asset.deaths_alone is not None]
        batches = [trusted[k : k + size] for k in range(0, len(trusted), size)]
        with keeping(self._worker, self._chunk) as self._keeper:
            self._run_batches(batches, encode, look, lookahead=_LOOKAHEAD)
            self._run_batches(suspects, encode, look, lookahead=0)

    def _skip_unprompted(self, assets: Sequence[Asset]) -> list[Asset]:
        """Label the assets without a prompt, with no masks and without reading them. Returns the other assets."""
        with self._worker.engine.begin() as db:
            prompted = prompts.prompted_assets(db, chunk=self._chunk)
        self._record([NewOutcome(asset_id=asset.id) for asset in assets if asset.id not in prompted], in_flight=[])
        return [asset for asset in assets if asset.id in prompted]

    def _run_batches(
        self,
        batches: Sequence[Sequence[Asset]],
        encode: Encode,
        look: Look,
        *,
        lookahead: int,
    ) -> None:
        source = open_source(self._chunk.source, s3_endpoint=self._settings.s3_endpoint)
        keys_of = None if self._same_bytes is None else self._same_bytes.keys_of
        with (
            FetchAhead(source, self._settings, self._worker.name, keys_of) as ahead,
            ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
        ):

            def store(k: int, outcomes: Sequence[NewOutcome]) -> None:
                """Commit the outcomes before batch k and mark the next batches in flight. Only then fetch those."""
                marked = [asset for batch in batches[k : k + lookahead + 1] for asset in batch]
                self._record(outcomes, marked)
                if self._keeper is not None:
                    self._keeper.keep(outcomes)
                for asset in marked:
                    ahead.start(asset)

            try:
                stores = [storing.submit(store, 0, [])]
                for k, batch in enumerate(batches):
                    stores[max(k - lookahead, 0)].result()
                    outcomes = self._segment_batch(batch, ahead, encode, look)
                    stores.append(storing.submit(store, k + 1, outcomes))
                    if self._worker.draining() or ahead.is_stuck:
                        stores[-1].result()
                        raise Draining  # or DecodeStuck, which the end of the block raises
                for stored in stores:
                    stored.result()
            finally:
                storing.shutdown(cancel_futures=True)

    def _segment_batch(self, batch: Sequence[Asset], ahead: FetchAhead, encode: Encode, look: Look) -> list[NewOutcome]:
        """Outcomes of a batch. An asset that could not be read for a temporary reason has none yet."""
        outcomes: list[NewOutcome] = []
        images = self._read(batch, ahead, outcomes)
        if self._same_bytes is not None and images:
            images = self._same_bytes.first_looks(images, ahead)
        began = time.perf_counter()
        kept = {} if self._from_store is None else self._from_store.read([ahead.as_read(asset) for asset, _ in images])
        rest = [(asset, image) for asset, image in images if asset.id not in kept]
        encoded = [(asset, image, kept[asset.id]) for asset, image in images if asset.id in kept]
        encoded += self._embed(encode, rest, outcomes)
        share_seconds = (time.perf_counter() - began) / max(len(encoded), 1)  # each image's share of the batch's time
        for asset, image, embedding in encoded:
            self._lease.go_on()
            started = time.perf_counter() - share_seconds
            try:
                with timed(self._worker.name, "masks"):
                    found = look(asset, image, embedding)
            except (LeaseLost, DBAPIError, ModelError):
                raise  # about this worker, not about the asset
            except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
                outcomes.append(failed_outcome(asset, error, job_id=self._chunk.job_id))
            else:
                outcomes.append(labeled_outcome(asset, image, found, started, self._chunk.asked.get("label")))
                if self._keeper is not None:
                    self._keeper.note(ahead.as_read(asset), embedding)
        self._lease.progress()
        if self._same_bytes is not None:
            outcomes = self._same_bytes.with_twins(outcomes)
        return [ahead.with_etag(outcome) for outcome in outcomes]

    def _read(
        self, batch: Sequence[Asset], ahead: FetchAhead, outcomes: list[NewOutcome]
    ) -> list[tuple[Asset, RgbImage]]:
        """The pictures of a batch. An asset that gives none gets an outcome, or waits for the chunk's next run."""
        images: list[tuple[Asset, RgbImage]] = []
        for asset in batch:
            try:
                images.append((asset, ahead.image(asset)))
            except NotFetched:
                continue
            except TransientError as error:
                outcomes.extend(self._put_off(asset, error))
            except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
                outcomes.append(failed_outcome(asset, error, job_id=self._chunk.job_id))
        return images

    def _embed(
        self, encode: Encode, images: Sequence[tuple[Asset, RgbImage]], outcomes: list[NewOutcome]
    ) -> list[tuple[Asset, RgbImage, Any]]:
        """Encode a batch. When it fails, halve it, down to single images. A single image that fails gets an outcome."""
        if not images:
            return []
        try:
            with timed(self._worker.name, "encode"):
                embeddings = encode([image for _, image in images])
            return [(asset, image, embedding) for (asset, image), embedding in zip(images, embeddings, strict=True)]
        except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
            if len(images) == 1:
                outcomes.append(failed_outcome(images[0][0], error, job_id=self._chunk.job_id))
                return []
            judge(error)  # ends the process when the device is lost
        half = len(images) // 2
        return [*self._embed(encode, images[:half], outcomes), *self._embed(encode, images[half:], outcomes)]

    def _put_off(self, asset: Asset, error: TransientError) -> list[NewOutcome]:
        """Leave the asset for the chunk's next run. After MAX_TRANSIENT_FAILURES tries the asset fails."""
        if self._chunk.transient_failures + 1 < leases.MAX_TRANSIENT_FAILURES:
            self._transient = error
            return []
        text = f"{error} (tried {self._chunk.transient_failures + 1} times; `maskfleet retry` tries again)"
        return [NewOutcome(asset_id=asset.id, error_kind=ErrorKind.INTERNAL, error=storable_text(text))]

    def _record(self, outcomes: Sequence[NewOutcome], in_flight: Sequence[Asset]) -> None:
        """Store under the lease. While Postgres is away, try again until the lease would have expired."""
        give_up_at = time.monotonic() + self._settings.lease_seconds
        pause = 0.5
        while True:
            try:
                with timed(self._worker.name, "store"), self._worker.engine.begin() as db:
                    leases.record(
                        db,
                        chunk=self._chunk,
                        outcomes=outcomes,
                        in_flight=[asset.id for asset in in_flight],
                        worker=self._worker.name,
                        lease_seconds=self._settings.lease_seconds,
                    )
                break
            except DBAPIError as error:
                if not is_passing(error) or time.monotonic() + pause > give_up_at:
                    raise
                said = "chunk %d: Postgres did not answer, trying again: %s"
                log.warning(said, self._chunk.id, redact(str(error)), extra=log_ids(self._chunk))
                time.sleep(pause)
                pause = min(pause * 2, 5)
        failed = sum(outcome.error_kind is not None for outcome in outcomes)
        self.failed += failed
        self.labeled += len(outcomes) - failed
        masks = sum(len(outcome.masks) for outcome in outcomes)
        count_stored(self._worker.name, labeled=len(outcomes) - failed, failed=failed, masks=masks)
