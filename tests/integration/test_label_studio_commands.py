"""Commands for Label Studio against a server that answers as Label Studio does about a project."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from sqlalchemy import Engine

from db.leases import NewOutcome
from db.results import StoredMask
from orchestrator.label_studio.config import find_controls
from tests.answering import server_of
from tests.factories import chunk_ids, claim, make_job, pending, record
from tests.reviewed_job import label_studio_of

pytestmark = pytest.mark.integration


def maskfleet(database_url: str, server: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": server,
        "MASKFLEET_LABEL_STUDIO_API_KEY": "token",
        "MASKFLEET_WEBHOOK_SECRET": "a secret",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def mask_of(asset_id: int, n: int, label: str | None) -> StoredMask:
    return StoredMask(
        asset_id=asset_id,
        n=n,
        counts="1",
        bbox_xywh=(0, 0, 1, 1),
        area_px=1,
        predicted_iou=0.9,
        stability_score=0.9,
        label=label,
        prompt=None,
    )


@pytest.mark.parametrize(
    ("of_masks", "asked", "offered"),
    [
        (["car", None, "bus"], [], ["bus", "car", "object"]),  # --classify leaves some masks without a label
        ([None], ["tree"], ["object", "tree"]),
        (["car"], ["tree"], ["car", "tree"]),
        ([], ["tree"], ["tree"]),
    ],
)
def test_a_project_that_setup_makes_offers_every_label_that_publish_sends(
    engine: Engine, database_url: str, of_masks: list[str | None], asked: list[str], offered: list[str]
) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    masks = [mask_of(asset.id, n, label) for n, label in enumerate(of_masks)]
    record(engine, chunk, [NewOutcome(asset_id=asset.id, width=4, height=3, segment_ms=1, masks=masks)])
    made: list[dict[str, str]] = []

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if method == "POST" and path == "/api/projects/":
            made.append(json.loads(body))
            project = {"id": 3, "model_version": "", "task_number": 0, "created_at": "2026-11-26T00:00:00Z"}
            return 201, json.dumps(made[0] | project).encode()
        return 200, b'{"results": []}' if path.startswith("/api/projects/?") else b"{}" if "version" in path else b"[]"

    with server_of(answer) as server:
        labels = [word for label in asked for word in ("--label", label)]
        done = maskfleet(database_url, server, "label-studio", "setup", "--title", "t", "--job", job.id, *labels)

    assert done.returncode == 0, done.stderr
    controls = find_controls(made[0]["label_config"])
    assert [sorted(control.labels) for control in controls.by_kind.values()] == [offered] * 3


def test_a_webhooks_place_that_is_taken_is_said_in_a_line(engine: Engine, database_url: str) -> None:
    job = make_job(engine, keys=1)
    with socket.create_server(("127.0.0.1", 0)) as taken, label_studio_of(["car"], 3) as server:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        done = maskfleet(database_url, server, "review", job.id, "--project", 3, "--follow", "--listen", place)

    assert done.returncode == 2
    assert done.stderr.startswith(f"maskfleet: --listen {place}: ")
    assert "Traceback" not in done.stderr
