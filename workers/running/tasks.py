"""The Celery side of a worker: its two tasks, and the parts that a process sets up once and keeps.

Heavy work happens only in the pool's child, at first use. The import of this module loads no torch and no model.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar

from billiard.exceptions import WorkerLostError
from celery import Task
from celery.signals import celeryd_after_setup, setup_logging, worker_init, worker_process_init, worker_shutting_down
from celery.worker.request import Request
from kombu.exceptions import OperationalError as BrokerAway

from db import jobs, processes, queue
from db.session import Connection, DBAPIError, Engine, is_passing, open_engine
from db.settings import settings
from db.states import ProcessKind
from workers.allocator import keep_freed_memory
from workers.detectors import detector as detectors
from workers.embeddings.store import open_store
from workers.errors import redact
from workers.logs import log_to_stderr
from workers.machine import pinned_device
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.running.app import EMBED, FIRST_QUEUE, QUEUE, SEGMENT_CHUNK, app, publish_chunks, waiting_messages
from workers.running.chunk import run_chunk
from workers.running.embedding import embed_wanted, send_wanted
from workers.running.outcomes import ProcessUnfit
from workers.running.pulse import PulseStep
from workers.running.run_dir import child_file, faults_file, keep_error, model_file, run_dir, stop_file
from workers.running.worker import Worker

SUPERVISOR_VARIABLE = "MASKFLEET_WORKER_SUPERVISOR"  # its process id
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_EX_TEMPFAIL = 75  # sysexits.h: try again later
_MOST_FAULTS = 3
_LONGEST_PAUSE_SECONDS = 5.0

log = logging.getLogger(__name__)
T = TypeVar("T")


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


@worker_process_init.connect
def _keep_freed_memory(**_: object) -> None:
    keep_freed_memory()


@worker_process_init.connect
def _say_which_process(**_: object) -> None:
    with suppress(OSError):  # the folder's owner may have ended and removed it
        child_file(run_dir()).write_text(str(os.getpid()))


@worker_process_init.connect
def _leave_sigterm_to_the_worker(**_: object) -> None:
    """Slurm and systemd send SIGTERM to every process of a worker. The pool's child would die of it, with its batch."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@worker_shutting_down.connect
def _drain(**_: object) -> None:
    """Tell the pool's child that its worker ends. It then finishes its current batch and releases its chunk."""
    with suppress(OSError):  # the folder's owner may have ended and removed it
        stop_file(run_dir()).touch()


class _LastError(logging.Handler):
    """Notes the last error that was logged, for the supervisor."""

    def emit(self, record: logging.LogRecord) -> None:
        keep_error(record.exc_info[1] if record.exc_info else record.getMessage())


