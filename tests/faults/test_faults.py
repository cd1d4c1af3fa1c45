"""Kills every process that may die, and checks each time: listed = labeled + failed, one outcome for each asset."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import text

from db import jobs
from db.jobs import Counts
from tests.deployment import Deployment, draw_pictures, terminate
from tests.stub.stub_model import BROKEN, FULL, HANG, POISON
from tests.waiting import wait_for
from workers.running.app import SEGMENT_CHUNK, make_app

pytestmark = [pytest.mark.integration, pytest.mark.faults]


def assert_nothing_lost(counts: Counts, *, listed: int, failed: dict[str, int] | None = None) -> None:
    assert counts.listed == listed
    assert counts.failed_by_kind == (failed or {})
    assert counts.listed == counts.labeled + counts.failed
    assert counts.pending == counts.running == 0


def test_killed_children_workers_and_dispatchers_lose_nothing(deployment: Deployment, tmp_path: Path) -> None:
    deployment.settings["MASKFLEET_STUB_SECONDS"] = "0.05"
    source = draw_pictures(tmp_path / "pictures", 120)
    dispatcher, worker = deployment.start("dispatch"), deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)

    deployment.wait_for_outcomes(job, 10)
    for child in deployment.pool_children(worker):
        child.kill()
    deployment.wait_for_outcomes(job, 30)
    deployment.kill_tree(worker)
    deployment.kill_tree(dispatcher)
    deployment.start("worker", "--devices", "cpu")
    deployment.wait_for_outcomes(job, 60)
    deployment.start("dispatch")

    assert_nothing_lost(deployment.wait_until_done(job), listed=120)


def test_a_dispatcher_killed_in_the_middle_of_a_listing_leaves_a_listing_that_goes_on(
    deployment: Deployment, tmp_path: Path
) -> None:
    source = draw_pictures(tmp_path / "pictures", 1)
    for n in range(20_000):
        (source / f"{n:05}.jpg").touch()
    deployment.settings["MASKFLEET_CHUNK_SIZE"] = "5000"
    job = deployment.submit(source, "--exclude", "*7.jpg")
    with deployment.engine.connect() as holder:
        holder.execute(text(HOLD_THE_LISTING))
        holder.commit()
        first = deployment.start("dispatch")
        wait_for(lambda: deployment.read(job)[0].asset_count > 1000, "the first pages", logs=deployment.logs)
        deployment.kill_tree(first)
        stopped_at = deployment.read(job)[0]
        holder.execute(text("SELECT pg_advisory_unlock(1)"))
        holder.commit()

    deployment.start("dispatch")
    wait_for(lambda: deployment.read(job)[0].listed_at is not None, "the end of the listing", logs=deployment.logs)

    listed = deployment.read(job)[0]
    assert stopped_at.asset_count < listed.asset_count == 18_001
    assert listed.skipped == {"excluded": 2_000}
    with deployment.engine.begin() as db:
        keys = db.execute(text("SELECT count(DISTINCT key) FROM asset")).scalar_one()
        covered = db.execute(
            text("SELECT count(*) FROM asset a JOIN chunk c ON a.id BETWEEN c.first_asset_id AND c.last_asset_id")
        ).scalar_one()
    assert keys == covered == 18_001


# A listing waits here behind its first pages, and nothing else does. It takes a fraction of a second in all.
HOLD_THE_LISTING = """
    CREATE FUNCTION wait_to_list() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_lock_shared(1); PERFORM pg_advisory_unlock_shared(1); RETURN new; END $$;
    CREATE TRIGGER wait_to_list BEFORE UPDATE ON job FOR EACH ROW
        WHEN (old.asset_count > 1000 AND old.listed_at IS NULL) EXECUTE FUNCTION wait_to_list();
    SELECT pg_advisory_lock(1)"""


def test_a_queue_that_is_flushed_fills_again(deployment: Deployment, tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 40)
    deployment.start("dispatch")
    job = deployment.submit(source)
    broker = redis.Redis.from_url(deployment.broker_url)
    wait_for(lambda: broker.llen("maskfleet") == 5, "five chunks in the queue")

    broker.flushall()
    deployment.start("worker", "--devices", "cpu")

    assert_nothing_lost(deployment.wait_until_done(job), listed=40)


def test_a_message_delivered_three_times_computes_once(deployment: Deployment, tmp_path: Path) -> None:
    deployment.settings["MASKFLEET_LEASE_SECONDS"] = "60"  # none ends early because the machine is busy
    source = draw_pictures(tmp_path / "pictures", 8)
    dispatcher = deployment.start("dispatch")
    job = deployment.submit(source)
    broker = redis.Redis.from_url(deployment.broker_url)
    wait_for(lambda: broker.llen("maskfleet") == 1, "the chunk in the queue")
    with deployment.engine.begin() as db:
        [chunk_id] = db.execute(text("SELECT id FROM chunk")).scalars()
    sender = make_app(deployment.broker_url)
    for message in (chunk_id, chunk_id, 10**12, "no number"):
        sender.send_task(SEGMENT_CHUNK, (message,))

    deployment.start("worker", "--devices", "cpu,cpu")
    counts = deployment.wait_until_done(job)

    assert_nothing_lost(counts, listed=8)
    wait_for(lambda: broker.llen("maskfleet") == 0, "every message to be taken")
    with deployment.engine.begin() as db:
        assert db.execute(text("SELECT token FROM chunk")).scalar_one() == 1  # claimed once
    terminate(dispatcher)


def test_two_dispatchers_at_once_list_and_send_everything_once(deployment: Deployment, tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 60)
    for _ in range(2):
        deployment.start("dispatch")
    job = deployment.submit(source)
    deployment.start("worker", "--devices", "cpu")

    assert_nothing_lost(deployment.wait_until_done(job), listed=60)


def test_assets_that_kill_hang_or_fill_the_process_are_told_apart_and_harm_no_neighbour(
    deployment: Deployment, tmp_path: Path
) -> None:
    special = {"0003-poison.png": POISON, "0008-full.png": FULL, "0012-broken.png": BROKEN}
    source = draw_pictures(tmp_path / "pictures", 14, special=special)
    (source / "0005-text.png").write_text("not a picture")
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)

    counts = deployment.wait_until_done(job)

    kinds = {"crashed_worker": 1, "gpu_oom": 1, "internal": 1, "not_image": 1}
    assert_nothing_lost(counts, listed=18, failed=kinds)
    shown = deployment.call_json("show", str(job), "--failed")
    assert {f["key"]: f["error_kind"] for f in shown["failed"]} == {
        "0003-poison.png": "crashed_worker",
        "0005-text.png": "not_image",
        "0008-full.png": "gpu_oom",
        "0012-broken.png": "internal",
    }


def test_a_worker_in_which_nothing_moves_gives_up_its_lease_and_its_process(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.settings["MASKFLEET_HANG_SECONDS"] = "20"
    source = draw_pictures(tmp_path / "pictures", 6, special={"0002-hang.png": HANG})
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)

    assert_nothing_lost(deployment.wait_until_done(job), listed=7, failed={"crashed_worker": 1})


def test_a_frozen_worker_is_replaced_and_its_late_write_refused(deployment: Deployment, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    deployment.settings["MASKFLEET_STUB_SECONDS"] = "0.3"
    source = draw_pictures(tmp_path / "pictures", 64)
    deployment.start("dispatch")
    frozen = deployment.start("worker", "--devices", "cpu", MASKFLEET_STUB_HOLD=str(hold))
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 2)
    hold.touch()  # it stays in one chunk until it is frozen
    wait_for(lambda: running_chunks(deployment), "a chunk in its hands", logs=deployment.logs)
    children = deployment.pool_children(frozen)
    [chunk_id] = running_chunks(deployment)
    for child in children:
        child.send_signal(signal.SIGSTOP)
    hold.unlink()

    deployment.start("worker", "--devices", "cpu")

    def done_by_another() -> bool:
        with deployment.engine.begin() as db:
            values = {"id": chunk_id}
            return db.execute(text("SELECT state FROM chunk WHERE id = :id"), values).scalar_one() == "done"

    wait_for(done_by_another, "the frozen worker's chunk to be done by another", logs=deployment.logs)
    assert deployment.read(job)[0].state == "running"  # so that it is the token alone that refuses the late write
    for child in children:
        child.send_signal(signal.SIGCONT)
    refused = re.compile(rf"chunk {chunk_id}( of job {job} is no longer held with token|: the lease was lost)")
    wait_for(lambda: refused.search(deployment.logs()), "the late write to be refused", logs=deployment.logs)

    assert_nothing_lost(deployment.wait_until_done(job), listed=64)
    assert terminate(frozen) == 0
    assert deployment.executions() == 64


def running_chunks(deployment: Deployment) -> list[int]:
    with deployment.engine.begin() as db:
        return list(db.execute(text("SELECT id FROM chunk WHERE state = 'running'")).scalars())


@pytest.mark.parametrize("to_all", [False, True], ids=["to the command", "to all its processes, as Slurm does"])
def test_sigterm_drains_a_worker_and_gives_its_chunk_back(deployment: Deployment, tmp_path: Path, to_all: bool) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.3", "MASKFLEET_CHUNK_SIZE": "100"}
    deployment.settings |= {
        "MASKFLEET_LEASE_SECONDS": "60",
        "MASKFLEET_STUB_HOLD": str(hold),
    }  # the machine may be busy
    source = draw_pictures(tmp_path / "pictures", 60)
    dispatcher = deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 4)
    hold.touch()
    terminate(dispatcher)
    hold.unlink()

    if to_all:
        for process in psutil.Process(worker.pid).children(recursive=True):
            process.terminate()
    assert terminate(worker) == 0

    counts = deployment.read(job)[1]
    assert 0 < counts.labeled < 60
    with deployment.engine.begin() as db:
        assert db.execute(text("SELECT state FROM chunk")).scalar_one() in ("new", "sent")
        assert db.execute(text("SELECT count(*) FROM suspect")).scalar_one() == 0


def test_a_job_cancelled_while_it_runs_stops_and_goes_on_when_resumed(deployment: Deployment, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.2", "MASKFLEET_STUB_HOLD": str(hold)}
    source = draw_pictures(tmp_path / "pictures", 40)
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 3)
    hold.touch()  # the command takes seconds to start on a busy machine

    deployment.call("cancel", str(job))
    deployment.call("cancel", str(job), code=2)
    hold.unlink()

    def nothing_runs() -> bool:
        with deployment.engine.begin() as db:
            return not db.execute(text("SELECT count(*) FROM chunk WHERE state = 'running'")).scalar_one()

    wait_for(nothing_runs, "the running chunk to be given back")
    assert deployment.read(job)[1].pending > 0
    deployment.call("resume", str(job))
    assert_nothing_lost(deployment.wait_until_done(job), listed=40)
    with deployment.engine.begin() as db:
        assert jobs.is_idle(db)
