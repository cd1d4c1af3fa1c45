"""Temporary outages: processes wait until they are over, nothing dies, and the work then continues."""

from __future__ import annotations

import os
import signal

import pytest
import redis
from sqlalchemy import Engine, text

from orchestrator.local.run import RunError, _dispatcher
from tests.deployment import Deployment, draw_pictures, terminate
from tests.faults.outages import alter, postgres_refuses_everybody
from tests.faults.test_faults import assert_nothing_lost
from tests.waiting import wait_for
from workers.running.app import QUEUE

pytestmark = [pytest.mark.integration, pytest.mark.faults]

AWAY = "Postgres does not answer"


def test_an_outage_of_postgres_leaves_the_messages_in_the_queue(deployment: Deployment, tmp_path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.05", "MASKFLEET_RESEND_SECONDS": "3600"}
    deployment.settings["MASKFLEET_STUB_HOLD"] = str(hold)
    source = draw_pictures(tmp_path / "pictures", 160)
    dispatcher = deployment.start("dispatch")
    job = deployment.submit(source)
    broker = redis.Redis.from_url(deployment.broker_url)
    wait_for(lambda: broker.llen(QUEUE) >= 8, "a full queue", logs=deployment.logs)
    worker = deployment.start("worker", "--devices", "cpu")
    deployment.wait_for_outcomes(job, 4)
    hold.touch()  # until the outage begins

    with postgres_refuses_everybody(deployment.database_url):
        hold.unlink()
        for who in ("worker", "dispatch"):
            wait_for(lambda who=who: said(deployment, who), f"{who} to say that Postgres is away", logs=deployment.logs)
        left = broker.llen(QUEUE)

    # Messages are sent again only after an hour. So if the queue had been emptied, the job would not continue.
    assert left >= 5
    assert_nothing_lost(deployment.wait_until_done(job), listed=160)
    assert worker.poll() is dispatcher.poll() is None


def said(deployment: Deployment, command: str) -> bool:
    logs = [log.read_text() for log in deployment.folder.glob(f"{command}-*.log")]
    return any(AWAY in log or "Postgres did not answer" in log for log in logs)


def test_a_postgres_that_turns_read_only_is_waited_for(deployment: Deployment, tmp_path) -> None:
    deployment.settings["MASKFLEET_STUB_SECONDS"] = "0.05"
    source = draw_pictures(tmp_path / "pictures", 80)
    dispatcher, worker = deployment.start("dispatch"), deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 4)

    alter(deployment.database_url, "SET default_transaction_read_only = true")
    wait_for(lambda: said(deployment, "dispatch"), "the dispatcher to wait", logs=deployment.logs)
    alter(deployment.database_url, "RESET default_transaction_read_only")

    assert_nothing_lost(deployment.wait_until_done(job), listed=80)
    assert worker.poll() is dispatcher.poll() is None


def test_worker_and_dispatcher_wait_for_postgres_at_their_start(deployment: Deployment, tmp_path) -> None:
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 8))

    with postgres_refuses_everybody(deployment.database_url):
        dispatcher, worker = deployment.start("dispatch"), deployment.start("worker", "--devices", "cpu")
        for who in ("worker", "dispatch"):
            wait_for(lambda who=who: said(deployment, who), f"{who} to say that Postgres is away", logs=deployment.logs)
        assert worker.poll() is dispatcher.poll() is None

    assert_nothing_lost(deployment.wait_until_done(job), listed=8)


def test_a_killed_supervisor_takes_its_workers_along_and_their_chunk_goes_on(deployment: Deployment, tmp_path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.2", "MASKFLEET_CHUNK_SIZE": "100"}
    deployment.start("dispatch")
    supervisor = deployment.start("worker", "--devices", "cpu", MASKFLEET_STUB_HOLD=str(hold))
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 40))
    deployment.wait_for_outcomes(job, 4)
    hold.touch()
    family = [*deployment.celery_mains(supervisor), *deployment.pool_children(supervisor)]
    assert len(family) == 2

    os.kill(supervisor.pid, signal.SIGKILL)
    hold.unlink()

    wait_for(lambda: not any(process.is_running() for process in family), "the workers to end", logs=deployment.logs)
    assert 0 < deployment.read(job)[1].labeled < 40
    deployment.start("worker", "--devices", "cpu")
    assert_nothing_lost(deployment.wait_until_done(job), listed=40)


def test_a_dispatcher_that_dies_inside_a_run_ends_the_run_with_its_reason(engine: Engine) -> None:
    with engine.begin() as db:
        db.execute(text("DROP TABLE chunk CASCADE"))
        columns = "(name, state, source, model, model_version, asked)"
        db.execute(text(f"INSERT INTO job {columns} VALUES ('', 'running', '', '', '', '{{}}')"))

    def ended() -> str:
        try:
            dispatcher.check()
        except RunError as error:
            return str(error)
        return ""

    with _dispatcher(engine) as dispatcher:
        reason = wait_for(ended, "the dispatcher to end")

    assert 'relation "chunk" does not exist' in reason


def test_sigterm_ends_a_worker_in_time_though_redis_is_frozen(deployment: Deployment, tmp_path) -> None:
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.2", "MASKFLEET_DRAIN_SECONDS": "6"}
    deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 40))
    deployment.wait_for_outcomes(job, 4)
    broker = redis.Redis.from_url(deployment.broker_url)
    [server] = {int(broker.info("server")["process_id"])}
    os.kill(server, signal.SIGSTOP)
    try:
        assert terminate(worker, seconds=6 + 2 + 40) == 0  # 40 s for a busy machine
    finally:
        os.kill(server, signal.SIGCONT)
