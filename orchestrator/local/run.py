"""`maskfleet run`: the whole deployment inside one command, with nothing to install or start.

It starts a real PostgreSQL, a broker of plain files, a worker process and a dispatcher thread. They use the same
tables, tasks and queries as on many machines. The database stays beside the outputs. So the same command continues
after Ctrl-C, and uses the stored results when it runs again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from db import jobs, queue, results
from db.jobs import Job
from db.session import Engine, open_engine
from db.settings import settings
from db.states import JobState
from orchestrator.jobs.request import Request, submit_job
from orchestrator.local.folder import served_database, state_dir_of
from orchestrator.local.interrupts import Interrupts, heard_interrupts
from orchestrator.terminal.console import Console
from orchestrator.terminal.jobs import follow_job
from orchestrator.terminal.progress import bars_on
from workers.errors import redact
from workers.machine import auto_devices
from workers.models.registry import find_model
from workers.storage.source import open_source

_PAGE = 20  # tasks of Label Studio take long to write, so their masks are read in short pages
_NEWEST_JOBS = 100  # each run cancels what was stopped before it, so it is among the newest
_SHARED_CHUNK_SIZE = 2  # on a CPU an image takes much longer than a claim
_STOP_SECONDS = 75  # a little more than the worker's own drain time


class RunError(RuntimeError):
    """The run cannot begin or continue. The message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The outputs of a finished run, and the summary that `--json` prints."""

    out: Path
    summary: dict[str, Any]

    @property
    def gallery(self) -> Path:
        return self.out / "index.html"


def run(
    request: Request,
    *,
    out: Path,
    devices: str,
    console: Console,
    notice: str | None = None,
    local_files: str | None = None,
) -> Outputs:
    """Label a source into `out`. Returns the outputs.

    notice: a line about the model for the gallery. local_files: Label Studio's document root, for label-studio.json.

    Raises KeyboardInterrupt on Ctrl-C or SIGTERM. Then everything is stopped, and the next run continues the job. The
    images in the worker's hands are finished first, or given up at a second Ctrl-C.
    Raises RunError, SourceError or PostgresFailed when it cannot work.
    """
    started = time.monotonic()
    open_source(request.source, s3_endpoint=settings().s3_endpoint).check()
    state_dir = state_dir_of(out)
    with ExitStack() as stack:
        interrupts = stack.enter_context(heard_interrupts())
        stack.enter_context(_only_run_in(out, state_dir))
        database_url = stack.enter_context(served_database(state_dir))
        broker_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="maskfleet-broker-"))
        if devices == "auto":
            devices = auto_devices(find_model(request.model).size_bytes)
        _become_deployment(database_url, Path(broker_dir), state_dir / "embeddings", shares=devices.count("cpu") > 1)
        engine = open_engine(database_url)
        stack.callback(engine.dispose)
        job = _begin(engine, request)
        log_file = state_dir / "worker.log"
        # When the job is over, the worker holds nothing, except embeddings that answered assets want.
        at_once = request.keep_embeddings is None
        with _worker(devices, log_file, interrupts, console, at_once) as worker, _dispatcher(engine) as dispatcher:

            def check() -> None:
                worker.check()
                dispatcher.check()

            job = follow_job(engine, job.id, console=console, refresh_seconds=0.3, check=check)
        if job.state in (JobState.FAILED, JobState.PAUSED):
            raise RunError(f"{request.source}: {job.error}")
        seconds = time.monotonic() - started
        return _write_outputs(
            engine, job, out, seconds=seconds, notice=notice, local_files=local_files, console=console
        )


@contextmanager
def _only_run_in(out: Path, state_dir: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "lock").open("w")
    except OSError as error:
        raise RunError(f"{out}: cannot write there ({error.strerror}); choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another run is writing to {out}: wait for it, or choose another --out") from None
        yield


def _become_deployment(database_url: str, broker_dir: Path, embeddings: Path, *, shares: bool) -> None:
    """Make this process and its worker use the embedded servers, through the same variables that an operator sets.

    shares: several CPU workers share the folder. Then chunks are small, so that all have work until the end.
    """
    os.environ["MASKFLEET_DATABASE_URL"] = database_url
    os.environ["MASKFLEET_BROKER_URL"] = f"filesystem://{broker_dir}"
    if settings().embeddings is None:
        os.environ["MASKFLEET_EMBEDDINGS"] = str(embeddings.absolute())
    if shares and "chunk_size" not in settings().model_fields_set:
        os.environ["MASKFLEET_CHUNK_SIZE"] = str(_SHARED_CHUNK_SIZE)
    settings.cache_clear()


def _begin(engine: Engine, request: Request) -> Job:
    """Continue the unfinished job with the same request, or make a new one. Any other is left where it was stopped.

    Else this run's worker would also do what a person has stopped. Its own command goes on with it.
    """
    version, asked = request.model_version(), request.asked()
    with engine.begin() as db:
        job = jobs.find_unfinished_job(
            db, source=request.source, model_version=version, asked=asked, fresh=request.fresh
        )
        # The lock shows that no other worker is alive. So there is no need to wait for a dead worker's lease.
        queue.expire_all_leases(db)
        for other in jobs.list_jobs(db, limit=_NEWEST_JOBS):
            is_own = job is not None and other.id == job.id
            if other.state in (JobState.LISTING, JobState.RUNNING) and not is_own:
                jobs.cancel_job(db, job_id=other.id)
        if job is None:
            return submit_job(db, request)
        jobs.resume_job(db, job_id=job.id)
        return job


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    log_file: Path

    def check(self) -> None:
        if self.process.poll() is not None:
            tail = self.log_file.read_text(errors="replace")[-1500:]
            code = self.process.returncode
            raise RunError(f"the worker ended with exit code {code}; the end of {self.log_file}:\n{tail}")


@contextmanager
def _worker(devices: str, log_file: Path, interrupts: Interrupts, console: Console, at_once: bool) -> Iterator[_Worker]:
    """A worker. When the block is left by an exception, it finishes the images in its hands, unless a second interrupt
    comes. Else it ends at once, if it may."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "orchestrator.cli",
        "worker",
        "--devices",
        devices,
        "--parent",
        str(os.getpid()),
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    interrupts.hurry = lambda: process.send_signal(signal.SIGUSR2)
    sign = signal.SIGTERM
    try:
        yield _Worker(process, log_file)
        sign = signal.SIGUSR2 if at_once else signal.SIGTERM
    finally:
        if interrupts.heard:
            console.print("stopping: the images at work are finished first; Ctrl-C again gives them up")
        process.send_signal(sign)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Dispatcher(threading.Thread):
    """The dispatcher of this run. An error that ends it also ends the run."""

    def __init__(self, engine: Engine, stop: threading.Event) -> None:
        super().__init__(name="dispatch", daemon=True)
        self._engine, self._stopping = engine, stop  # Thread has its own _stop, which join calls
        self._error: Exception | None = None

    def run(self) -> None:
        # Imported here, because these modules read the broker's address when they load.
        from orchestrator.jobs.dispatch import dispatch

        logging.getLogger("orchestrator.jobs.dispatch").setLevel(logging.CRITICAL)  # the job's row has the error
        try:
            dispatch(self._engine, self._stopping, idle_seconds=0.2)
        except Exception as error:  # noqa: BLE001  `check` raises it, in the thread that can end the run
            self._error = error

    def check(self) -> None:
        if self._error is not None:
            raise RunError(f"the dispatcher ended: {redact(str(self._error))}") from self._error


