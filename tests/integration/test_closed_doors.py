"""Secrets stay inside real processes, and only JSON comes in: a deployment with planted secrets is searched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psutil
import pytest
import redis
from kombu import Connection as BrokerConnection
from sqlalchemy import Engine, make_url, text

from db.settings import settings
from orchestrator.export.coco import export_coco
from orchestrator.export.label_studio import export_label_studio
from orchestrator.export.png import export_png
from orchestrator.export.yolo import export_yolo
from tests.deployment import MASKFLEET, Deployment, draw_pictures
from tests.integration.test_chunk_runs import s3_of_one_picture
from tests.label_studio.reviewing import BLOCK, RING, labeled_job, stored
from tests.redis_server import free_port
from tests.waiting import wait_for
from workers.running.app import QUEUE

pytestmark = pytest.mark.integration

PLANTED = {
    "PGPASSWORD": "plantedDatabase1",
    "AWS_ACCESS_KEY_ID": "plantedKeyId11",
    "AWS_SECRET_ACCESS_KEY": "plantedS3Secret1",
    "AWS_SESSION_TOKEN": "plantedSession1",
    "HF_TOKEN": "hf_plantedHuggingFace1",
    "MASKFLEET_LABEL_STUDIO_API_KEY": "plantedLabelStudio1",
    "MASKFLEET_WEBHOOK_SECRET": "plantedWebhook1",
}
FLOWER_LOGIN = ("flower", "plantedFlower1")


def with_password(database_url: str) -> str:
    """The same server, which trusts its own machine, with a password in its address."""
    url = make_url(database_url)
    return url.set(password="plantedDatabase1", username=url.username or "postgres").render_as_string(False)


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def everything_in_postgres(engine: Engine) -> str:
    with engine.begin() as db:
        tables = list(db.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars())
        rows = [db.execute(text(f'SELECT to_jsonb(t) FROM "{table}" t')).scalars().all() for table in tables]
        activity = db.execute(text("SELECT to_jsonb(a) FROM pg_stat_activity a")).scalars().all()
    return json.dumps([rows, activity], ensure_ascii=False)


def everything_in_redis(broker: redis.Redis) -> str:
    """Every value of every key, as Redis itself would save it."""
    return "".join(f"{key!r} {broker.dump(key)!r}" for key in broker.scan_iter(count=1000))


def flower(deployment: Deployment, port: int) -> subprocess.Popen[bytes]:
    environment = {**deployment.environment, "FLOWER_BASIC_AUTH": ":".join(FLOWER_LOGIN)}
    command = ["celery", "--app", "workers.running.app", "flower", "--address=127.0.0.1", f"--port={port}"]
    with (deployment.folder / "flower-0.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=deployment.folder,
            start_new_session=True,
        )
    deployment.started.append(process)
    return process


def test_planted_secrets_are_in_no_argv_log_row_message_or_page(deployment: Deployment, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {**PLANTED, "MASKFLEET_STUB_SECONDS": "0.1", "MASKFLEET_STUB_HOLD": str(hold)}
    deployment.database_url = with_password(deployment.database_url)
    secrets = [*PLANTED.values(), FLOWER_LOGIN[1], str(urlsplit(deployment.broker_url).password)]
    port = free_port()
    started = [deployment.start("dispatch"), deployment.start("worker", "--devices", "cpu"), flower(deployment, port)]
    source = draw_pictures(tmp_path / "pictures", 24)
    (source / "text.png").write_text("not a picture")
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 4)
    hold.touch()  # so that tasks are left of which Flower hears
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", auth=FLOWER_LOGIN, timeout=120) as pages:
        wait_for(lambda: answers(pages), "Flower", logs=deployment.logs)
        wait_for(lambda: pages.get("/workers?json=1").json()["data"], "Flower to hear", logs=deployment.logs)
        found = {"argv": " ".join(map(words_of, family(started)))}
        found |= {page: pages.get(page).text for page in ("/", "/workers", "/tasks", "/broker", "/api/workers")}
        hold.unlink()
        deployment.wait_until_done(job)
        wait_for(lambda: "segment_chunk" in pages.get("/api/tasks").text, "a task in Flower", logs=deployment.logs)
        found["/api/tasks"] = pages.get("/api/tasks").text
    deployment.call("export", str(job), "--format", "coco", "--out", str(tmp_path / "coco.json"))
    for words in (("show", str(job), "--failed"), ("jobs",)):
        found[" ".join(words)] = deployment.call(*words)
    found["coco"] = (tmp_path / "coco.json").read_text()
    found["logs"] = "\n".join(log.read_text() for log in deployment.folder.glob("*.log"))
    found["postgres"] = everything_in_postgres(deployment.engine)
    found["redis"] = everything_in_redis(redis.Redis.from_url(deployment.broker_url))

    assert {place: [s for s in secrets if s in text] for place, text in found.items()} == {place: [] for place in found}
    assert len(found["argv"]) > 100
    assert "segment_chunk" in found["/api/tasks"]
    assert "0000.png" in found["postgres"]


def family(started: list[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    parents = [psutil.Process(process.pid) for process in started]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def answers(pages: httpx.Client) -> bool:
    try:
        return pages.get("/workers").is_success
    except httpx.TransportError:
        return False


REFUSED = {
    "MASKFLEET_DATABASE_URL": "postgresql://user:planted with spaces1@127.0.0.1:1/x",
    "MASKFLEET_BROKER_URL": "redis://:plantedBroker1@127.0.0.1:1/0",
    "MASKFLEET_S3_ENDPOINT": "http://user:plantedEndpoint1@127.0.0.1:1",
    "MASKFLEET_LABEL_STUDIO_URL": "http://user:plantedLsUrl1@127.0.0.1:1",
}


@pytest.mark.parametrize(
    "words",
    [
        ("doctor",),
        ("doctor", "--json"),
        ("jobs",),
        ("submit", "s3://bucket/prefix"),
        ("run", "s3://bucket/prefix", "--out", "{out}"),
        ("publish", "1", "--project", "1"),
        ("label-studio", "setup", "--title", "x"),
        ("migrate",),
    ],
    ids=" ".join,
)
def test_the_message_of_a_refused_connection_holds_no_secret(words: tuple[str, ...], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    environment |= {**PLANTED, **REFUSED, "AWS_MAX_ATTEMPTS": "1", "COLUMNS": "300"}
    environment["MASKFLEET_DATABASE_URL"] = REFUSED["MASKFLEET_DATABASE_URL"].replace(" ", quote(" "))

    done = subprocess.run(
        [*MASKFLEET, *(word.format(out=tmp_path / "out") for word in words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    said = done.stdout + done.stderr
    assert "planted" not in said
    assert "with spaces" not in said
    assert "Traceback" not in said
    assert done.returncode == 2
    assert said.strip()


def test_only_json_is_taken_from_the_broker_and_what_is_not_stops_no_worker(
    deployment: Deployment, tmp_path: Path
) -> None:
    harm = tmp_path / "harm"
    started = [deployment.start("worker", "--devices", "cpu"), deployment.start("dispatch")]
    body = {"id": "1", "task": "maskfleet.segment_chunk", "args": [Harm(str(harm))], "kwargs": {}}
    with BrokerConnection(deployment.broker_url) as connection, connection.Producer() as producer:
        for serializer in ("pickle", "yaml"):
            harmless = {**body, "args": [1]}
            producer.publish(
                body if serializer == "pickle" else harmless, routing_key=QUEUE, serializer=serializer, exchange=""
            )
    broker = redis.Redis.from_url(deployment.broker_url)
    wait_for(lambda: broker.llen(QUEUE) == 0, "the messages to be taken", logs=deployment.logs)

    job = deployment.submit(draw_pictures(tmp_path / "pictures", 8))

    assert deployment.wait_until_done(job).labeled == 8
    assert not harm.exists()
    assert [process.poll() for process in started] == [None, None]
    assert "Refusing to deserialize" in deployment.logs()


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


ODD_KEYS = [
    "k" * 1024,
    "/".join(["d" * 100] * 10) + "/photo.jpg",
    "photo." + "x" * 600,
    "line\nbreak.jp\ng",
    "\x1b[31mred.jpg",
    "../../../etc/cron.d/x.jpg",
    "/absolute.jpg",
    "a//b/./c/../d.jpg",
    "trailing /",
    "\u202egpj.exe",
    "%2e%2e%2f.jpg",
    "📷" * 200 + ".png",
]


@pytest.mark.parametrize("with_images", [False, True])
def test_long_and_odd_keys_end_no_export_and_name_no_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_images: bool
) -> None:
    job = labeled_job(
        engine,
        ODD_KEYS,
        lambda key, asset_id: stored(asset_id, [RING, BLOCK], scores=[0.9, 0.8], labels=["ring\n\x1b[0m", None]),
        source="s3://bucket/prefix",
    )
    out = tmp_path / "out"
    out.mkdir()

    with ExitStack() as opened:
        monkeypatch.setenv("MASKFLEET_S3_ENDPOINT", opened.enter_context(s3_of_one_picture(threading.Event())))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        settings.cache_clear()
        opened.callback(settings.cache_clear)
        db = opened.enter_context(engine.connect())
        export_coco(db, job, out / "coco.json")
        export_png(db, job, out / "png")
        export_yolo(db, job, out / "yolo", images=with_images)
        export_label_studio(db, job, out / "tasks.json")

    images = json.loads((out / "coco.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == sorted(ODD_KEYS)
    names = [path.name for path in tmp_path.rglob("*")]
    assert all(name.isprintable() and name.isascii() and len(name) < 100 for name in names)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
