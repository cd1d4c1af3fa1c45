"""What every command shares: the database, messages, JSON, signals."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
import threading
from typing import Annotated, NoReturn

import typer

from db import deletion, jobs
from db.session import DBAPIError, Engine, check_migrated, is_passing, open_engine
from db.settings import settings
from orchestrator.cli.root import app, label_studio_app, models_app, opened
from orchestrator.local.folder import folder_database, is_folder, state_dir_of
from orchestrator.terminal.console import stderr_console
from workers.errors import redact
from workers.paths import own_path

__all__ = ["app", "label_studio_app", "models_app"]

_LONGEST_PAUSE_SECONDS = 30.0
USAGE = 2  # the exit code of wrong usage or a missing environment; typer uses it too

err = stderr_console()
log = logging.getLogger(__name__)

_folders: dict[int, str] = {}  # the jobs that this command was given as folders


def job_number(job: str) -> int:
    """A JOB argument: a job's number, or the folder of a `maskfleet run`, which means its newest job.

    A folder's own database then runs until the command ends, and takes the place of MASKFLEET_DATABASE_URL. Its kept
    embeddings are used unless MASKFLEET_EMBEDDINGS names others.
    """
    if not job:
        fail("JOB is empty: expected a job's number, or the folder that `maskfleet run` wrote")
    if not is_folder(job):
        return int(job)
    folder = own_path(job)
    url = opened.enter_context(folder_database(folder))
    os.environ["MASKFLEET_DATABASE_URL"] = url
    os.environ.setdefault("MASKFLEET_EMBEDDINGS", str(state_dir_of(folder) / "embeddings"))
    settings.cache_clear()
    with deployment_engine().begin() as db:
        found = [newest.id for newest in jobs.list_jobs(db, limit=1)] or deletion.begun_deletions(db)
    if not found:
        fail(f"{job}: its `maskfleet run` has not made a job yet, or the job was deleted")
    _folders[found[-1]] = job
    return found[-1]


def job_to_delete(job: str) -> int:
    """The same for `delete`: of a folder, the job whose deletion was interrupted comes before the newest one."""
    newest = job_number(job)
    if not is_folder(job):
        return newest
    with deployment_engine().begin() as db:
        return next(iter(deletion.begun_deletions(db)), newest)


def named_by_folder(job: int) -> bool:
    """Whether this command was given the job as the folder of a `maskfleet run`. Then only that command works on it."""
    return job in _folders


def called(job: int) -> str:
    """How the next command is to name a job: as this one did, in a shell's quotes."""
    return shlex.quote(_folders[job]) if job in _folders else str(job)


JOB_HELP = "The job's number, as `maskfleet jobs` shows it, or the folder that `maskfleet run` wrote."
JobArgument = Annotated[int, typer.Argument(help=JOB_HELP, metavar="JOB", parser=job_number, show_default=False)]
OptionalJobArgument = Annotated[int | None, typer.Argument(help=JOB_HELP, metavar="JOB", parser=job_number)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def stop_on_signals(hurry: threading.Event | None = None) -> threading.Event:
    """Set at SIGTERM and Ctrl-C. hurry: set at a Ctrl-C after that, and at SIGUSR2, by which `run` ends its worker. A
    second SIGTERM changes nothing: some systems send several."""
    stop = threading.Event()

    def hear(number: int, _: object) -> None:
        if hurry is not None and (number == signal.SIGUSR2 or (stop.is_set() and number == signal.SIGINT)):
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR2] if hurry is not None else [])):
        signal.signal(number, hear)
    return stop


def deployment_engine(*, statement_timeout_seconds: float = 60) -> Engine:
    engine = open_engine(database_url(), statement_timeout_seconds=statement_timeout_seconds)
    check_migrated(engine)
    return engine


def engine_once_postgres_answers(stop: threading.Event) -> Engine:
    """The deployment's database, for commands that run for long. While Postgres is away it waits, with growing pauses.

    Raises DatabaseNotReady for a database of another version. When `stop` is set during the wait, the command ends.
    """
    engine, pause = open_engine(database_url()), 1.0
    while not stop.is_set():
        try:
            check_migrated(engine)
        except DBAPIError as error:
            if not is_passing(error):
                raise
            log.warning("Postgres does not answer, next try in %g s: %s", pause, redact(str(error.orig).strip()))
            stop.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
        else:
            return engine
    raise typer.Exit(0)


def database_url() -> str:
    url = settings().database_url
    if url is None:
        fail(
            "MASKFLEET_DATABASE_URL is not set: name the deployment's PostgreSQL, or use `maskfleet run`, whose jobs "
            "are named by their folder, not by a number"
        )
    return url.get_secret_value()


def require_broker() -> None:
    if settings().broker_url is None:
        fail("MASKFLEET_BROKER_URL is not set: name the deployment's Redis, such as redis://:password@host:6379/0")


def print_json(document: object) -> None:
    # An encoding other than UTF-8 cannot hold every key, and an escape of Python's is not JSON.
    is_utf_8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    print(json.dumps(document, ensure_ascii=not is_utf_8, indent=2))


def fail(message: str) -> NoReturn:
    err.print(f"maskfleet: {message}", style="red", markup=False)
    raise typer.Exit(USAGE)