@contextmanager
def _dispatcher(engine: Engine) -> Iterator[_Dispatcher]:
    stop = threading.Event()
    thread = _Dispatcher(engine, stop)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def _write_outputs(
    engine: Engine,
    job: Job,
    out: Path,
    *,
    seconds: float,
    notice: str | None,
    local_files: str | None,
    console: Console,
) -> Outputs:
    from orchestrator.export.coco import export_coco
    from orchestrator.export.label_studio import export_label_studio
    from orchestrator.export.summary import write_summary
    from orchestrator.pages.choice import MAX_CARDS
    from orchestrator.pages.gallery import write_gallery

    patient = open_engine(engine.url.render_as_string(hide_password=False), statement_timeout_seconds=0)
    with patient.begin() as db, bars_on(console, is_transient=True) as bars:
        counts = jobs.count_job(db, job_id=job.id)
        total = counts.labeled - counts.without_prompts
        coco, tasks, page = (
            bars.bar(f"writing {name}", total) for name in ("coco.json", "label-studio.json", "index.html")
        )
        export_coco(db, job, out / "coco.json", coco.over(results.bare_assets(db, job_id=job.id)))
        assets = tasks.over(results.labeled_assets(db, job_id=job.id, page=_PAGE))
        notes = export_label_studio(db, job, out / "label-studio.json", assets, local_files=local_files)
        summary = write_summary(db, job, out / "summary.json", seconds, notes)
        page.total = min(total, MAX_CARDS)
        write_gallery(db, job, out / "index.html", seconds=seconds, notice=notice, progress=page.advance)
    patient.dispose()
    return Outputs(out=out, summary=summary)
