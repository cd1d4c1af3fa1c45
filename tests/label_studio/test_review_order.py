"""`publish --order`: which tasks a real Label Studio hands to a reviewer first."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import Engine, text

from db.results import StoredMask
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.publication import Options, ReviewOrder
from orchestrator.label_studio.publish import publish_job
from orchestrator.label_studio.review_order import disagreement
from tests.label_studio.reviewing import BLOCK, RING, SIZE_HW, disc, labeled_job, stored
from tests.label_studio.server import Server
from workers.masks import BoolMask

pytestmark = [pytest.mark.integration, pytest.mark.label_studio]

KEYS = [f"{n:04}.jpg" for n in range(130)]  # two requests
RANKS = {key: int(rank) for key, rank in zip(KEYS, np.random.default_rng(3).permutation(130), strict=True)}
SECOND = "stub@66666666+00000000"


def masks_at(asset_id: int, where: BoolMask, score: float = 0.9) -> list[StoredMask]:
    return stored(asset_id, [where], scores=[score], labels=["car"])


@pytest.fixture
def project_id(client: LabelStudio, request: pytest.FixtureRequest) -> int:
    return client.create_project(title=request.node.name[:50], label_config=label_config(["car"])).id


def handed_out(server: Server, project_id: int, count: int) -> Iterator[str]:
    """The file names of the tasks that a reviewer gets, one after the other. Each is submitted as it is."""
    headers = {"Authorization": f"Token {server.token}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        for _ in range(count):
            asked = {"id": "next_task", "project": project_id}
            task: dict[str, Any] = http.post("/api/dm/actions", params=asked, json={"project": project_id}).json()
            yield task["data"]["image"].rpartition("/")[2]
            http.post(f"/api/tasks/{task['id']}/annotations/", json={"result": [], "lead_time": 1}).raise_for_status()


def names_by_task(client: LabelStudio, project_id: int) -> list[str]:
    tasks = sorted(client.list_tasks(project_id), key=lambda task: task["id"])
    return [task["data"]["image"].rpartition("/")[2] for task in tasks]


def publish(engine: Engine, client: LabelStudio, job: Any, project_id: int, order: ReviewOrder) -> None:
    report = publish_job(engine, client, job, project_id, Options(order=order, settle_seconds=0))
    assert (report.created, report.refused) == (len(KEYS), [])


def test_the_lowest_score_is_handed_out_first(
    engine: Engine, client: LabelStudio, label_studio: Server, project_id: int
) -> None:
    job = labeled_job(
        engine, KEYS, lambda key, asset_id: masks_at(asset_id, RING, 0.2 + RANKS[key] / 200) if RANKS[key] < 128 else []
    )
    expected = sorted(KEYS, key=lambda key: (min(RANKS[key], 128), key))  # without masks last

    publish(engine, client, job, project_id, "score")

    assert names_by_task(client, project_id) == expected
    assert list(handed_out(label_studio, project_id, 3)) == expected[:3]
    again = publish_job(engine, client, job, project_id, Options(order="score", settle_seconds=0))
    assert (again.created, again.attached) == (0, 0)


def test_what_two_versions_see_differently_is_handed_out_first(
    engine: Engine, client: LabelStudio, label_studio: Server, project_id: int
) -> None:
    source = f"s3://bucket/{secrets.token_hex(4)}"
    block = disc(50, 60, 30)

    def moved(key: str, asset_id: int) -> list[StoredMask]:
        return masks_at(asset_id, np.roll(block, RANKS[key] // 3, axis=1))

    half = [key for key in KEYS if RANKS[key] % 2]
    labeled_job(engine, KEYS, lambda key, asset_id: masks_at(asset_id, RING), source=source)  # older than the next
    labeled_job(
        engine, half, lambda key, asset_id: masks_at(asset_id, block), source=source, model_version="old@11111111+0"
    )
    labeled_job(engine, KEYS[:9], lambda key, asset_id: [], source="s3://bucket/other", model_version="old@11111111+0")
    job = labeled_job(engine, KEYS, moved, source=source, model_version=SECOND)

    publish(engine, client, job, project_id, "disagreement")

    found = names_by_task(client, project_id)
    compared_with_half = [key for key in found if key in half]
    assert [RANKS[key] // 3 for key in compared_with_half] == sorted((RANKS[key] // 3 for key in half), reverse=True)
    assert sorted(found) == KEYS
    assert list(handed_out(label_studio, project_id, 3)) == found[:3]


def test_assets_that_no_other_version_labeled_come_last_in_the_listings_order(
    engine: Engine, client: LabelStudio, project_id: int
) -> None:
    source = f"s3://bucket/{secrets.token_hex(4)}"
    both = KEYS[100:110]
    labeled_job(engine, both, lambda key, asset_id: masks_at(asset_id, BLOCK), source=source)
    job = labeled_job(engine, KEYS, lambda key, asset_id: masks_at(asset_id, RING), source=source, model_version=SECOND)

    publish(engine, client, job, project_id, "disagreement")

    assert names_by_task(client, project_id) == both + [key for key in KEYS if key not in both]
    with engine.begin() as db:
        assert db.execute(text("SELECT to_regclass('publish_order')")).scalar_one() is None


def test_disagreement_is_the_mean_distance_to_the_best_mask_of_the_other_side() -> None:
    ring, block = masks_at(1, RING), masks_at(2, BLOCK)
    half = masks_at(3, RING & (np.indices(SIZE_HW)[0] < 40))
    iou = half[0].area_px / ring[0].area_px

    assert disagreement(ring, ring, SIZE_HW) == 0
    assert disagreement(ring, block, SIZE_HW) == 1
    assert disagreement(ring, [], SIZE_HW) == disagreement([], ring, SIZE_HW) == 1
    assert disagreement([], [], SIZE_HW) == 0
    assert disagreement(ring, half, SIZE_HW) == pytest.approx(1 - iou)
    assert disagreement(ring, [*half, *block], SIZE_HW) == pytest.approx(1 - (iou + iou + 0) / 3)
