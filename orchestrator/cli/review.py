"""`review`: reads annotations back from Label Studio and shows what people changed."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from db import jobs, publishing
from db.session import DBAPIError, Engine, is_passing
from db.settings import settings
from db.states import ProcessKind
from orchestrator.cli.app import JobArgument, JsonOption, app, database_url, deployment_engine, err, fail, print_json
from orchestrator.cli.label_studio import connect_label_studio, project_number
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.errors import Unavailable
from orchestrator.local.interrupts import INTERRUPTED
from orchestrator.terminal.console import stdout_console
from orchestrator.terminal.jobs import read_job
from orchestrator.terminal.progress import bars_on
from orchestrator.terminal.review import print_review
from workers.errors import redact
from workers.paths import own_path
from workers.running.heart import Heart, own_beat


@app.command(epilog="Example: `maskfleet review 12 --project 3 --html review.html`")
def review(
    job: JobArgument,
    project: Annotated[int | None, typer.Option("--project", help="Label Studio's project, by number.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots and the worst overlays.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep reading until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="With --follow: seconds between reads.")] = 30,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="HOST:PORT", help="With --follow: read when Label Studio's webhook calls."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read how people changed a job's masks in Label Studio. Count what they kept, edited, deleted and added.

    `maskfleet export --reviewed` writes what was read last. With --follow and --json there is one document a line.
    """
    number = project_number(project)
    engine = deployment_engine(statement_timeout_seconds=0)
    found, _ = read_job(engine, job)
    called = threading.Event()
    with ExitStack() as stack:
        client = stack.enter_context(connect_label_studio())
        if follow:
            stack.enter_context(Heart(database_url(), lambda: [own_beat(ProcessKind.REVIEWER)]))
        if listen is not None:
            if not follow:
                fail("--listen only wakes --follow: give both")
            _listen(stack, listen, called)
        try:
            while True:
                called.clear()
                try:
                    _review_once(engine, client, found, number, html, as_json=as_json, in_a_line=follow)
                except (Unavailable, DBAPIError) as error:
                    if not follow or (isinstance(error, DBAPIError) and not is_passing(error)):
                        raise
                    said = redact(str(error.orig if isinstance(error, DBAPIError) else error))
                    err.print(f"{said}; trying again", style="yellow", markup=False)
                if not follow:
                    return
                called.wait(every)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _review_once(
    engine: Engine,
    client: LabelStudio,
    job: jobs.Job,
    project: int,
    html: Path | None,
    *,
    as_json: bool,
    in_a_line: bool,
) -> None:
    from orchestrator.label_studio.review import pull
    from orchestrator.label_studio.review_numbers import read_review
    from orchestrator.pages.review import write_review

    with bars_on(err) as bars:
        bar = bars.bar("reading annotations", unit="task")
        bar.show(0)
        pull(engine, client, project, progress=bar.show)
    read = read_review(engine, job, publishing.LsProject(client.url, project))
    if as_json and in_a_line:
        print(json.dumps(read.as_json(), ensure_ascii=False), flush=True)
    elif as_json:
        print_json(read.as_json())
    else:
        print_review(stdout_console(), read)
    if html is not None:
        write_review(engine, read, own_path(html))
        err.print(f"wrote {html}", markup=False, highlight=False)


def _listen(stack: ExitStack, listen: str, called: threading.Event) -> None:
    """Let webhooks set the event while the stack is open."""
    from orchestrator.label_studio.wake import wake_on_webhook

    wake = wake_on_webhook(*_listen_address(listen), secret=_webhook_secret(), event=called)
    try:
        host, port = stack.enter_context(wake)
    except OSError as error:
        fail(f"--listen {listen}: {error}")
    err.print(f"webhooks may call http://{host}:{port}/", style="dim", highlight=False)


def _listen_address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        fail(f"--listen {listen!r}: expected a host and a port, such as 127.0.0.1:8090")
    return host or "127.0.0.1", int(port)


def _webhook_secret() -> str:
    secret = settings().webhook_secret
    if secret is None:
        fail("set MASKFLEET_WEBHOOK_SECRET, and give Label Studio's webhook the header X-Maskfleet-Secret with it")
    return secret.get_secret_value()
