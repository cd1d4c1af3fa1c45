"""The command line's root, and what every command shares: the database, messages, JSON, signals."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from db import jobs
from db.session import DBAPIError, Engine, check_migrated, is_passing, open_engine
from db.settings import settings
from orchestrator.local.folder import folder_database, is_folder, state_dir_of
from orchestrator.terminal.console import stderr_console
from workers.errors import redact

_LONGEST_PAUSE_SECONDS = 30.0
USAGE = 2  # the exit code of wrong usage or a missing environment; typer uses it too

# The order in which people need them: make a job, look at it, export its masks, review, operate.
_ORDER = (
    *("demo", "run", "submit", "watch", "jobs", "show", "cancel", "resume", "retry", "export"),
    *("label-studio", "publish", "assist", "review", "tune", "models", "worker", "dispatch", "migrate", "doctor"),
)


class _InOrder(TyperGroup):
    """Lists the commands in _ORDER, not in the order in which their files are imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="maskfleet",
    cls=_InOrder,
    help="Masks on every image of a folder or bucket before people start work.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(version("maskfleet"))
        raise typer.Exit


@app.callback()
def _root(
    wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Masks on every image of a folder or bucket before people start work."""


models_app = typer.Typer(help="The models, and their weights on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
label_studio_app = typer.Typer(help="Projects of Label Studio, where people correct masks.", no_args_is_help=True)
app.add_typer(label_studio_app, name="label-studio")

err = stderr_console()
log = logging.getLogger(__name__)
opened = ExitStack()  # what the arguments of a command opened; `main` closes it


def job_number(job: str) -> int:
    """A JOB argument: a job's number, or the folder of a `maskfleet run`, which means its newest job.

    A folder's own database then runs until the command ends, and takes the place of MASKFLEET_DATABASE_URL. Its kept
    embeddings are used unless MASKFLEET_EMBEDDINGS names others.
    """
    if not is_folder(job):
        return int(job)
    url = opened.enter_context(folder_database(Path(job)))
    os.environ["MASKFLEET_DATABASE_URL"] = url
    os.environ.setdefault("MASKFLEET_EMBEDDINGS", str(state_dir_of(Path(job)) / "embeddings"))
    settings.cache_clear()
    with deployment_engine().begin() as db:
        newest = jobs.list_jobs(db, limit=1)
    if not newest:
        fail(f"{job}: its `maskfleet run` has not made a job yet")
    return newest[0].id


JOB_HELP = "The job's number, as `maskfleet jobs` shows it, or the folder that `maskfleet run` wrote."
JobArgument = Annotated[int, typer.Argument(help=JOB_HELP, metavar="JOB", parser=job_number, show_default=False)]
OptionalJobArgument = Annotated[int | None, typer.Argument(help=JOB_HELP, metavar="JOB", parser=job_number)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
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
        fail("MASKFLEET_DATABASE_URL is not set: name the deployment's PostgreSQL, or use `maskfleet run`")
    return url.get_secret_value()


def require_broker() -> None:
    if settings().broker_url is None:
        fail("MASKFLEET_BROKER_URL is not set: name the deployment's Redis, such as redis://:password@host:6379/0")


def print_json(document: object) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def fail(message: str) -> NoReturn:
    err.print(f"maskfleet: {message}", style="red", markup=False)
    raise typer.Exit(USAGE)
