"""One chunk of assets to outcomes: fetch and decode ahead, segment, store behind.

The order of writes carries the failure contract. Before anything touches an asset it stands in the chunk's `in_flight`
marker, committed; its outcome is committed together with the marker of what comes next. So whatever kills this
process, the reaper knows which few assets were in its hands.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from db import jobs as queries
from db.jobs import Asset, ClaimedChunk, LeaseLost, NewOutcome, StoredMask
from db.settings import Settings
from db.tables import PromptMatch
from workers import models
from workers.detectors import detector as detectors
from workers.detectors.detector import Asked, AskedDetector, Detection, Detector, PhraseDetector
from workers.errors import AssetError, ErrorKind, TransientError, redact
from workers.images.decode import RgbImage, decode
from workers.masks import Mask
from workers.params import automatic_params
from workers.prompts import Prompt, PromptError, PromptParams, fit_all
from workers.storage.source import Source, open_source

_LOOKAHEAD = 2  # batches marked and decoded beyond the one on the device, so that it never waits for a commit
_FETCH_THREADS = 4
_PROMPTS_A_CALL = 256  # then the heartbeat hears of it: ten thousand prompts on one asset take minutes
_SHOWN_REASONS = 5

log = logging.getLogger(__name__)

LoadModel = Callable[[str], models.Model]
LoadDetector = Callable[[AskedDetector], Detector | PhraseDetector]
Encode = Callable[[Sequence[RgbImage]], list[Any]]
"""What a look needs of each of some images: the model's embedding, at least."""
Look = Callable[[Asset, RgbImage, Any], "Found"]
"""Finds an asset's masks in its image with what the encoder made of that."""
AskedOf = Callable[[Asset], Sequence[Any]]
"""What is asked of an asset: prompts as they are stored."""


class Draining(Exception):
    """The worker was asked to stop: what is left of the chunk goes back."""


