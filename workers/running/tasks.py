"""The Celery side of a worker: one task, and the parts that a process sets up once and keeps.

Heavy work happens only in the pool's child, at first use. The import of this module loads no torch and no model.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

from billiard.exceptions import WorkerLostError
from celery import Task
from celery.signals import setup_logging, task_failure, worker_init, worker_shutting_down
from kombu.exceptions import OperationalError as BrokerAway

from db import jobs, queue
from db.session import DBAPIError, Engine, is_passing, open_engine
from db.settings import settings
from workers.detectors import detector as detectors
from workers.errors import redact
from workers.log_lines import log_to_stderr
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.running.app import FIRST_QUEUE, QUEUE, SEGMENT_CHUNK, app, publish_chunks, waiting_messages
from workers.running.chunk import ChunkReport, run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

# Set by `maskfleet worker`, which owns the folder. A file `stop` in it means that the worker drains.
RUN_DIR_VARIABLE = "MASKFLEET_WORKER_RUN_DIR"
SUPERVISOR_VARIABLE = "MASKFLEET_WORKER_SUPERVISOR"  # its process id
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_EX_TEMPFAIL = 75  # sysexits.h: try again later
_MOST_FAULTS = 3
_LONGEST_PAUSE_SECONDS = 5.0

log = logging.getLogger(__name__)


@worker_init.connect
def _end_with_the_supervisor(**_: object) -> None:
    """Make Linux send SIGTERM to this (main) process when its supervisor ends, in any way.

    Otherwise it would keep its device, beside the worker that a new supervisor starts there.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(supervisor):  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)


@worker_shutting_down.connect
def _drain(**_: object) -> None:
    """Tell the pool's child that its worker ends. It then finishes its current batch and releases its chunk."""
    with suppress(OSError):  # the folder's owner may have ended and removed it
        (_run_dir() / "stop").touch()


@setup_logging.connect
def _log_plainly(**_: object) -> None:
    log_to_stderr()
    for chatty in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # their debug lines hold signatures


@app.task(name=SEGMENT_CHUNK, bind=True)
def segment_chunk(self: Task, chunk_id: int) -> dict[str, int] | None:
    """Label one chunk. A message that is late, foreign or comes twice finds nothing to claim and does nothing."""
    if type(chunk_id) is not int:
        log.error("message with chunk id %r: expected a whole number; ignored", chunk_id)
        return None
    worker = _worker(self.request.hostname or "worker")
    try:
        report = _run_once_postgres_answers(worker, chunk_id)
        _faults_file().unlink(missing_ok=True)
    except ProcessUnfit:
        log.exception("chunk %d: this process ends", chunk_id)
        _leave()
    top_up_or_say(worker.engine)
    return asdict(report) if report else None


def _run_once_postgres_answers(worker: Worker, chunk_id: int) -> ChunkReport | None:
    """Run a chunk. While Postgres is away, keep the message and wait. Otherwise the queue would be emptied for nothing.

    A chunk that was claimed before the outage is not claimed again. Its lease expires, and another worker continues it.
    """
    pause = 0.5
    while True:
        try:
            return run_chunk(worker, chunk_id)
        except DBAPIError as error:
            if not is_passing(error):
                raise
            if worker.draining():
                return None
            log.warning("chunk %d: Postgres does not answer, next try in %g s: %s", chunk_id, pause, _one_line(error))
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


@task_failure.connect
def _expire_lease_of_dead(
    sender: Task | None = None, exception: Exception | None = None, args: tuple[int, ...] = (), **_: object
) -> None:
    """The pool's child died: end its lease now. This (main) process knows that nobody else holds it."""
    if not isinstance(exception, WorkerLostError) or sender is None:
        return
    worker = _worker(sender.request.hostname or "worker")
    try:
        with worker.engine.begin() as db:
            queue.expire_lease(db, chunk_id=args[0], worker=worker.name)
    except DBAPIError as error:
        if not is_passing(error):
            raise
        log.warning("chunk %d: Postgres is away; it continues after its lease expires: %s", args[0], _one_line(error))
        return
    top_up_or_say(worker.engine)


def top_up_or_say(engine: Engine) -> None:
    """`top_up`, but a temporary error is only logged, because another process tops up later."""
    try:
        top_up(engine)
    except DBAPIError as error:
        if not is_passing(error):
            raise
        log.warning("Postgres does not answer: %s", _one_line(error))


def top_up(engine: Engine) -> int:
    """Reap expired leases, finish jobs, refill the queue. Returns how many chunks were sent.

    Idempotent, and safe from many processes at once. It commits before it publishes. A chunk whose message is lost in
    between, in a crash or a flushed broker, is sent again after `resend_seconds`. But not while its message may still
    wait in the queue: otherwise a deployment without workers would fill its broker with copies.
    """
    deployment = settings()
    sent = queue.Window([], [])
    try:
        with engine.begin() as db:
            queue.reap(db)
            jobs.finish_jobs(db)
            stale = queue.has_stale_sent(db, resend_seconds=deployment.resend_seconds)
        is_empty = stale and waiting_messages() == 0
        with engine.begin() as db:
            if stale:
                queue.resend_stale(db, resend_seconds=deployment.resend_seconds, queue_is_empty=is_empty)
            sent = queue.take_window(db, window=deployment.window_chunks)
        for chunk_ids, lane in ((sent.returned, FIRST_QUEUE), (sent.new, QUEUE)):
            if chunk_ids:
                publish_chunks(chunk_ids, queue=lane)
    except BrokerAway as error:
        with engine.begin() as db:
            queue.unsend(db, chunk_ids=sent.all)
        log.warning("the broker is away, %d chunks wait: %s", len(sent.all), redact(str(error)))
        return 0
    return len(sent.all)


@cache
def _worker(name: str) -> Worker:
    url = settings().database_url
    if url is None:
        raise RuntimeError("MASKFLEET_DATABASE_URL is not set: a worker stores its results in Postgres")
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
    """End this child without a verdict. After _MOST_FAULTS of these in a row, stop the worker: it can label nothing."""
    faults = _faults_file()
    seen = len(faults.read_text()) + 1 if faults.exists() else 1
    if faults.parent.is_dir():
        faults.write_text("x" * seen)
    if seen >= _MOST_FAULTS:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(_EX_TEMPFAIL)


def _one_line(error: DBAPIError) -> str:
    return redact(" ".join(str(error.orig).split()))


def _faults_file() -> Path:
    return _run_dir() / "faults"


def _run_dir() -> Path:
    return Path(os.environ.get(RUN_DIR_VARIABLE, "/nonexistent"))
