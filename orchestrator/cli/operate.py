"""`worker`, `dispatch`, `migrate`, `doctor`: the commands that run a deployment."""

from __future__ import annotations

import threading
from functools import partial
from typing import Annotated

import typer
from rich.table import Table

from db.migrating import migrate as migrate_database
from db.settings import settings
from db.states import ProcessKind
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
from orchestrator.terminal.console import stdout_console
from workers.logs import log_to_stderr
from workers.running.heart import Heart, own_beat

MetricsPortOption = Annotated[
    int | None, typer.Option("--metrics-port", min=1, max=65535, help="Answer Prometheus on this port.")
]
MetricsAddressOption = Annotated[
    str, typer.Option("--metrics-address", help="Where that port listens; the default is only this machine.")
]


@app.command(epilog="Example: `maskfleet worker --devices 0,1`")
def worker(
    devices: DevicesOption = "all",
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = "127.0.0.1",
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
) -> None:
    """Run one worker process on each CUDA device (or the CPU) and restart dead ones. SIGTERM drains them."""
    from workers.machine import DeviceError, find_devices
    from workers.running.device_lock import DeviceHeld
    from workers.running.devices import Tended, serve
    from workers.running.tasks import top_up_or_say

    log_to_stderr()
    require_broker()
    try:
        found = find_devices(devices)
    except DeviceError as error:
        fail(str(error))
    hurry = threading.Event()
    stop = stop_on_signals(hurry)
    engine = engine_once_postgres_answers(stop)
    tended = Tended(
        database_url=database_url(),
        drain_seconds=settings().drain_seconds,
        top_up=partial(top_up_or_say, engine),
        metrics=None if metrics_port is None else (metrics_address, metrics_port),
        parent_pid=parent,
        hurry=hurry,
    )
    try:
        code = serve(found, stop, tended)
    except DeviceHeld as error:
        fail(str(error))
    except OSError as error:
        if metrics_port is None:
            raise
        fail(f"--metrics-port {metrics_port}: {error}")
    raise typer.Exit(code)


@app.command(epilog="Example: `maskfleet dispatch --metrics-port 9108`")
def dispatch(
    metrics_port: MetricsPortOption = None,
    metrics_address: MetricsAddressOption = "127.0.0.1",
) -> None:
    """List new jobs, keep the queue full, and take back the work of dead workers."""
    from orchestrator.jobs.dispatch import dispatch as run_dispatcher
    from orchestrator.jobs.metrics import serve_metrics

    log_to_stderr()
    require_broker()
    stop = stop_on_signals()
    engine = engine_once_postgres_answers(stop)
    if metrics_port is not None:
        try:
            serve_metrics(metrics_address, metrics_port, database_url=database_url())
        except OSError as error:
            fail(f"--metrics-port {metrics_port}: {error}")
    with Heart(database_url(), lambda: [own_beat(ProcessKind.DISPATCHER)]):
        run_dispatcher(engine, stop)


@app.command(epilog="Example: `maskfleet migrate`")
def migrate() -> None:
    """Bring the database's tables to this version; safe to run twice."""
    found, now = migrate_database(database_url())
    if found == now:
        err.print(f"the tables were at migration {now} already")
    else:
        err.print(f"the tables are at migration {now} now, before: {found or 'none'}")


@app.command(epilog="Example: `maskfleet doctor s3://bucket/street`")
def doctor(
    source: Annotated[
        str | None, typer.Argument(help="Also try to list this: a folder, or s3://bucket/prefix.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show on one screen what is reachable, who is at work, what is missing, and how to fix it."""
    findings = examine(source)
    if as_json:
        print_json([{"what": f.what, "ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "[dim]not set[/dim]"}[finding.ok]
            table.add_row(mark, f"[bold]{finding.what}[/bold]", finding.found)
            if finding.remedy:
                table.add_row("", "", f"[dim]{finding.remedy}[/dim]")
        stdout_console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(USAGE)
