"""The Celery side of a worker: one task, and what a process sets up once and keeps.

Everything heavy happens in the pool's child, on first use: importing this module loads neither torch nor a model.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import asdict
from functools import cache
from pathlib import Path

from billiard.exceptions import WorkerLostError
from celery import Task
from celery.signals import setup_logging, task_failure
from kombu.exceptions import OperationalError as BrokerAway

from db import jobs, queue
from db.session import Engine, OperationalError, open_engine
from db.settings import settings
from workers.detectors import detector as detectors
from workers.errors import redact
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.running.app import SEGMENT_CHUNK, app, publish_chunks, waiting_messages
from workers.running.chunk import run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

# Set by `maskfleet worker`, which owns the folder: the file `stop` in it means that the worker drains.
RUN_DIR_VARIABLE = "MASKFLEET_WORKER_RUN_DIR"
_EX_TEMPFAIL = 75  # sysexits.h: try again later
_MOST_FAULTS = 3

log = logging.getLogger(__name__)


@setup_logging.connect
def _log_plainly(**_: object) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # their debug lines hold signatures


@app.task(name=SEGMENT_CHUNK, bind=True)
def segment_chunk(self: Task, chunk_id: int) -> dict[str, int] | None:
    """Label one chunk. A late, doubled or foreign message finds nothing to claim and does nothing."""
    if type(chunk_id) is not int:
        log.error("message with chunk id %r: expected a whole number; ignored", chunk_id)
        return None
    worker = _worker(self.request.hostname or "worker")
    try:
        report = run_chunk(worker, chunk_id)
        _faults_file().unlink(missing_ok=True)
        top_up(worker.engine)
    except ProcessUnfit:
        log.exception("chunk %d: this process ends", chunk_id)
        _leave()
    except OperationalError:
        log.exception("chunk %d: Postgres is away; the lease will run out and the chunk go on", chunk_id)
        return None
    return asdict(report) if report else None


@task_failure.connect
def _expire_lease_of_dead(
    sender: Task | None = None, exception: Exception | None = None, args: tuple[int, ...] = (), **_: object
) -> None:
    """The pool's child died: its lease need not run out in time, this (main) process knows that nobody holds it."""
    if not isinstance(exception, WorkerLostError) or sender is None:
        return
    worker = _worker(sender.request.hostname or "worker")
    try:
        with worker.engine.begin() as db:
            queue.expire_lease(db, chunk_id=args[0], worker=worker.name)
        top_up(worker.engine)
    except OperationalError:
        log.warning("chunk %d: Postgres is away, its lease will run out", args[0])


def top_up(engine: Engine) -> int:
    """Reap expired leases, finish jobs, refill the queue; returns how many chunks were sent.

    Idempotent and safe from many processes at once. Commits before it publishes: what a crash or a flushed broker
    swallows in between is sent again after `resend_seconds`, but not while the queue still holds messages, or a
    deployment without workers would fill its broker with copies.
    """
    deployment = settings()
    chunk_ids: list[int] = []
    try:
        with engine.begin() as db:
            queue.reap(db)
            jobs.finish_jobs(db)
            stale = queue.has_stale_sent(db, resend_seconds=deployment.resend_seconds)
        lost = stale and waiting_messages() == 0
        with engine.begin() as db:
            if lost:
                queue.resend_stale(db, resend_seconds=deployment.resend_seconds)
            chunk_ids = queue.take_window(db, window=deployment.window_chunks)
        if chunk_ids:
            publish_chunks(chunk_ids)
    except BrokerAway as error:
        with engine.begin() as db:
            queue.unsend(db, chunk_ids=chunk_ids)
        log.warning("the broker is away, %d chunks wait: %s", len(chunk_ids), redact(str(error)))
        return 0
    return len(chunk_ids)


@cache
def _worker(name: str) -> Worker:
    url = settings().database_url
    if url is None:
        raise RuntimeError("MASKFLEET_DATABASE_URL is not set: a worker stores what it finds in Postgres")
    return Worker(
        name=name,
        engine=open_engine(url.get_secret_value()),
        settings=settings(),
        load_model=_load_model,
        load_detector=_load_detector,
        draining=lambda: (_run_dir() / "stop").exists(),
        on_hang=lambda: os._exit(_EX_TEMPFAIL),
    )


def _load_model(name: str) -> Model:
    from workers.engine.device import default_device

    return load_model(find_model(name), default_device())


def _load_detector(asked: detectors.AskedDetector) -> detectors.Detector | detectors.PhraseDetector:
    from workers.engine.device import default_device

    return detectors.load(asked, default_device())


def _leave() -> None:
    """End this child without a verdict; after several in a row stop the worker, for it would only eat chunks."""
    faults = _faults_file()
    seen = len(faults.read_text()) + 1 if faults.exists() else 1
    if faults.parent.is_dir():
        faults.write_text("x" * seen)
    if seen >= _MOST_FAULTS:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(_EX_TEMPFAIL)


def _faults_file() -> Path:
    return _run_dir() / "faults"


def _run_dir() -> Path:
    return Path(os.environ.get(RUN_DIR_VARIABLE, "/nonexistent"))
