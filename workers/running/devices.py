"""One Celery worker process for each device of this machine, watched and restarted.

This process holds no CUDA context and loads no torch. `nvidia-smi` lists the devices. Each worker sees only its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from db.processes import Beat
from db.states import ProcessKind
from workers.machine import PINNED_VARIABLE, Device
from workers.models.files import is_present
from workers.models.registry import known_models
from workers.running.app import QUEUES
from workers.running.device_lock import hold_device
from workers.running.heart import Heart, own_beat
from workers.running.metrics import FOLDER_VARIABLE, serve_worker_metrics
from workers.running.pulse import Watch
from workers.running.run_dir import RUN_DIR_VARIABLE, child_file, error_file, model_file, stop_file
from workers.running.tasks import SUPERVISOR_VARIABLE

_LONGEST_PAUSE_SECONDS = 60.0
_HEALTHY_SECONDS = 60.0  # a worker that lived this long starts again without a pause
_MOST_QUICK_DEATHS = 10  # then the device is given up: a restart does not fix what is wrong
_MOST_QUICK_DEATHS_WHILE_WAITED_FOR = 3
_DRAIN_POLL_SECONDS = 0.05
_POLL_SECONDS = 0.5
# billiard's tracker removes what a killed worker leaves. What it says of that would be no JSON line in a log of those.
_NO_WORD_OF_SEMAPHORES = "ignore:semaphore_tracker:UserWarning"

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _WorkerProcess:
    """A Celery worker, its folder (stop file, fault count) and its restarts so far."""

    device: Device
    run_dir: Path
    watch: Watch
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    quick_deaths: int = 0
    given_up: bool = field(default=False)
    last_error: str | None = None

    @property
    def failed_starts(self) -> int:
        """How often in a row it ended soon after its start. 0 once it has lived for a while."""
        is_well = self.process is not None and time.monotonic() - self.started_at > _HEALTHY_SECONDS
        return 0 if is_well else self.quick_deaths


@dataclass(frozen=True, slots=True, kw_only=True)
class Tended:
    """How `serve` tends its workers. drain_seconds: for the end of each one's batch. top_up: called every
    top_up_seconds, so that the queue fills even when no dispatcher runs. metrics: address and port for Prometheus, or
    None. parent_pid: the workers also stop when that process has ended, and a device is given up sooner, because a
    person waits. hurry: once it is set, nothing is drained any more."""

    database_url: str
    drain_seconds: float
    top_up: Callable[[], object]
    top_up_seconds: float = 10
    metrics: tuple[str, int] | None = None
    parent_pid: int | None = None
    hurry: threading.Event = field(default_factory=threading.Event)


def serve(devices: Sequence[Device], stop: threading.Event, tended: Tended) -> int:
    """Run a worker on each device until `stop` is set. Returns the exit code: 1 when every device was given up.

    Then each worker finishes its current batch and releases its chunk. A worker that needs longer than drain_seconds is
    killed, and its lease expires. Raises DeviceHeld when a worker of another command is on one of the CUDA devices, and
    OSError when the metrics' port is taken.
    """
    with ExitStack() as stack:
        for device in devices:
            if device.cuda_id:
                stack.enter_context(hold_device(device.cuda_id))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskfleet-worker-")))
        workers = [_worker_of(device, folder / device.name) for device in devices]
        if tended.metrics:
            _offer_metrics(workers, folder / "metrics", *tended.metrics)
        stack.enter_context(Heart(tended.database_url, lambda: [_beat(worker) for worker in workers]))
        _tend(workers, stop, tended)
        _drain(workers, tended)
        return int(all(worker.given_up for worker in workers))


def _worker_of(device: Device, run_dir: Path) -> _WorkerProcess:
    run_dir.mkdir()
    return _WorkerProcess(device=device, run_dir=run_dir, watch=Watch(run_dir))


def _tend(workers: Sequence[_WorkerProcess], stop: threading.Event, tended: Tended) -> None:
    """Keep the workers alive until `stop` is set, the parent has ended, or all of them are given up."""
    most_quick_deaths = _MOST_QUICK_DEATHS if tended.parent_pid is None else _MOST_QUICK_DEATHS_WHILE_WAITED_FOR
    next_top_up = time.monotonic() + tended.top_up_seconds
    topping_up: threading.Thread | None = None
    while not stop.wait(_POLL_SECONDS) and not all(worker.given_up for worker in workers):
        for worker in workers:
            _keep_alive(worker, most_quick_deaths)
        if tended.parent_pid is not None and os.getppid() != tended.parent_pid:
            log.info("the command that started these workers has ended")
            return
        if time.monotonic() >= next_top_up:
            topping_up = _in_background(tended.top_up, topping_up)
            next_top_up = time.monotonic() + tended.top_up_seconds


def _offer_metrics(workers: Sequence[_WorkerProcess], folder: Path, address: str, port: int) -> None:
    folder.mkdir()
    os.environ[FOLDER_VARIABLE] = str(folder)  # for the Celery processes that are started next

    def failed_starts() -> dict[str, int]:
        return {_node_name(worker.device): worker.failed_starts for worker in workers}

    serve_worker_metrics(address, port, folder=folder, failed_starts=failed_starts)


def _beat(worker: _WorkerProcess) -> Beat:
    """The worker's row. Weights are looked for anew each time, because a pull may bring them at any moment."""
    loaded, models = None, list[str]()
    with suppress(OSError):
        loaded = model_file(worker.run_dir).read_text()
    with suppress(OSError):  # a share that is away. An error here would end the heart for good
        models = [spec.name for spec in known_models()[0] if is_present(spec)]
    return replace(
        own_beat(ProcessKind.WORKER),
        name=_node_name(worker.device),
        device=worker.device.cuda_id or "cpu",
        models=models,
        model=loaded,
        failed_starts=worker.failed_starts,
        last_error=worker.last_error if worker.failed_starts else None,
    )


