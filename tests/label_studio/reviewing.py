"""A published job whose tasks are worked on through Label Studio's API, as its page does it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from sqlalchemy import Engine

from db import jobs, results
from db.jobs import Job
from db.leases import NewOutcome
from db.results import StoredMask
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import publish_job
from tests.factories import chunk_ids, claim, finish, make_job, pending, record
from tests.label_studio.server import Server
from workers.masks import BoolMask, mask_from_pixels

SIZE_HW = (120, 160)


def disc(x: float, y: float, radius: float, size_hw: tuple[int, int] = SIZE_HW) -> BoolMask:
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    found: BoolMask = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
    return found


RING = disc(40, 40, 25) & ~disc(40, 40, 12)
TWO_PARTS = disc(100, 30, 12) | disc(130, 90, 15)
BLOCK = disc(50, 95, 18)


def stored(
    asset_id: int, masks: Sequence[BoolMask], *, scores: Sequence[float], labels: Sequence[str | None]
) -> list[StoredMask]:
    found = []
    for n, (pixels, score, label) in enumerate(zip(masks, scores, labels, strict=True)):
        mask = mask_from_pixels(pixels, predicted_iou=score)
        x, y, w, h = (int(side) for side in mask.bbox_xywh)
        found.append(
            StoredMask(
                asset_id=asset_id,
                n=n,
                counts=mask.counts,
                bbox_xywh=(x, y, w, h),
                area_px=mask.area_px,
                predicted_iou=score,
                stability_score=0.9,
                label=label,
                prompt=None,
            )
        )
    return found


def labeled_job(
    engine: Engine,
    keys: Sequence[str],
    masks: Callable[[str, int], Sequence[StoredMask]],
    *,
    sizes_hw: Mapping[str, tuple[int, int]] | None = None,
    source: str = "",
    model: str = "stub",
    model_version: str = "stub@55555555+00000000",
) -> Job:
    """A finished job. masks: of a key and its asset's id."""
    job = make_job(
        engine,
        keys=keys,
        source=source or f"s3://bucket/{secrets.token_hex(4)}",
        model=model,
        model_version=model_version,
    )
    for chunk_id in chunk_ids(engine, job):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        outcomes = []
        for asset in pending(engine, chunk):
            height, width = (sizes_hw or {}).get(asset.key, SIZE_HW)
            found = masks(asset.key, asset.id)
            outcomes.append(NewOutcome(asset_id=asset.id, width=width, height=height, segment_ms=5, masks=found))
        record(engine, chunk, outcomes)
        finish(engine, chunk)
    with engine.begin() as db:
        done = jobs.get_job(db, job_id=job.id)
    assert done is not None
    return done


@dataclass(kw_only=True)
class Project:
    """A project with the job's tasks, and a person's way to work on them."""

    id: int
    client: LabelStudio
    server: Server

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Whole tasks by their image's file name."""
        found = self.client.list_tasks(self.id, whole=True)
        return {task["data"]["image"].rpartition("/")[2]: task for task in found}

    def submit(
        self,
        task: Mapping[str, Any],
        result: Sequence[Mapping[str, Any]],
        *,
        skip: bool = False,
        from_prediction: bool = True,
        seconds: float = 5.0,
        **fields: Any,
    ) -> dict[str, Any]:
        """What the page sends at Submit or Skip."""
        parent = task["predictions"][0]["id"] if from_prediction and task["predictions"] else None
        body = {"result": list(result), "was_cancelled": skip, "lead_time": seconds, "parent_prediction": parent}
        return self._json("POST", f"/api/tasks/{task['id']}/annotations/", {**body, **fields})

    def update(self, annotation_id: int, **changes: Any) -> dict[str, Any]:
        return self._json("PATCH", f"/api/annotations/{annotation_id}/", changes)

    def delete(self, annotation_id: int) -> None:
        self._send("DELETE", f"/api/annotations/{annotation_id}/")

    def add_person(self, name: str) -> int:
        """Another annotator; returns the user's id."""
        email = f"{name}-{self.id}@example.com"
        return int(self._send("POST", "/api/users/", {"username": name, "email": email}).json()["id"])

    def _json(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self._send(method, path, body).json()
        return found

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        headers = {"Authorization": f"Token {self.server.token}"}
        answer = httpx.request(method, self.server.url + path, json=body, headers=headers, timeout=300)
        assert answer.is_success, answer.text
        return answer


def publish(engine: Engine, client: LabelStudio, server: Server, job: Job, options: Options | None = None) -> Project:
    """A new project with the job's assets in it."""
    with engine.begin() as db:
        labels = results.labels_of(db, job_id=job.id)
    project = client.create_project(
        title=f"review {secrets.token_hex(4)}", label_config=label_config([*labels, DEFAULT_LABEL])
    )
    publish_job(engine, client, job, project.id, options or Options())
    return Project(id=project.id, client=client, server=server)