@setup_logging.connect
def _log(**_: object) -> None:
    log_to_stderr()
    logging.getLogger().addHandler(_LastError(logging.ERROR))
    for chatty in ("botocore", "boto3", "urllib3", "s3transfer"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # their debug lines hold signatures


@celeryd_after_setup.connect
def _silence_billiard(**_: object) -> None:
    """Without this the pool's children log in billiard's own form before `_log` is called there."""
    os.environ.pop("_MP_FORK_LOGLEVEL_", None)


app.steps["worker"].add(PulseStep)


class ChunkRequest(Request):  # type: ignore[misc]  # Celery's classes carry no types
    """A message in Celery's main process. When the child that took it dies, the child's lease ends now."""

    def on_failure(self, exc_info: Any, *given: Any, **named: Any) -> Any:
        answer = super().on_failure(exc_info, *given, **named)
        # A child that leaves by itself is reported as SystemExit.
        if isinstance(exc_info.exception, WorkerLostError | SystemExit) and self.worker_pid is not None:
            _expire_lease_of_dead(self.args[0], str(self.hostname), int(self.worker_pid))
        return answer


@app.task(name=SEGMENT_CHUNK, bind=True, Request=ChunkRequest)
def segment_chunk(self: Task, chunk_id: int) -> dict[str, int] | None:
    """Label one chunk. A message that is late, foreign or comes twice finds nothing to claim and does nothing."""
    if type(chunk_id) is not int:
        log.error("message with chunk id %r: expected a whole number; ignored", chunk_id)
        return None
    worker = _worker(self.request.hostname or "worker")
    try:
        report = _once_postgres_answers(worker, f"chunk {chunk_id}", lambda: run_chunk(worker, chunk_id))
        faults_file(run_dir()).unlink(missing_ok=True)
    except ProcessUnfit:
        log.exception("chunk %d: this process ends", chunk_id, extra={"chunk": chunk_id})
        _leave()
    top_up_or_say(worker.engine)
    return asdict(report) if report else None


@app.task(name=EMBED, bind=True)
def embed(self: Task, ids: list[int]) -> int | None:
    """Make wanted embeddings. A message that is late, foreign or comes twice finds nothing to claim."""
    if not isinstance(ids, list) or not all(type(row_id) is int for row_id in ids):
        log.error("message with embeddings %.80r: expected a list of whole numbers; ignored", ids)
        return None
    worker = _worker(self.request.hostname or "worker")
    store = open_store(worker.settings)
    if store is None:
        log.warning("%d embeddings are wanted, but MASKFLEET_EMBEDDINGS is not set here", len(ids))
        return None
    try:
        stored = _once_postgres_answers(worker, "embeddings", lambda: embed_wanted(worker, store, ids))
    except ProcessUnfit:
        log.exception("embeddings %s: this process ends", ids)
        _leave()
    top_up_or_say(worker.engine)
    return stored


def _once_postgres_answers(worker: Worker, what: str, work: Callable[[], T]) -> T | None:
    """Do the work. While Postgres is away, keep the message and wait. Otherwise the queue would be emptied for nothing.

    What was claimed before the outage is not claimed again. The claim expires, and another worker continues.
    """
    pause = 0.5
    while True:
        try:
            return work()
        except DBAPIError as error:
            if not is_passing(error):
                raise
            if worker.draining():
                return None
            log.warning("%s: Postgres does not answer, next try in %g s: %s", what, pause, _one_line(error))
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def _expire_lease_of_dead(chunk_id: object, worker_name: str, pid: int) -> None:
    """The pool's child died: end its lease, and only its own. A message that came twice may have another holder."""
    if type(chunk_id) is not int:
        return
    worker = _worker(worker_name)
    try:
        with worker.engine.begin() as db:
            queue.expire_lease(db, chunk_id=chunk_id, worker=worker.name, pid=pid)
    except DBAPIError as error:
        if not is_passing(error):
            raise
        said = "chunk %d: Postgres is away; it continues after its lease expires: %s"
        log.warning(said, chunk_id, _one_line(error), extra={"chunk": chunk_id})
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
    """Reap expired leases, finish jobs, refill the queues. Returns how many chunks were sent.

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
            window = _window(db)
        send_wanted(engine)
        is_empty = stale and waiting_messages(FIRST_QUEUE, QUEUE) == 0
        with engine.begin() as db:
            if stale:
                queue.resend_stale(db, resend_seconds=deployment.resend_seconds, queue_is_empty=is_empty)
            sent = queue.take_window(db, window=window)
        for chunk_ids, lane in ((sent.returned, FIRST_QUEUE), (sent.new, QUEUE)):
            if chunk_ids:
                publish_chunks(chunk_ids, queue=lane)
    except BrokerAway as error:
        with engine.begin() as db:
            queue.unsend(db, chunk_ids=sent.all)
        log.warning("the broker is away, %d chunks wait: %s", len(sent.all), redact(str(error)))
        return 0
    return len(sent.all)


def _window(db: Connection) -> int:
    workers = sum(process.kind is ProcessKind.WORKER for process in processes.live(db))
    return queue.window_of(workers=workers, jobs=queue.count_active(db), most=settings().window_chunks)


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
        draining=lambda: stop_file(run_dir()).exists(),
        on_hang=lambda: os._exit(_EX_TEMPFAIL),
    )


def _load_model(name: str) -> Model:
    model = load_model(find_model(name), pinned_device())
    with suppress(OSError):  # the folder's owner may have ended and removed it
        model_file(run_dir()).write_text(name)
    return model


def _load_detector(asked: detectors.AskedDetector) -> detectors.Detector | detectors.PhraseDetector:
    return detectors.load(asked, pinned_device())


def _leave() -> None:
    """End this child without a verdict. After _MOST_FAULTS of these in a row, stop the worker: it can label nothing."""
    faults = faults_file(run_dir())
    seen = len(faults.read_text()) + 1 if faults.exists() else 1
    if faults.parent.is_dir():
        faults.write_text("x" * seen)
    if seen >= _MOST_FAULTS:
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(_EX_TEMPFAIL)


def _one_line(error: DBAPIError) -> str:
    return redact(" ".join(str(error.orig).split()))