def _node_name(device: Device) -> str:
    """What Celery calls the worker, and what `chunk.worker` holds."""
    return f"{_own_name(device)}@{socket.gethostname()}"


def _own_name(device: Device) -> str:
    """The worker's name on this machine. Two jobs of Slurm on one machine may both count their devices from 0."""
    slurm_job = os.environ.get("SLURM_JOB_ID")
    return f"{device.name}-{slurm_job}" if slurm_job else device.name


def _in_background(action: Callable[[], object], before: threading.Thread | None) -> threading.Thread:
    """Start the action in a thread, unless it still runs. A frozen broker blocks it for half a minute, and meanwhile
    signals must still be handled."""
    if before is not None and before.is_alive():
        return before
    thread = threading.Thread(target=action, name="top-up", daemon=True)
    thread.start()
    return thread


def _keep_alive(worker: _WorkerProcess, most_quick_deaths: int) -> None:
    """Start the worker when it does not run and its pause is over."""
    now = time.monotonic()
    if worker.given_up:
        return
    if worker.process is None:
        if now >= worker.restart_at:
            _start(worker)
        return
    code = worker.process.poll()
    if code is None:
        if worker.watch.is_stuck(_POLL_SECONDS):
            _end_stuck(worker, worker.process)
        return
    worker.process = None
    worker.quick_deaths = 0 if now - worker.started_at > _HEALTHY_SECONDS else worker.quick_deaths + 1
    worker.given_up = worker.quick_deaths >= most_quick_deaths
    pause = min(2.0 ** (worker.quick_deaths - 1), _LONGEST_PAUSE_SECONDS) if worker.quick_deaths else 0.0
    worker.restart_at = now + pause
    worker.last_error = f"exit code {code}{_said(worker)}"
    what = "is given up" if worker.given_up else f"starts again in {pause:g} s"
    about = {"worker": _node_name(worker.device)}
    log.error("worker %s ended with %s and %s", _own_name(worker.device), worker.last_error, what, extra=about)


def _end_stuck(worker: _WorkerProcess, process: subprocess.Popen[bytes]) -> None:
    """Kill its main process, which hears no signal. The pool's child stores its batch and ends."""
    with suppress(OSError):
        error_file(worker.run_dir).write_text("its event loop stood still", encoding="utf-8")
    process.kill()
    worker.watch.begin()


def _said(worker: _WorkerProcess) -> str:
    """The last error that the worker logged since its start, after a colon. Empty when it logged none."""
    try:
        return f": {error_file(worker.run_dir).read_text(encoding='utf-8')}"
    except OSError:
        return ""


def _start(worker: _WorkerProcess) -> None:
    name = _own_name(worker.device)
    # -P: a folder named `db` or `workers` in the current folder must not be imported.
    # --quiet: without Celery's banner, which is no log line.
    command = [sys.executable, "-P", "-m", "celery", "--quiet", "--app", "workers.running.app", "worker"]
    command += ["--queues", ",".join(QUEUES)]
    command += ["--pool", "prefork", "--concurrency", "1", "--hostname", f"{name}@%h", "--loglevel", "INFO"]
    command += ["--without-gossip", "--without-mingle"]
    environment = os.environ | {
        PINNED_VARIABLE: worker.device.cuda_id,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        RUN_DIR_VARIABLE: str(worker.run_dir),
        "TMPDIR": str(worker.run_dir),  # what a killed process leaves goes with the folder
        SUPERVISOR_VARIABLE: str(os.getpid()),
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), _NO_WORD_OF_SEMAPHORES])),
        **({"OMP_NUM_THREADS": str(worker.device.threads)} if worker.device.threads else {}),
    }
    # The stop file too: the predecessor made it when it stopped by itself, and this one would drain for ever.
    for of_its_predecessor in (model_file(worker.run_dir), error_file(worker.run_dir), stop_file(worker.run_dir)):
        of_its_predecessor.unlink(missing_ok=True)
    # The worker gets its own session. So Ctrl-C reaches only this process, which then drains its workers in order.
    # Logs go to stderr. What Celery itself prints on stdout ("Warm shutdown") would be no log line.
    worker.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    worker.started_at = time.monotonic()
    worker.watch.begin()
    log.info("worker %s started as process %d", name, worker.process.pid)


def _drain(workers: Sequence[_WorkerProcess], tended: Tended) -> None:
    for worker in workers:
        stop_file(worker.run_dir).touch()
        if worker.process is not None:
            worker.process.terminate()
    give_up_at = time.monotonic() + tended.drain_seconds
    for worker in workers:
        if (process := worker.process) is None:
            continue
        while process.poll() is None and time.monotonic() < give_up_at and not tended.hurry.wait(_DRAIN_POLL_SECONDS):
            pass
        if process.poll() is None and not tended.hurry.is_set():
            log.warning("process %d did not stop within %g s and is killed", process.pid, tended.drain_seconds)
        _kill(worker, process)


def _kill(worker: _WorkerProcess, process: subprocess.Popen[bytes]) -> None:
    """Kill what still runs of it: its main process, and the pool's child, which a dead main process may have left.

    Not the whole group: billiard's tracker, the third process, removes their semaphores from /dev/shm and ends.
    """
    process.kill()
    with suppress(OSError, ValueError):
        child = int(child_file(worker.run_dir).read_text())
        if os.getpgid(child) == process.pid:  # else the number is another program's by now
            os.kill(child, signal.SIGKILL)
    process.wait()
