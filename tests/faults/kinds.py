"""The kinds of faults of the campaign. Each does its harm, and takes back what would not pass by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
from sqlalchemy import text

from tests.deployment import terminate
from tests.faults.fleet import Fleet
from tests.faults.outages import alter, end_connections, postgres_refuses_everybody
from workers.running.app import QUEUE, SEGMENT_CHUNK, make_app

Fault = Callable[[Fleet], None]


def kill_a_child(fleet: Fleet) -> None:
    if child := fleet.child():
        child.kill()


def kill_a_celery_main(fleet: Fleet) -> None:
    if main := fleet.celery_main():
        main.kill()


def kill_a_supervisor(fleet: Fleet) -> None:
    fleet.worker().kill()


def kill_a_whole_worker(fleet: Fleet) -> None:
    fleet.deployment.kill_tree(fleet.worker())


def ask_a_worker_to_end(fleet: Fleet) -> None:
    terminate(fleet.worker(), seconds=120)


def quit_a_celery_main(fleet: Fleet) -> None:
    if main := fleet.celery_main():
        main.send_signal(signal.SIGQUIT)


def freeze_a_child_past_its_lease(fleet: Fleet) -> None:
    if child := fleet.child():
        child.send_signal(signal.SIGSTOP)
        time.sleep(5)  # the lease is 3 s
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGCONT)


def kill_the_dispatcher(fleet: Fleet) -> None:
    fleet.random.choice(fleet.dispatchers).kill()


def run_a_second_dispatcher(fleet: Fleet) -> None:
    second = fleet.deployment.start("dispatch")
    time.sleep(5)
    second.kill()


def empty_redis(fleet: Fleet) -> None:
    fleet.broker().flushall()


def end_the_clients_of_redis(fleet: Fleet) -> None:
    fleet.broker().client_kill_filter(_type="normal", skipme=True)


def freeze_redis(fleet: Fleet) -> None:
    pid = int(fleet.broker().info("server")["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(4)
    finally:
        os.kill(pid, signal.SIGCONT)


def double_the_messages(fleet: Fleet) -> None:
    with fleet.deployment.engine.begin() as db:
        ids = list(db.execute(text("SELECT id FROM chunk ORDER BY random() LIMIT 20")).scalars())
    sender = make_app(fleet.deployment.broker_url)
    for chunk_id in [*ids, *ids]:
        sender.send_task(SEGMENT_CHUNK, (chunk_id,), queue=QUEUE)


def send_messages_that_mean_nothing(fleet: Fleet) -> None:
    sender = make_app(fleet.deployment.broker_url)
    for argument in (10**12, -1, "no number", None, 1.5, [1], {}):
        sender.send_task(SEGMENT_CHUNK, (argument,), queue=QUEUE)


def refuse_postgres(fleet: Fleet) -> None:
    with postgres_refuses_everybody(fleet.deployment.database_url):
        time.sleep(5)


def end_the_connections_of_postgres(fleet: Fleet) -> None:
    end_connections(fleet.deployment.database_url)


def turn_postgres_read_only(fleet: Fleet) -> None:
    alter(fleet.deployment.database_url, "SET default_transaction_read_only = true")
    time.sleep(5)
    alter(fleet.deployment.database_url, "RESET default_transaction_read_only")


def lock_the_outcomes(fleet: Fleet) -> None:
    with fleet.deployment.engine.begin() as db:
        db.execute(text("LOCK TABLE outcome IN ACCESS EXCLUSIVE MODE"))
        time.sleep(4)


def cancel_and_resume_a_job(fleet: Fleet) -> None:
    with fleet.deployment.engine.begin() as db:
        job = db.execute(text("SELECT id FROM job WHERE state IN ('listing', 'running') LIMIT 1")).scalar()
    if job is not None:
        fleet.deployment.call("cancel", str(job))
        fleet.deployment.call("resume", str(job))


KINDS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill_a_child,
        kill_a_celery_main,
        kill_a_supervisor,
        kill_a_whole_worker,
        ask_a_worker_to_end,
        quit_a_celery_main,
        freeze_a_child_past_its_lease,
        kill_the_dispatcher,
        run_a_second_dispatcher,
        empty_redis,
        end_the_clients_of_redis,
        freeze_redis,
        double_the_messages,
        send_messages_that_mean_nothing,
        refuse_postgres,
        end_the_connections_of_postgres,
        turn_postgres_read_only,
        lock_the_outcomes,
        cancel_and_resume_a_job,
    )
}
