"""What operators see and rely on: who is alive, why nothing comes up, one supervisor a device, a stop that stops."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Engine, text

from db import processes
from db.processes import Process
from db.session import newest_migration
from db.states import ProcessKind
from tests.deployment import MASKFLEET, Deployment, draw_pictures, terminate
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]

GPU = "GPU-5e1f0000-0000-4000-8000-00000000test"


def live(deployment: Deployment, kind: str) -> list[Process]:
    with deployment.engine.begin() as db:
        return [process for process in processes.live(db) if process.kind == kind]


def output_of(deployment: Deployment, process: subprocess.Popen[bytes]) -> str:
    [log] = deployment.folder.glob(f"*-{deployment.started.index(process)}.log")
    return log.read_text()


def test_workers_and_dispatchers_are_seen_while_they_live(deployment: Deployment, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.2", "MASKFLEET_CHUNK_SIZE": "100"}
    deployment.settings |= {
        "MASKFLEET_LEASE_SECONDS": "60",
        "MASKFLEET_STUB_HOLD": str(hold),
    }  # the machine may be busy
    dispatcher = deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu,cpu")
    wait_for(lambda: len(live(deployment, "worker")) == 2, "both devices' rows", logs=deployment.logs)
    [seen] = wait_for(lambda: live(deployment, "dispatcher"), "the dispatcher's row", logs=deployment.logs)
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 60))
    deployment.wait_for_outcomes(job, 4)
    hold.touch()

    [at_work] = deployment.call_json("show", str(job))["workers"]
    found = {finding["what"]: finding for finding in deployment.call_json("doctor")}
    hold.unlink()

    assert seen.pid == dispatcher.pid
    assert {one.device for one in live(deployment, "worker")} == {"cpu"}
    assert at_work["worker"] in {one.name for one in live(deployment, "worker")}
    assert at_work["device"] == "cpu"
    assert at_work["in_flight"] > 0
    assert at_work["lease_seconds"] > 0
    assert at_work["worker"] in found["workers"]["found"]
    assert str(dispatcher.pid) in found["dispatchers"]["found"]
    assert "stub" in found["weights"]["found"].split(at_work["worker"])[1]
    assert f"migration {newest_migration()}" in found["postgres"]["found"]
    assert "messages wait" in found["broker"]["found"]
    assert terminate(worker) == terminate(dispatcher) == 0
    assert live(deployment, "worker") == live(deployment, "dispatcher") == []


def test_submit_warns_when_no_live_worker_has_the_model(deployment: Deployment, tmp_path: Path) -> None:
    source = str(draw_pictures(tmp_path / "pictures", 1))

    def warning() -> str:
        words = [*MASKFLEET, "submit", source, "--model", "stub"]
        return subprocess.run(words, env=deployment.environment, capture_output=True, text=True, check=True).stderr

    assert "no worker is running" in warning()
    with deployment.engine.begin() as db:
        beat = processes.Beat(
            kind=ProcessKind.WORKER, name="gpu0@far", host="far", pid=1, version="0", models=["sam_vit_h"]
        )
        processes.beat(db, beats=[beat])
    assert "gpu0@far has sam_vit_h" in warning()
    deployment.start("worker", "--devices", "cpu")
    wait_for(
        lambda: any(one.name != "gpu0@far" for one in live(deployment, "worker")),
        "the worker's row",
        logs=deployment.logs,
    )
    assert "worker" not in warning()


def test_a_worker_that_cannot_start_is_said_by_show_and_by_doctor(deployment: Deployment, tmp_path: Path) -> None:
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 1))
    deployment.start("dispatch")
    real, deployment.broker_url = deployment.broker_url, "nosuchbroker://127.0.0.1"
    deployment.start("worker", "--devices", "cpu")
    deployment.broker_url = real

    def failed_starts() -> int:
        return max((one.failed_starts for one in live(deployment, "worker")), default=0)

    wait_for(lambda: failed_starts() >= 2, "two failed starts in the worker's row", logs=deployment.logs)
    shown = deployment.call_json("show", str(job))
    [workers] = [f for f in deployment.call_json("doctor", code=2) if f["what"] == "workers"]

    assert "failed to start" in shown["error"]
    assert "nosuchbroker" in shown["error"]
    assert shown["failed_starts"]
    assert workers["ok"] is False
    assert "nosuchbroker" in workers["found"]


def test_a_worker_on_a_gpu_that_torch_cannot_use_says_so_and_labels_nothing_on_the_cpu(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.settings["CUDA_VISIBLE_DEVICES"] = GPU
    deployment.start("dispatch")
    deployment.start("worker")
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 1), "--model", "sam_nano")

    said = wait_for(lambda: deployment.read(job)[0].error, "the reason on the job", logs=deployment.logs)

    assert "sam_nano cannot be loaded" in said
    assert "NVIDIA" in said or "CUDA" in said
    assert deployment.read(job)[1].pending == 1


def test_a_second_supervisor_on_a_device_is_refused_until_the_first_has_died(deployment: Deployment) -> None:
    deployment.settings["CUDA_VISIBLE_DEVICES"] = GPU
    first = deployment.start("worker")
    wait_for(lambda: deployment.celery_mains(first), "the first worker", logs=deployment.logs)

    second = deployment.start("worker")
    assert second.wait(120) == 2
    assert f"{GPU} is held by process {first.pid} since" in " ".join(output_of(deployment, second).split())

    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    third = deployment.start("worker")
    wait_for(lambda: deployment.celery_mains(third), "a worker after the first one's death", logs=deployment.logs)


def test_sigterm_ends_a_worker_in_time_though_postgres_is_frozen(deployment: Deployment, tmp_path: Path) -> None:
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.2", "MASKFLEET_DRAIN_SECONDS": "6"}
    dispatcher = deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 40))
    deployment.wait_for_outcomes(job, 4)
    deployment.kill_tree(dispatcher)

    with frozen_postgres(deployment.engine):
        assert terminate(worker, seconds=6 + 2 + 40) == 0  # 40 s for a busy machine


@contextmanager
def frozen_postgres(engine: Engine) -> Iterator[None]:
    """Stop the server with all its processes, as a frozen machine does."""
    with engine.begin() as db:
        data_directory = db.execute(text("SHOW data_directory")).scalar_one()
        backend = db.execute(text("SELECT pg_backend_pid()")).scalar_one()
    server = psutil.Process(backend).parent()
    assert server is not None
    assert data_directory in " ".join(server.cmdline())
    family = [server, *server.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(family):
            process.resume()
