"""Annotations of a picture that was replaced under its key, or whose masks were deleted, in one project."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine

from db import annotations, corrections, publishing, reviewed_masks
from db.annotations import AnnotationRow
from db.jobs import Job
from db.leases import NewOutcome
from db.publishing import Intent, LsProject
from db.results import StoredMask
from db.states import Verdict
from orchestrator.label_studio.regions import regions_for
from orchestrator.label_studio.review import judge_task
from tests.factories import chunk_ids, claim, delete, finish, make_job, pending, record
from workers.masks import Mask, mask_from_pixels

pytestmark = pytest.mark.integration

PROJECT = LsProject("http://ls.example", 7)
WIDE_HW, TALL_HW = (60, 100), (100, 60)


def mask_of(size_hw: tuple[int, int]) -> Mask:
    pixels = np.zeros(size_hw, np.bool_)
    pixels[10:50, 10:50] = True
    return mask_from_pixels(pixels, predicted_iou=0.9)


def labeled_job(engine: Engine, version: str, size_hw: tuple[int, int], etag: str) -> tuple[Job, int]:
    """A job over one picture of this size, and its asset."""
    job = make_job(engine, keys=["a.jpg"], model_version=version)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    mask = mask_of(size_hw)
    x, y, width, height = (int(side) for side in mask.bbox_xywh)
    stored = StoredMask(
        asset_id=asset.id,
        n=0,
        counts=mask.counts,
        bbox_xywh=(x, y, width, height),
        area_px=mask.area_px,
        predicted_iou=0.9,
        stability_score=0.9,
        label=None,
        prompt=None,
    )
    seen = NewOutcome(asset_id=asset.id, width=size_hw[1], height=size_hw[0], segment_ms=1, masks=[stored], etag=etag)
    record(engine, chunk, [seen])
    finish(engine, chunk)
    return job, asset.id


def published_job(engine: Engine, version: str, size_hw: tuple[int, int], etag: str) -> tuple[Job, int]:
    """A job over one picture of this size that is in the project, and its asset."""
    job, asset_id = labeled_job(engine, version, size_hw, etag)
    intent = Intent(asset_uid="a", uri="a", asset_id=asset_id, mask_count=1, left_out=0, iou_sum=1, iou_min=1)
    with engine.begin() as db:
        tasks = publishing.write_intents(db, ls_project=PROJECT, job_id=job.id, model_version=version, intents=[intent])
        publishing.mark_done(db, ls_project=PROJECT, model_version=version, task_ids={tasks["a"]: 41})
    return job, asset_id


def read(engine: Engine, version: str | None, asset_id: int, size_hw: tuple[int, int]) -> AnnotationRow:
    """Store an annotation that began from this version: its region was moved by a tenth of the picture.

    version: None for one that began from nothing.
    """
    shown = regions_for([mask_of(size_hw)], asset_id=asset_id).result
    moved: list[dict[str, Any]] = [
        {**r, "value": {**r["value"], "points": [[x + 10, y] for x, y in r["value"]["points"]]}} for r in shown
    ]
    if version is None:
        moved = [{**region, "id": f"drawn{n}"} for n, region in enumerate(moved)]
    annotation = {"id": 1, "completed_by": 1, "updated_at": "2026-11-26T00:00:00Z", "result": moved}
    predictions = [{"id": 9, "model_version": version, "result": shown}] if version else []
    task = {"annotations": [annotation], "predictions": predictions}
    with engine.begin() as db:
        known = annotations.known_tasks(db, ls_project=PROJECT, asset_uids=["a"])["a"]
        [row] = judge_task(task, known)
        annotations.replace_annotations(
            db, annotations={known.ls_task_id: [row]}, changed_at={known.ls_task_id: row.updated_at}
        )
    return row


def test_an_edit_on_a_picture_that_was_turned_since_an_earlier_job_is_read(engine: Engine) -> None:
    published_job(engine, "one", WIDE_HW, "etag-before")
    _, asset_id = published_job(engine, "two", TALL_HW, "etag-after")

    row = read(engine, "two", asset_id, TALL_HW)

    assert (row.unread, [region.verdict for region in row.regions]) == (0, ["edited"])
    assert row.regions[0].iou == pytest.approx(34 / 46, abs=0.03)


def test_an_annotation_of_the_picture_before_is_not_exported_for_the_one_that_replaced_it(engine: Engine) -> None:
    before, asset_id = published_job(engine, "one", WIDE_HW, "etag-before")
    after, _ = published_job(engine, "two", TALL_HW, "etag-after")
    same, _ = published_job(engine, "three", WIDE_HW, "etag-before")
    read(engine, "one", asset_id, WIDE_HW)

    with engine.begin() as db:
        jobs = (before, after, same)
        assert [reviewed_masks.annotated_assets(db, job_id=job.id) for job in jobs] == [1, 0, 1]
        assert [len(corrections.corrected_assets(db, job_id=job.id, ls_project=PROJECT)) for job in jobs] == [1, 0, 1]


def test_an_annotation_from_nothing_counts_for_the_bytes_that_were_published(engine: Engine) -> None:
    before, asset_id = published_job(engine, "one", WIDE_HW, "etag-before")
    after, _ = labeled_job(engine, "one", WIDE_HW, "etag-after")
    same, _ = labeled_job(engine, "one", WIDE_HW, "etag-before")
    read(engine, None, asset_id, WIDE_HW)

    with engine.begin() as db:
        jobs = (before, after, same)
        assert [reviewed_masks.annotated_assets(db, job_id=job.id) for job in jobs] == [1, 0, 1]


def test_what_was_kept_of_a_deleted_jobs_masks_is_not_exported_as_nothing(engine: Engine) -> None:
    before, asset_id = published_job(engine, "one", WIDE_HW, "etag")
    after, its_asset = published_job(engine, "two", WIDE_HW, "etag")
    row = read(engine, "one", asset_id, WIDE_HW)
    with engine.begin() as db:
        [known] = annotations.known_tasks(db, ls_project=PROJECT, asset_uids=["a"]).values()
        kept = [replace(row.regions[0], verdict=Verdict.KEPT, iou=None, counts=None, bbox_xywh=None, area_px=None)]
        stamp = datetime(2026, 11, 26, tzinfo=UTC)
        annotations.replace_annotations(
            db,
            annotations={known.ls_task_id: [replace(row, updated_at=stamp, regions=kept)]},
            changed_at={known.ls_task_id: stamp},
        )
        assert len(reviewed_masks.chosen_masks(db, job_id=after.id, asset_ids=[its_asset])[its_asset]) == 1
    delete(engine, before)

    with engine.begin() as db:
        assert reviewed_masks.chosen_masks(db, job_id=after.id, asset_ids=[its_asset]) == {}
        assert reviewed_masks.annotated_assets(db, job_id=after.id) == 0