class ProcessUnfit(RuntimeError):
    """This process can label nothing: its CUDA context is broken, or its model cannot be loaded.

    It must end without a verdict on any asset; others may be fit.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReport:
    """What one run of a chunk did; shown by Flower as the task's result."""

    labeled: int = 0
    failed: int = 0
    answered: int = 0
    left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An asset's masks. unused: which of its prompts could not be used, and why."""

    masks: Sequence[Mask]
    unused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Who runs chunks, and with what: fixed for the life of a process."""

    name: str
    engine: Engine
    settings: Settings
    load_model: LoadModel
    load_detector: LoadDetector
    draining: Callable[[], bool]
    on_hang: Callable[[], None]


def run_chunk(worker: Worker, chunk_id: int) -> ChunkReport | None:
    """Claim a chunk and work through it; None when there is nothing to claim (a late or doubled message).

    Raises ProcessUnfit; every other trouble ends in outcomes, in the chunk's release, or in its lease running out.
    """
    with worker.engine.begin() as db:
        chunk = queries.claim_chunk(
            db, chunk_id=chunk_id, worker=worker.name, lease_seconds=worker.settings.lease_seconds
        )
        if chunk is None:
            return None
        answered = 0 if chunk.fresh else queries.answer_from_stored(db, chunk=chunk)
        assets = queries.pending_assets(db, chunk=chunk)
    run = _ChunkRun(worker, chunk)
    try:
        run.work_through(assets)
    except LeaseLost as lost:
        log.warning("%s", lost)
        _release(worker, chunk)  # changes nothing unless the chunk is still ours, its job cancelled
    except Draining:
        log.info("chunk %d of job %d goes back: the worker stops", chunk.id, chunk.job_id)
        _release(worker, chunk)
    except TransientError as error:
        log.warning("chunk %d of job %d goes back: %s", chunk.id, chunk.job_id, redact(str(error)))
        _release(worker, chunk, pause=True, error=str(error))
    except models.ModelError as error:  # a part of the model that is opened when it is first asked
        raise _unfit(worker, chunk, chunk.model, error) from error
    return ChunkReport(
        labeled=run.labeled,
        failed=run.failed,
        answered=answered,
        left=len(assets) - run.labeled - run.failed,
    )


def _release(worker: Worker, chunk: ClaimedChunk, *, pause: bool = False, error: str | None = None) -> None:
    with worker.engine.begin() as db:
        queries.release_chunk(db, chunk=chunk, transient_error=pause)
        if error is not None:
            queries.note_error(db, job_id=chunk.job_id, error=_storable(f"{worker.name}: {error}"))


@contextmanager
def _loading(worker: Worker, chunk: ClaimedChunk, name: str) -> Iterator[None]:
    """What keeps a model from loading here may not elsewhere, so it is no verdict on job or assets."""
    try:
        yield
    except Exception as error:
        raise _unfit(worker, chunk, name, error) from error


def _unfit(worker: Worker, chunk: ClaimedChunk, name: str, error: Exception) -> ProcessUnfit:
    """Hand the chunk back with the reason on its job, for a worker that has the model."""
    _release(worker, chunk, error=f"{name} cannot be loaded: {error}")
    return ProcessUnfit(f"{name} cannot be loaded: {error}")


class _ChunkRun:
    """The state of one chunk while it runs: its heartbeat, its fetching threads, its one storing thread."""

    def __init__(self, worker: Worker, chunk: ClaimedChunk) -> None:
        self.labeled = 0
        self.failed = 0
        self._worker = worker
        self._settings = worker.settings
        self._chunk = chunk
        self._images: dict[int, Future[RgbImage]] = {}
        self._transient: TransientError | None = None
        self._lost = threading.Event()
        self._over = threading.Event()
        self._progress_at = time.monotonic()

    def work_through(self, assets: Sequence[Asset]) -> None:
        """Bring every asset to its outcome, suspects alone and last, then mark the chunk done."""
        heart = threading.Thread(target=self._beat, name=f"heartbeat-{self._chunk.id}", daemon=True)
        heart.start()
        try:
            if assets:
                self._segment_all(assets)
            if self._transient is not None:
                raise self._transient
            with self._worker.engine.begin() as db:
                queries.finish_chunk(db, chunk=self._chunk)
        finally:
            self._over.set()
            heart.join()

    def _segment_all(self, assets: Sequence[Asset]) -> None:
        asked = self._chunk.asked.get("prompts")
        match = PromptMatch(asked["match"]) if asked else None
        if match is not None:
            assets = self._pass_by_unprompted(assets, match)
        if not assets:
            return
        encode, look = self._ways(match)
        self._progress_at = time.monotonic()
        size = self._settings.batch_size
        trusted = [asset for asset in assets if asset.deaths_alone is None]
        suspects = [[asset] for asset in assets if asset.deaths_alone is not None]
        batches = [trusted[k : k + size] for k in range(0, len(trusted), size)]
        self._run_batches(batches, encode, look, lookahead=_LOOKAHEAD)
        self._run_batches(suspects, encode, look, lookahead=0)

    def _ways(self, match: PromptMatch | None) -> tuple[Encode, Look]:
        """How this job's images are encoded, and looked at; loads what it takes."""
        with _loading(self._worker, self._chunk, self._chunk.model):
            models.require_same_weights(models.find(self._chunk.model), self._chunk.model_version)
            model = self._worker.load_model(self._chunk.model)
        asked_of = self._asked_of(match)
        stored = self._chunk.asked.get("detector")
        if stored is None and asked_of is None:
            is_fast = self._chunk.asked.get("params", {}).get("precision") == "fast"
            return partial(model.embed, fast=is_fast), self._automatic_look(model)
        if stored is None:
            return model.embed, self._prompted_look(model, cast(AskedOf, asked_of))
        asked = detectors.asked_of_json(stored)
        with _loading(self._worker, self._chunk, f"detector {asked.name}"):
            detector = self._worker.load_detector(asked)
        if asked_of is None:
            return _detecting(model, cast(Detector, detector), asked), self._detected_look(model, asked)
        phrases = _Phrases(detector=cast(PhraseDetector, detector), threshold=asked.threshold)
        return model.embed, self._prompted_look(model, asked_of, phrases)

    def _asked_of(self, match: PromptMatch | None) -> AskedOf | None:
        """Where an asset's prompts are: in the database, or the same phrases for all; None for a job without."""
        text = self._chunk.asked.get("text")
        if match is None:
            return (lambda asset: text) if text else None

        def stored(asset: Asset) -> Sequence[Any]:
            with self._worker.engine.begin() as db:
                return queries.prompts_of(db, asset_id=asset.id, match=match)

        return stored

    def _pass_by_unprompted(self, assets: Sequence[Asset], match: PromptMatch) -> list[Asset]:
        """Label the assets that the job has no prompt for, with no masks and unread; returns the others."""
        with self._worker.engine.begin() as db:
            prompted = queries.prompted_assets(db, chunk=self._chunk, match=match)
        self._record([NewOutcome(asset_id=asset.id) for asset in assets if asset.id not in prompted], in_flight=[])
        return [asset for asset in assets if asset.id in prompted]

    def _automatic_look(self, model: models.Model) -> Look:
        params = automatic_params(models.find(self._chunk.model).defaults, self._chunk.asked.get("params", {}))
        return lambda asset, image, embedding: Found(masks=model.automatic(image, embedding, params))

    def _prompted_look(self, model: models.Model, asked_of: AskedOf, phrases: _Phrases | None = None) -> Look:
        """phrases: boxes what prompts say in text, for models that take none."""

        def look(asset: Asset, image: RgbImage, embedding: Any) -> Found:
            asked = asked_of(asset)
            height, width = image.shape[:2]
            usable, wrong = fit_all(asked, (width, height))
            prompts = [(prompt, {"index": index, **asked[index]}) for index, prompt in usable.items()]
            try:
                masks, lost = self._answer(model, image, embedding, prompts, phrases)
            except PromptError:
                masks, lost, unread = self._answer_apart(model, image, embedding, prompts, phrases)
                wrong += unread
            if len(wrong) == len(asked):
                raise AssetError(ErrorKind.BAD_PROMPT, f"{asset.key}: {_list_unused(wrong, len(asked), 'prompts')}")
            unused = [_list_unused(wrong, len(asked), "prompts")] if wrong else []
            unused += [_list_unused(lost, None, "boxes")] if lost else []
            return Found(masks=masks, unused="; ".join(unused) or None)

        return look

    def _answer(
        self,
        model: models.Model,
        image: RgbImage,
        embedding: Any,
        prompts: Sequence[Asked],
        phrases: _Phrases | None,
    ) -> tuple[list[Mask], list[str]]:
        """The masks of prompts, and what is wrong with boxes that were found for them. Raises PromptError."""
        lost: list[str] = []
        if phrases is not None:
            prompts, lost = phrases.box(image, prompts)
        return self._ask(model, image, embedding, prompts), lost

    def _answer_apart(
        self,
        model: models.Model,
        image: RgbImage,
        embedding: Any,
        prompts: Sequence[Asked],
        phrases: _Phrases | None,
    ) -> tuple[list[Mask], list[str], list[str]]:
        """The same, and what is wrong with prompts that cannot be read, such as a text that is too long."""
        masks: list[Mask] = []
        lost: list[str] = []
        unread: list[str] = []
        for prompt, row in prompts:
            try:
                some = self._answer(model, image, embedding, [(prompt, row)], phrases)
            except PromptError as error:
                unread.append(f"prompt {row['index']}: {error}")
                continue
            masks += some[0]
            lost += some[1]
        return masks, lost, unread

    def _detected_look(self, model: models.Model, asked: AskedDetector) -> Look:
        def look(asset: Asset, image: RgbImage, detected: _Detected) -> Found:
            height, width = image.shape[:2]
            prompts, wrong = detectors.prompts_of(detected.boxes, asked, (width, height))
            masks = self._ask(model, image, detected.embedding, prompts)
            return Found(masks=masks, unused=_list_unused(wrong, len(detected.boxes), "boxes") if wrong else None)

        return look

    def _ask(self, model: models.Model, image: RgbImage, embedding: Any, prompts: Sequence[Asked]) -> list[Mask]:
        """The masks of any number of prompts, the heartbeat hearing of it now and then."""
        params = PromptParams(**self._chunk.asked.get("params", {}))
        masks: list[Mask] = []
        for some in _slices(prompts, _PROMPTS_A_CALL):
            found = model.prompted(image, embedding, [prompt for prompt, _ in some], params)
            for (prompt, asked), answers in zip(some, found, strict=True):
                masks += [_of_prompt(mask, prompt, asked) for mask in answers]
            self._go_on()
        return masks

    def _run_batches(
        self,
        batches: Sequence[Sequence[Asset]],
        encode: Encode,
        look: Look,
        *,
        lookahead: int,
    ) -> None:
        source = open_source(self._chunk.source, s3_endpoint=self._settings.s3_endpoint)
        with (
            ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch") as fetching,
            ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
        ):

            def store(k: int, outcomes: Sequence[NewOutcome]) -> None:
                """Commit the outcomes before batch k and the marker of what follows; only then fetch the latter."""
                marked = [asset for batch in batches[k : k + lookahead + 1] for asset in batch]
                self._record(outcomes, marked)
                for asset in marked:
                    if asset.id not in self._images:
                        self._images[asset.id] = fetching.submit(self._fetch, source, asset)

            try:
                stores = [storing.submit(store, 0, [])]
                for k, batch in enumerate(batches):
                    stores[max(k - lookahead, 0)].result()
                    outcomes = self._segment_batch(batch, encode, look)
                    stores.append(storing.submit(store, k + 1, outcomes))
                    if self._worker.draining():
                        stores[-1].result()
                        raise Draining
                for stored in stores:
                    stored.result()
            finally:
                storing.shutdown(cancel_futures=True)
                fetching.shutdown(cancel_futures=True)

    def _fetch(self, source: Source, asset: Asset) -> RgbImage:
        content = source.read(asset.key, self._settings.max_object_bytes)
        return decode(content, name=asset.key, max_pixels=self._settings.max_pixels)

    def _segment_batch(self, batch: Sequence[Asset], encode: Encode, look: Look) -> list[NewOutcome]:
        """Outcomes of a batch; an asset that could not be read for a passing reason has none yet."""
        outcomes: list[NewOutcome] = []
        images: list[tuple[Asset, RgbImage]] = []
        for asset in batch:
            try:
                images.append((asset, self._images.pop(asset.id).result()))
            except TransientError as error:
                outcomes.extend(self._put_off(asset, error))
            except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
                outcomes.append(self._failed(asset, error))
        began = time.perf_counter()
        encoded = self._embed(encode, images, outcomes)
        share_seconds = (time.perf_counter() - began) / max(len(encoded), 1)  # each image's part of its batch's pass
        for asset, image, embedding in encoded:
            self._go_on()
            started = time.perf_counter() - share_seconds
            try:
                found = look(asset, image, embedding)
            except (LeaseLost, DBAPIError, models.ModelError):
                raise  # about this worker, not about the asset
            except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
                outcomes.append(self._failed(asset, error))
            else:
                outcomes.append(_labeled(asset, image, found, started, self._chunk.asked.get("label")))
        self._progress_at = time.monotonic()
        return outcomes

    def _go_on(self) -> None:
        """Tell the heartbeat that work gets done; raises LeaseLost when it is for nothing."""
        if self._lost.is_set():
            raise LeaseLost(f"chunk {self._chunk.id}: the lease was lost while it ran")
        self._progress_at = time.monotonic()

    def _embed(
        self, encode: Encode, images: Sequence[tuple[Asset, RgbImage]], outcomes: list[NewOutcome]
    ) -> list[tuple[Asset, RgbImage, Any]]:
        """Encode a batch; what does not fit on the device is halved down to single images, then given up."""
        if not images:
            return []
        try:
            embeddings = encode([image for _, image in images])
            return [(asset, image, embedding) for (asset, image), embedding in zip(images, embeddings, strict=True)]
        except Exception as error:  # noqa: BLE001  one bad asset never stops its neighbours
            if len(images) == 1:
                outcomes.append(self._failed(images[0][0], error))
                return []
            _judge(error)  # ends the process when the device is lost
        half = len(images) // 2
        return [*self._embed(encode, images[:half], outcomes), *self._embed(encode, images[half:], outcomes)]

    def _put_off(self, asset: Asset, error: TransientError) -> list[NewOutcome]:
        """Leave the asset for the chunk's next run, unless that was tried often enough."""
        if self._chunk.transient_failures + 1 < queries.MAX_TRANSIENT_FAILURES:
            self._transient = error
            return []
        text = f"{error} (tried {self._chunk.transient_failures + 1} times; `maskfleet retry` tries again)"
        return [NewOutcome(asset_id=asset.id, error_kind=ErrorKind.INTERNAL, error=_storable(text))]

    def _failed(self, asset: Asset, error: Exception) -> NewOutcome:
        kind, text = _judge(error)
        if kind is ErrorKind.INTERNAL:
            log.error("asset %d of job %d: %s", asset.id, self._chunk.job_id, redact(text), exc_info=error)
        return NewOutcome(asset_id=asset.id, error_kind=kind, error=_storable(text))

    def _record(self, outcomes: Sequence[NewOutcome], in_flight: Sequence[Asset]) -> None:
        """Store under the lease; while Postgres is away, try again until the lease would have run out."""
        give_up_at = time.monotonic() + self._settings.lease_seconds
        pause = 0.5
        while True:
            try:
                with self._worker.engine.begin() as db:
                    queries.record(
                        db,
                        chunk=self._chunk,
                        outcomes=outcomes,
                        in_flight=[asset.id for asset in in_flight],
                        worker=self._worker.name,
                        lease_seconds=self._settings.lease_seconds,
                    )
                break
            except OperationalError as error:
                if time.monotonic() + pause > give_up_at:
                    raise
                log.warning("chunk %d: Postgres did not answer, trying again: %s", self._chunk.id, redact(str(error)))
                time.sleep(pause)
                pause = min(pause * 2, 5)
        failed = sum(outcome.error_kind is not None for outcome in outcomes)
        self.failed += failed
        self.labeled += len(outcomes) - failed

    def _beat(self) -> None:
        """Extend the lease while assets get finished; a process in which nothing moves is given up."""
        while not self._over.wait(self._settings.lease_seconds / 4):
            if time.monotonic() - self._progress_at > self._settings.hang_seconds:
                log.error("chunk %d: no asset finished for %g s", self._chunk.id, self._settings.hang_seconds)
                self._worker.on_hang()
                return
            try:
                with self._worker.engine.begin() as db:
                    queries.extend_lease(db, chunk=self._chunk, lease_seconds=self._settings.lease_seconds)
            except LeaseLost:
                self._lost.set()
                return
            except DBAPIError as error:
                log.warning("chunk %d: heartbeat failed: %s", self._chunk.id, redact(str(error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Detected:
    """What a detector found in an image, and the image's embedding, which is None where it found nothing."""

    boxes: Sequence[Detection]
    embedding: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Phrases:
    """A job's detector of what phrases say."""

    detector: PhraseDetector
    threshold: float

    def box(self, image: RgbImage, prompts: Sequence[Asked]) -> tuple[list[Asked], list[str]]:
        return detectors.boxes_of_phrases(self.detector, image, prompts, self.threshold)


def _detecting(model: models.Model, detector: Detector, asked: AskedDetector) -> Encode:
    """The detector before the model's encoder, which sees only the images with a box."""

    def encode(images: Sequence[RgbImage]) -> list[_Detected]:
        found = [
            [box for box in boxes if asked.keeps(box.class_name)]
            for boxes in detector.detect(images, threshold=asked.threshold)
        ]
        boxed = [image for image, boxes in zip(images, found, strict=True) if boxes]
        embeddings = iter(model.embed(boxed) if boxed else [])
        return [_Detected(boxes=boxes, embedding=next(embeddings) if boxes else None) for boxes in found]

    return encode


def _judge(error: Exception) -> tuple[ErrorKind, str]:
    """The verdict on an asset that raised; raises ProcessUnfit when it is the process that is broken."""
    if isinstance(error, AssetError):
        return error.kind, str(error)
    from workers.engine.device import DeviceFault, device_fault

    match device_fault(error):
        case DeviceFault.LOST:
            raise ProcessUnfit(str(error)) from error
        case DeviceFault.OUT_OF_MEMORY:
            return ErrorKind.GPU_OOM, f"does not fit in device memory even alone: {error}"
    return ErrorKind.INTERNAL, f"{type(error).__name__}: {error}"


def _storable(text: str) -> str:
    """A message without secrets, and without what Postgres refuses in text."""
    return redact(text).replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()[:2000]


def _of_prompt(mask: Mask, prompt: Prompt, asked: dict[str, Any]) -> Mask:
    return replace(mask, label=mask.label or prompt.label or prompt.text, prompt=asked)


def _list_unused(wrong: Sequence[str], asked: int | None, what: str) -> str:
    """One line for the asset's row; the first reasons stand for the rest."""
    of = "" if asked is None else f" of {asked}"
    more = f"; and {len(wrong) - _SHOWN_REASONS} more" if len(wrong) > _SHOWN_REASONS else ""
    return f"{len(wrong)}{of} {what} cannot be used: {'; '.join(wrong[:_SHOWN_REASONS])}{more}"


def _slices(prompts: Sequence[Asked], size: int) -> list[Sequence[Asked]]:
    return [prompts[k : k + size] for k in range(0, len(prompts), size)]


def _labeled(asset: Asset, image: RgbImage, found: Found, started: float, label: str | None) -> NewOutcome:
    height, width = image.shape[:2]
    return NewOutcome(
        asset_id=asset.id,
        error=None if found.unused is None else _storable(found.unused),
        width=width,
        height=height,
        segment_ms=int(1000 * (time.perf_counter() - started)),
        masks=[_stored(asset, n, mask, label) for n, mask in enumerate(found.masks)],
    )


def _stored(asset: Asset, n: int, mask: Mask, label: str | None) -> StoredMask:
    x, y, w, h = (int(v) for v in mask.bbox_xywh)
    return StoredMask(
        asset_id=asset.id,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        label=mask.label or label,
        prompt=mask.prompt,
    )
