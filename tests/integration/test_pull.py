"""What `review` reads of a Label Studio that changes meanwhile, or that holds what Postgres cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import Engine

from db import publishing
from db.publishing import LsProject
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.regions import regions_for
from orchestrator.label_studio.review import pull
from orchestrator.label_studio.review_numbers import read_review
from tests.answering import server_of
from tests.assisted import CONFIG, PublishedAsset, published_asset
from tests.label_studio.reviewing import BLOCK
from workers.masks import mask_from_pixels

pytestmark = pytest.mark.integration

PROJECT = 3


class ChangingServer:
    """Answers as Label Studio does about one project with one task of ours. others: tasks that people made.

    meanwhile: called once, when the task was read and before it is answered.
    """

    def __init__(self) -> None:
        self.task: dict[str, Any] = {}
        self.others: list[dict[str, Any]] = []
        self.meanwhile: Callable[[], None] | None = None

    def answer(self, method: str, address: str, body: bytes) -> tuple[int, bytes]:
        if address.startswith("/api/projects/"):
            project = {"id": PROJECT, "title": "", "label_config": CONFIG, "model_version": "", "task_number": 1}
            return 200, json.dumps({**project, "sampling": "", "created_at": "2026-11-26T00:00:00Z"}).encode()
        tasks = [self.task, *self.others]
        content = json.dumps({"tasks": tasks, "total": len(tasks)}).encode()
        if parse_qs(urlsplit(address).query)["fields"] == ["all"] and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return 200, content


def task_of(asset: PublishedAsset, result: list[dict[str, Any]] | None, minute: int) -> dict[str, Any]:
    """The task, last changed in this minute. result: of its annotation; None for a task without one."""
    stamp = f"2026-11-26T12:{minute:02}:00Z"
    made = {"id": 1, "completed_by": 1, "updated_at": stamp, "parent_prediction": 5, "result": result}
    return {
        "id": asset.task_id,
        "updated_at": stamp,
        "data": {"asset_id": asset.uid},
        "annotations": [made] if result is not None else [],
        "predictions": [{"id": 5, "model_version": asset.job.model_version, "result": shown(asset)}],
    }


def shown(asset: PublishedAsset) -> list[dict[str, Any]]:
    return regions_for([mask_from_pixels(BLOCK, predicted_iou=0.9)], asset_id=asset.asset_id).result


@pytest.mark.parametrize("later", [[], None])
def test_a_slow_review_does_not_put_an_older_state_of_a_task_over_a_newer_one(
    engine: Engine, later: list[dict[str, Any]] | None
) -> None:
    """later: a person deletes the mask, or takes the annotation back, while the slow one has the task as it was."""
    server = ChangingServer()
    with server_of(server.answer) as url:
        ls_project = LsProject(url, PROJECT)
        asset = published_asset(engine, [BLOCK], ls_project=ls_project)

        def change_and_review() -> None:
            server.task = task_of(asset, later, minute=20)
            review(engine, url)

        server.task = task_of(asset, None, minute=1)
        review(engine, url)  # the first one goes over the project more than once
        server.task, server.meanwhile = task_of(asset, shown(asset), minute=10), change_and_review
        review(engine, url)

        found = read_review(engine, asset.job, ls_project)
        assert (found.masks.kept, found.masks.deleted) == (0, 0 if later is None else 1)
        assert (found.assets.untouched, found.assets.waiting) == (0, 1 if later is None else 0)


def test_another_task_of_the_asset_is_read_though_it_was_changed_earlier(engine: Engine) -> None:
    """A person deleted the task that was read, and `publish` found a second one of the image, annotated before."""
    server = ChangingServer()
    with server_of(server.answer) as url:
        ls_project = LsProject(url, PROJECT)
        asset = published_asset(engine, [BLOCK], ls_project=ls_project)
        server.task = task_of(asset, None, minute=20)
        review(engine, url)
        with engine.begin() as db:
            rows = publishing.rows_of(
                db, ls_project=ls_project, model_version=asset.job.model_version, asset_uids=[asset.uid]
            )
            publishing.set_task_ids(db, ls_project=ls_project, task_ids={rows[asset.uid].ls_task_id: 31})

        server.task = task_of(asset, shown(asset), minute=10) | {"id": 31}
        review(engine, url)

        assert read_review(engine, asset.job, ls_project).masks.kept == 1


@pytest.mark.parametrize("asset_id", ["a\0b", "\ud800", ["a\0b"], None])
def test_a_strangers_task_with_an_asset_id_that_postgres_cannot_hold_stops_nothing(
    engine: Engine, asset_id: object
) -> None:
    """On SQLite, Label Studio stores any text of JSON."""
    server = ChangingServer()
    with server_of(server.answer) as url:
        ls_project = LsProject(url, PROJECT)
        asset = published_asset(engine, [BLOCK], ls_project=ls_project)
        server.task = task_of(asset, [], minute=10)
        server.others = [task_of(asset, [], minute=10) | {"id": 99, "data": {"asset_id": asset_id}}]

        review(engine, url)

        assert read_review(engine, asset.job, ls_project).masks.deleted == 1


def review(engine: Engine, url: str) -> None:
    with LabelStudio(url, "token") as client:
        pull(engine, client, PROJECT)
