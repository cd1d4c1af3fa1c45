"""`assist`: the service that answers reviewers' clicks in Label Studio."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from db.settings import settings
from db.states import ProcessKind
from orchestrator.cli.app import (
    OptionalJobArgument,
    app,
    database_url,
    engine_once_postgres_answers,
    err,
    fail,
    stop_on_signals,
)
from orchestrator.cli.label_studio import connect_label_studio, project_number
from workers.logs import log_to_stderr
from workers.machine import usable_cores
from workers.running.heart import Heart, own_beat


class AnswerForm(StrEnum):
    AUTO = "auto"
    POLYGON = "polygon"
    BRUSH = "brush"
    RECTANGLE = "rectangle"
    ALL = "all"


@app.command(epilog="Example: `maskfleet assist --project 3 --ahead 200`")
def assist(
    job: OptionalJobArgument = None,
    project: Annotated[
        list[int] | None, typer.Option("--project", help="A project of Label Studio to serve, by number; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = 9090,
    as_: Annotated[
        AnswerForm, typer.Option("--as", help="How masks are drawn; auto as publish does; all: one of each.")
    ] = AnswerForm.AUTO,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=0, help="Decoder processes; default: one a core.", show_default=False),
    ] = None,
    ahead: Annotated[
        int, typer.Option("--ahead", min=0, help="Keep the embeddings of so many next tasks of each project ready.")
    ] = 0,
    encode: Annotated[
        bool,
        typer.Option("--encode", help="Make wanted embeddings here, on the CPU: for small models, without workers."),
    ] = False,
) -> None:
    """Answer reviewers' clicks and boxes in Label Studio with masks, until SIGTERM or Ctrl-C.

    JOB is only needed for the folder of a `maskfleet run`: its database then serves.
    `maskfleet label-studio setup --assist URL` makes a project call this service.
    """
    from orchestrator.assist.credential import Credential
    from orchestrator.assist.running import run_assist

    log_to_stderr()
    password = settings().assist_password
    if password is None:
        fail("set MASKFLEET_ASSIST_PASSWORD, at least 16 characters: `openssl rand -hex 16` makes one")
    credential = Credential(settings().assist_user, password.get_secret_value())
    projects = project or [project_number(None)]
    stop = stop_on_signals()
    engine = engine_once_postgres_answers(stop)
    heart = Heart(database_url(), lambda: [own_beat(ProcessKind.ASSIST)])
    with connect_label_studio() as client, heart:
        run_assist(
            engine,
            client,
            projects,
            credential,
            stop,
            host=host,
            port=port,
            as_=as_.value,
            processes=usable_cores() if processes is None else processes,
            ahead=ahead,
            encode=encode,
            started=lambda port: err.print(f"assist answers at http://{host}:{port} for projects {projects}"),
        )
