"""A test run that is killed leaves no server and no worker behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]

# Real fixtures start the same processes as most tests, also a supervisor with its workers. Then the test never ends.
HOLDING = """
import os, threading
from pathlib import Path

from sqlalchemy import text

from tests.waiting import wait_for

def test_holds(deployment, redis):
    worker = deployment.start("worker", "--devices", "cpu")
    started = [worker.pid, deployment.start("dispatch").pid]
    children = wait_for(lambda: deployment.pool_children(worker), "a pool", logs=deployment.logs)
    started += [p.pid for p in [*deployment.celery_mains(worker), *children]]
    started.append(redis.info("server")["process_id"])
    with deployment.engine.begin() as db:
        started.append(db.execute(text("SELECT pg_backend_pid()")).scalar_one())
        folder = Path(db.execute(text("SHOW data_directory")).scalar_one())
    started.append(int((folder / "postmaster.pid").read_text().split()[0]))
    Path("started.making").write_text(" ".join(map(str, [os.getpid(), *started])))
    Path("started.making").rename("started")
    threading.Event().wait()
"""


@pytest.mark.parametrize("killed", ["the run", "its worker"])
def test_a_killed_run_leaves_nothing_behind(tmp_path: Path, killed: str) -> None:
    (tmp_path / "test_holding.py").write_text(HOLDING)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-o", f"pythonpath={root}"]
    command += ["-n", "1", "--max-worker-restart", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(root)}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([*command, "test_holding.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log) as run,
    ):

        def held() -> list[int]:
            assert run.poll() is None, (tmp_path / "log").read_text()
            started = tmp_path / "started"
            return [int(pid) for pid in started.read_text().split()] if started.exists() else []

        worker_pid, *started = [psutil.Process(pid) for pid in wait_for(held, "the servers")]
        os.kill(run.pid if killed == "the run" else worker_pid.pid, signal.SIGKILL)

        wait_for(lambda: not any(is_alive(process) for process in started), "the end of what was started", 120)
        wait_for(lambda: not is_alive(worker_pid), "the end of the worker", 60)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
