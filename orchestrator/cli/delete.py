"""`delete`: remove a job from the database."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from db import deletion, jobs
from db.session import Engine
from db.settings import settings
from orchestrator.cli.app import JOB_HELP, app, deployment_engine, err, fail, job_to_delete
from orchestrator.jobs.delete import JobRunsError, delete_job
from orchestrator.terminal.console import is_terminal, printable
from orchestrator.terminal.jobs import one_line, read_job
from workers.embeddings.store import open_store


@app.command(epilog="Example: `maskfleet delete 12`")
def delete(
    job: Annotated[int, typer.Argument(help=JOB_HELP, metavar="JOB", parser=job_to_delete, show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a job with its masks, prompts and kept embeddings. Cancel a running job first.

    Tasks that were published stay in Label Studio; what people annotated there stays too. Files that were exported
    stay. A deletion that is interrupted goes on with the same command.
    """
    engine = deployment_engine()
    if not _is_begun(engine, job):
        found, counts = read_job(engine, job)
        if not yes:
            if not is_terminal(sys.stdin):
                fail(f"this deletes job {job} for good: say --yes")
            err.print(printable(one_line(found, counts)), markup=False, highlight=False)
            if not typer.confirm(f"Delete job {job} and its masks for good?", err=True):
                raise typer.Exit(1)
    try:
        done = delete_job(engine, job, store=open_store(settings()))
    except JobRunsError as error:
        fail(str(error))
    err.print(f"job {job} is deleted: {done.assets:,} assets with their masks")
    if done.left_embeddings:
        err.print(f"{done.left_embeddings:,} embeddings are left to the sweep of maskfleet assist", style="yellow")


def _is_begun(engine: Engine, job_id: int) -> bool:
    with engine.begin() as db:
        return jobs.get_job(db, job_id=job_id) is None and job_id in deletion.begun_deletions(db)
