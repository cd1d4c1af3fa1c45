"""A deployment of real processes for tests: `maskfleet dispatch` and `maskfleet worker` on real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from sqlalchemy import Engine, text

from db import jobs
from db.jobs import Counts, Job
from tests.waiting import wait_for

STUB = Path(__file__).parent / "stub"
MASKFLEET = [sys.executable, "-P", "-m", "orchestrator.cli"]


@dataclass
class Deployment:
    """Starts the commands of the product with an operator's environment. Kills all remaining processes at the end."""

    database_url: str
    broker_url: str
    folder: Path
    engine: Engine
    settings: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")},
            "PYTHONPATH": str(STUB),
            "MASKFLEET_DATABASE_URL": self.database_url,
            "MASKFLEET_BROKER_URL": self.broker_url,
            "MASKFLEET_LEASE_SECONDS": "3",
            "MASKFLEET_RESEND_SECONDS": "3",
            "MASKFLEET_CHUNK_SIZE": "8",
            "MASKFLEET_BATCH_SIZE": "2",
            **self.settings,
        }

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command. environment: variables of this process alone."""
        with (self.folder / f"{words[0]}-{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*MASKFLEET, *words],
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def call(self, *words: str, code: int = 0) -> str:
        """Run a command to its end and return its stdout."""
        done = subprocess.run(
            [*MASKFLEET, *words], env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def call_json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.call(*words, "--json", code=code))

    def submit(self, source: Path | str, *words: str) -> int:
        return int(self.call("submit", str(source), "--model", "stub", *words))

    def read(self, job_id: int) -> tuple[Job, Counts]:
        with self.engine.begin() as db:
            job = jobs.get_job(db, job_id=job_id)
            assert job is not None
            return job, jobs.count_job(db, job_id=job_id)

    def wait_until_done(self, job_id: int, seconds: float = 400) -> Counts:
        wait_for(lambda: self.read(job_id)[0].state == "done", f"job {job_id} to be done", seconds, logs=self.logs)
        return self.read(job_id)[1]

    def wait_for_outcomes(self, job_id: int, at_least: int) -> None:
        def enough() -> bool:
            counts = self.read(job_id)[1]
            return counts.labeled + counts.failed >= at_least

        wait_for(enough, f"{at_least} outcomes of job {job_id}", logs=self.logs)

    def executions(self) -> int:
        with self.engine.begin() as db:
            return int(db.execute(text("SELECT count(*) FROM outcome")).scalar_one())

    def pool_children(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The processes that run tasks, below the supervisor and Celery's main process."""
        found: list[psutil.Process] = []
        for main in self.celery_mains(worker):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found += [child for child in main.children() if "spawn_main" in command_line(child)]
        return found

    def celery_mains(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Celery's main processes below a supervisor, one for each device."""
        return [p for p in psutil.Process(worker.pid).children() if "celery" in command_line(p)]

    def kill_tree(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL a command and all its descendants, like a power cut."""
        parts = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for part in parts:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                part.kill()
        process.wait()

    def stop_all(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.kill_tree(process)

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


def command_line(process: psutil.Process) -> str:
    """The words of its command line, or none when it has just ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def draw_pictures(folder: Path, count: int, *, special: dict[str, tuple[int, int, int]] | None = None) -> Path:
    """A folder of small PNG files. special: files of one colour, which tell the stub model what to do."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        Image.new("RGB", (32, 24), (n % 200, 50, 50)).save(folder / f"{n:04}.png")
    for name, colour in (special or {}).items():
        Image.new("RGB", (32, 24), colour).save(folder / name)
    return folder


def terminate(process: subprocess.Popen[bytes], seconds: float = 120) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(seconds)
