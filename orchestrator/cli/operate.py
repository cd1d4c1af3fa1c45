"""`worker`, `dispatch`: the commands that label. Both last, and import no more than they need."""

from __future__ import annotations

import threading
from functools import partial
from typing import Annotated

import typer

from db.settings import settings
from db.states import ProcessKind
from orchestrator.cli.app import (
    app,
    database_url,
    engine_once_postgres_answers,
    fail,
    require_broker,
    stop_on_signals,
)
from orchestrator.cli.options import DevicesOption
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
