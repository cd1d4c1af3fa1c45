"""`worker`, `dispatch`, `migrate`, `doctor`: the commands that run a deployment."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from db.session import migrate as migrate_database
from db.settings import settings
from orchestrator.cli.app import (
    USAGE,
    JsonOption,
    app,
    database_url,
    engine_once_postgres_answers,
    err,
    fail,
    print_json,
    require_broker,
    stop_on_signals,
)
from orchestrator.cli.options import DevicesOption
from orchestrator.local.doctor import examine
from workers.log_lines import log_to_stderr


@app.command(epilog="Example: `maskfleet worker --devices 0,1`")
def worker(
    devices: DevicesOption = "all",
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
) -> None:
    """Run one worker process on each CUDA device (or the CPU) and restart dead ones. SIGTERM drains them."""
    from workers.running.devices import DeviceError, find_devices, serve
    from workers.running.tasks import top_up_or_say

    log_to_stderr()
    require_broker()
    try:
        found = find_devices(devices)
    except DeviceError as error:
        fail(str(error))
    stop = stop_on_signals()
    engine = engine_once_postgres_answers(stop)
    top_up = partial(top_up_or_say, engine)
    raise typer.Exit(serve(found, stop, drain_seconds=settings().drain_seconds, top_up=top_up, parent_pid=parent))


@app.command(epilog="Example: `maskfleet dispatch`")
def dispatch() -> None:
    """List new jobs, keep the queue full, and take back the work of dead workers."""
    from orchestrator.jobs.dispatch import dispatch as run_dispatcher

    log_to_stderr()
    require_broker()
    stop = stop_on_signals()
    run_dispatcher(engine_once_postgres_answers(stop), stop)


@app.command(epilog="Example: `maskfleet migrate`")
def migrate() -> None:
    """Bring the database's tables to this version; safe to run twice."""
    migrate_database(database_url())
    err.print("the database is up to date")


@app.command(epilog="Example: `maskfleet doctor`")
def doctor(as_json: JsonOption = False) -> None:
    """Show on one screen what is reachable, what is missing, and how to fix it."""
    findings = examine()
    if as_json:
        print_json([{"what": f.what, "ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "[dim]not set[/dim]"}[finding.ok]
            table.add_row(mark, f"[bold]{finding.what}[/bold]", finding.found)
            if finding.remedy:
                table.add_row("", "", f"[dim]{finding.remedy}[/dim]")
        Console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(USAGE)
