"""Flower as docker-compose.yml starts it, on a real Redis with a real worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from redis import Redis

from tests.redis_server import free_port
from tests.waiting import wait_for
from workers.running.app import SEGMENT_CHUNK, make_app, publish_chunks

pytestmark = pytest.mark.integration

CHUNK_ID = 4711
WORKER = f"cpu0@{socket.gethostname()}"
LOGIN = ("flower", "a-password-of-this-test")


@pytest.fixture(scope="module")
def flower(redis_url, tmp_path_factory):
    """Access without a password to a Flower that watches one worker."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()  # no messages that other tests left
    folder = tmp_path_factory.mktemp("flower")
    port = free_port()
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"MASKFLEET_BROKER_URL": redis_url, "FLOWER_BASIC_AUTH": ":".join(LOGIN)}
    worker = ["worker", "--pool=prefork", "--concurrency=1", "--hostname=cpu0@%h", "--queues=maskfleet"]
    compose = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())
    options = [o for o in compose["services"]["flower"]["command"] if not o.startswith(("--address", "--port"))]
    flower = ["flower", "--address=127.0.0.1", f"--port={port}", *options]
    with (
        _celery(worker, environment, folder / "worker.log"),
        _celery(flower, environment, folder / "flower.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        wait_for(lambda: _answers(lambda: client.get("/healthcheck").is_success), f"Flower, see {folder}/*.log")
        wait_for(
            lambda: WORKER in client.get("/api/workers?refresh=1", auth=LOGIN).json(), f"{WORKER}, see {folder}/*.log"
        )
        yield client


@pytest.mark.parametrize("page", ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks"])
@pytest.mark.parametrize("login", [None, ("flower", "wrong")])
def test_nobody_looks_in_without_the_password(flower, page, login):
    assert flower.get(page, auth=login).status_code == 401


def test_the_workers_page_shows_each_worker_by_its_device(flower):
    rows = flower.get("/workers?json=1", auth=LOGIN).json()["data"]

    assert [row["hostname"] for row in rows] == [WORKER]
    assert flower.get(f"/worker/{WORKER}", auth=LOGIN).status_code == 200


def test_a_task_shows_its_readable_name_and_the_chunk_id_alone(flower, redis_url):
    with make_app(redis_url) as app:
        publish_chunks([CHUNK_ID], broker=app)

    def ended() -> list[dict]:
        tasks = flower.get("/api/tasks", auth=LOGIN).json().values()
        return [task for task in tasks if task.get("worker") == WORKER and task["state"] in ("SUCCESS", "FAILURE")]

    (task,) = wait_for(ended, "the task's end in Flower")
    assert task["name"] == SEGMENT_CHUNK == "maskfleet.segment_chunk"
    assert (task["args"], task["kwargs"]) == (f"({CHUNK_ID},)", "{}")
    page = flower.get(f"/task/{task['uuid']}", auth=LOGIN)
    assert page.status_code == 200
    assert SEGMENT_CHUNK in page.text


@pytest.mark.parametrize(
    "order",
    [
        f"/api/worker/shutdown/{WORKER}",
        f"/api/worker/pool/grow/{WORKER}?n=1",
        f"/api/worker/queue/cancel-consumer/{WORKER}?queue=maskfleet",
        f"/api/task/async-apply/{SEGMENT_CHUNK}",
    ],
)
def test_flower_watches_and_gives_no_orders(flower, order):
    assert flower.post(order, auth=LOGIN, json={"args": [CHUNK_ID]}).status_code == 403
    assert _workers(flower).keys() == {WORKER}


@contextmanager
def _celery(arguments: list[str], environment: dict[str, str], log_path: Path):
    """A Celery command in its own process group. It is stopped at the end."""
    command = [sys.executable, "-P", "-m", "celery", "--app", "workers.running.app", *arguments]
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=log_path.parent, start_new_session=True
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _workers(client: httpx.Client) -> dict[str, dict]:
    return client.get("/api/workers?refresh=1", auth=LOGIN).json()


def _answers(ask: Callable[[], object]) -> object:
    """The result of `ask`. None while the connection is refused."""
    with suppress(httpx.TransportError):
        return ask()
    return None
