"""infra/slurm/maskfleet.sbatch, run by bash with stand-ins for `scontrol` and for the worker."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from db.settings import Settings
from tests.waiting import wait_for
from workers.machine import Device
from workers.running import devices

SCRIPT = Path(__file__).parents[2] / "infra" / "slurm" / "maskfleet.sbatch"
# It drains for a moment after SIGTERM, as a worker does, and says that it did.
WORKER = """#!/bin/bash
trap 'sleep 0.2; echo drained > ended; exit 0' TERM
echo "$@" > started
while true; do sleep 0.05; done
"""
# The script waits only when the worker is gone and the shell has taken note of it: then /proc has it no more.
SLOW_SHELL = """
wait() {
  while [ -e "/proc/$worker" ]; do sleep 0.01; done
  builtin wait "$@"
}
"""
# The signal comes before the shell knows the worker's number.
EARLY_SIGNAL = """
early() {
  if [ "$BASH_COMMAND" = 'worker=$!' ]; then
    while [ ! -s started ]; do sleep 0.01; done
    kill -USR1 $$
  fi
}
trap early DEBUG
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job whose programs write into tmp_path."""
    programs = {
        "scontrol": '#!/bin/bash\necho "$@" > requeued\n',
        ".venv/bin/maskfleet": WORKER,
    }
    for name, text in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "MASKFLEET_DATABASE_URL_FILE": "database-url",
        "MASKFLEET_BROKER_URL_FILE": "broker-url",
    }


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_limit_the_worker_drains_and_the_job_is_queued_again_and_a_cancelled_one_only_drains(
    cluster: dict[str, str], tmp_path: Path, sent: signal.Signals, requeued: bool
) -> None:
    with subprocess.Popen(["bash", SCRIPT], env=cluster, cwd=tmp_path) as job:
        wait_for((tmp_path / "started").exists, "the worker", seconds=60)
        wait_for((tmp_path / "started").read_text, "the worker's arguments", seconds=60)
        job.send_signal(sent)
        assert job.wait(60) == 0

    assert (tmp_path / "started").read_text() == "worker --devices all\n"
    assert (tmp_path / "ended").read_text() == "drained\n"
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_a_signal_that_comes_before_the_worker_is_known_drains_it_too(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "early.sh").write_text(EARLY_SIGNAL)
    cluster["BASH_ENV"] = str(tmp_path / "early.sh")

    assert subprocess.run(["bash", SCRIPT], env=cluster, cwd=tmp_path, timeout=60).returncode == 0

    assert (tmp_path / "ended").read_text() == "drained\n"
    assert (tmp_path / "requeued").exists()


@pytest.mark.parametrize("slow", [False, True], ids=["shell in time", "worker gone first"])
def test_the_exit_status_of_the_worker_is_that_of_the_job(cluster: dict[str, str], tmp_path: Path, slow: bool) -> None:
    (tmp_path / ".venv" / "bin" / "maskfleet").write_text("#!/bin/bash\nexit 3\n")
    if slow:
        (tmp_path / "slow.sh").write_text(SLOW_SHELL)
        cluster["BASH_ENV"] = str(tmp_path / "slow.sh")

    assert subprocess.run(["bash", SCRIPT], env=cluster, cwd=tmp_path).returncode == 3
    assert not (tmp_path / "requeued").exists()


def test_without_the_addresses_it_says_what_is_missing(cluster: dict[str, str], tmp_path: Path) -> None:
    del cluster["MASKFLEET_BROKER_URL_FILE"]

    done = subprocess.run(["bash", SCRIPT], env=cluster, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode != 0
    assert "MASKFLEET_BROKER_URL_FILE: a file with rediss://" in done.stderr


def test_slurm_warns_earlier_than_a_worker_needs_to_drain() -> None:
    text = SCRIPT.read_text()
    [seconds] = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)

    assert int(seconds) > Settings.model_fields["drain_seconds"].default
    assert "#SBATCH --requeue" in text.splitlines()
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    first_command = text.index("\nset -euo")
    assert all(text.index(option) < first_command for option in options), "Slurm reads no option behind a command"
    for name in re.findall(r"MASKFLEET_([A-Z_]+)", text):
        assert name == "DIR" or name.removesuffix("_FILE").lower() in Settings.model_fields


def test_the_workers_of_two_jobs_on_one_machine_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    device, names = Device(name="gpu0", cuda_id="GPU-1"), set()
    for job in ("17", "18"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        names.add(devices._node_name(device))
    monkeypatch.delenv("SLURM_JOB_ID")

    host = socket.gethostname()
    assert names == {f"gpu0-17@{host}", f"gpu0-18@{host}"}
    assert devices._node_name(device) == f"gpu0@{host}"
