"""The kinds of faults of the campaign. Each does its harm, and takes back what would not pass by itself."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
from sqlalchemy import text

from tests.deployment import terminate
from tests.faults.fleet import Fleet
from tests.faults.outages import alter, end_connections, postgres_refuses_everybody
from tests.waiting import wait_for
from workers.running.app import QUEUE, SEGMENT_CHUNK, make_app

Fault = Callable[[Fleet], None]


def kill_a_child(fleet: Fleet) -> None:
    if child := fleet.child():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            child.kill()


def kill_a_celery_main(fleet: Fleet) -> None:
    if main := fleet.celery_main():
        with suppress(psutil.NoSuchProcess):
            main.kill()


def kill_a_supervisor(fleet: Fleet) -> None:
    fleet.worker().kill()


def kill_a_whole_worker(fleet: Fleet) -> None:
    fleet.deployment.kill_tree(fleet.worker())


def ask_a_worker_to_end(fleet: Fleet) -> None:
    terminate(fleet.worker(), seconds=120)


def quit_a_celery_main(fleet: Fleet) -> None:
    if main := fleet.celery_main():
        with suppress(psutil.NoSuchProcess):
            main.send_signal(signal.SIGQUIT)


def freeze_a_child_past_its_lease(fleet: Fleet) -> None:
    if child := fleet.child():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGSTOP)
            time.sleep(5)  # the lease is 3 s
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
    if job is None:
        return
    try:
        fleet.deployment.call("cancel", str(job))
    except AssertionError:
        if fleet.is_over():  # it was done in the meantime
            return
        raise
    fleet.deployment.call("resume", str(job))


def fill_redis(fleet: Fleet) -> None:
    """Its memory is full: it takes nothing more."""
    broker = fleet.broker()
    broker.config_set("maxmemory", "1mb")
    try:
        time.sleep(5)
    finally:
        broker.config_set("maxmemory", "0")


def fill_the_disk_of_redis(fleet: Fleet) -> None:
    """It cannot save what it holds, and takes nothing more (MISCONF). A folder has the place of its file."""
    broker = fleet.broker()
    file = Path(broker.config_get("dir")["dir"]) / broker.config_get("dbfilename")["dbfilename"]
    file.unlink(missing_ok=True)
    file.mkdir()
    broker.config_set("save", "3600 1")
    broker.bgsave()
    wait_for(lambda: broker.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed save")
    try:
        time.sleep(4)
    finally:
        file.rmdir()
        broker.config_set("save", "")
        broker.bgsave()
        wait_for(lambda: broker.info("persistence")["rdb_last_bgsave_status"] == "ok", "a save")


def forbid_all_objects(fleet: Fleet) -> None:
    """The bucket's policy is wrong for a while. `forbidden` is a verdict, so an operator retries those assets."""
    refused = fleet.store.refused
    fleet.store.forbids = True
    try:
        wait_for(lambda: fleet.store.refused > refused or fleet.is_over(), "a refused read", 600)
        time.sleep(2)
    finally:
        fleet.store.forbids = False


def put_a_workers_clock_an_hour_off(fleet: Fleet) -> None:
    """In the place of a worker that is killed. It stays until another fault meets it."""
    worker = fleet.worker()
    fleet.deployment.kill_tree(worker)
    fleet.workers.remove(worker)
    off = fleet.random.choice(["+3600", "-3600"])
    fleet.workers.append(fleet.deployment.start("worker", "--devices", "cpu", **clock_off_by(off)))


def clock_off_by(seconds: str) -> dict[str, str]:
    """The variables that give a process another time of day."""
    return {"LD_PRELOAD": str(clock_library()), "CLOCK_OFF_SECONDS": seconds}


@cache
def clock_library() -> Path | None:
    """clock_off.c, compiled. None without a C compiler, or where libraries are not preloaded."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = Path(tempfile.mkdtemp(prefix="maskfleet-clock-")) / "clock_off.so"
    atexit.register(shutil.rmtree, library.parent, ignore_errors=True)
    source = Path(__file__).with_name("clock_off.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    return library if subprocess.run(command, check=False, capture_output=True).returncode == 0 else None


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
        fill_redis,
        fill_the_disk_of_redis,
        forbid_all_objects,
        *([put_a_workers_clock_an_hour_off] if shutil.which("cc") and sys.platform == "linux" else []),
    )
}
