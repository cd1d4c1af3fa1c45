"""`board`: a page of all jobs, for people who do not live in a terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from db.session import check_migrated, open_engine
from db.settings import settings
from orchestrator.board.board import Board
from orchestrator.board.password import Password
from orchestrator.board.photos import Photos
from orchestrator.board.service import serve
from orchestrator.cli.app import (
    OptionalJobArgument,
    app,
    database_url,
    engine_once_postgres_answers,
    err,
    stop_on_signals,
)
from workers.logs import log_to_stderr

_STATEMENT_SECONDS = 30.0


@app.command(epilog="Example: `maskfleet board --port 8070`")
def board(
    job: OptionalJobArgument = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8070,
) -> None:
    """Serve a page of all jobs, live and read-only, behind a password, until SIGTERM or Ctrl-C.

    JOB is only needed for the folder of a `maskfleet run`: its database then serves.
    """
    log_to_stderr()
    given = settings().board_password
    password = Password(None if given is None else given.get_secret_value())
    stop = stop_on_signals()
    engine_once_postgres_answers(stop).dispose()
    engine = open_engine(database_url(), statement_timeout_seconds=_STATEMENT_SECONDS, read_only=True)
    check_migrated(engine)
    path = "/" if job is None else f"/jobs/{job}"

    def started(port: int) -> None:
        err.print(f"the board is at http://{host}:{port}{path}", highlight=False)
        if password.was_made:
            err.print(f"its password is {password.text}", highlight=False, markup=False)

    serve(Board(engine), Photos(engine), password, stop, host=host, port=port, started=started)
    engine.dispose()
