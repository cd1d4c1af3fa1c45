"""A job of drawn scenes with annotations as `review` stores them, and a Label Studio that knows only its project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image
from sqlalchemy import Engine, text

from db import annotations, jobs, listing, publishing
from db.annotations import AnnotationRow, RegionRow
from db.jobs import Job
from db.leases import NewOutcome
from db.listing import NewAsset
from db.publishing import Intent, LsProject
from db.results import StoredMask
from db.states import AnnotationStatus, Verdict
from orchestrator.label_studio.config import label_config
from tests.answering import server_of
from tests.factories import chunk_ids, claim, finish, pending, record
from workers.masks import BoolMask, Mask, mask_from_pixels
from workers.storage.source import open_source
from workers.training.scenes import draw_scene

LABEL = "thing"
SCENE_HW = (192, 256)
READ_AT = datetime(2026, 11, 26, tzinfo=UTC)


def draw_scenes(folder: Path, count: int) -> list[list[BoolMask]]:
    """Write scenes as PNG files into a folder, and return the masks of each."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for n in range(count):
        scene = draw_scene(8_000_000_000_000 + n, SCENE_HW)
        Image.fromarray(scene.image).save(folder / f"{n:03}.png")
        drawn.append([np.asarray(mask, np.bool_) for mask in scene.masks])
    return drawn


def plant_review(
    engine: Engine,
    source: Path,
    scenes: list[list[BoolMask]],
    *,
    model: str,
    model_version: str,
    ls_project: LsProject,
    label: str = LABEL,
) -> Job:
    """A finished job over the scenes: of each asset the first mask was kept, the second edited, one deleted, and the
    others were added."""
    job = _insert_job(engine, source, model=model, model_version=model_version)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    assert chunk is not None
    assets = pending(engine, chunk)
    outcomes = []
    for asset, masks in zip(assets, scenes, strict=True):
        height, width = masks[0].shape
        shown = [masks[0], masks[min(1, len(masks) - 1)], _corner(masks[0].shape)]
        stored = [_row(asset.id, n, mask) for n, mask in enumerate(shown)]
        outcomes.append(NewOutcome(asset_id=asset.id, width=width, height=height, segment_ms=5, masks=stored))
    record(engine, chunk, outcomes)
    finish(engine, chunk)
    intents = [_intent(asset.id, asset.key) for asset in assets]
    with engine.begin() as db:
        tasks = publishing.write_intents(
            db, ls_project=ls_project, job_id=job.id, model_version=model_version, intents=intents
        )
        db.execute(text("UPDATE ls_prediction SET state = 'done'"))
        rows = {
            tasks[asset.key]: [_annotation(n, asset.id, model_version, masks, label)]
            for n, (asset, masks) in enumerate(zip(assets, scenes, strict=True))
        }
        annotations.replace_annotations(db, annotations=rows, changed_at=dict.fromkeys(rows, READ_AT))
        found = jobs.get_job(db, job_id=job.id)
    assert found is not None
    return found


@contextmanager
def label_studio_of(labels: list[str], project: int) -> Iterator[str]:
    """The address of a server that answers as Label Studio does about its version, its user and one project."""
    answers = {
        "/api/current-user/whoami": {"id": 1},
        "/api/version": {"release": "1.23.2"},
        f"/api/projects/{project}/": {
            "id": project,
            "title": "a project",
            "label_config": label_config(labels),
            "model_version": "",
            "task_number": 0,
            "sampling": "Sequential sampling",
            "created_at": "2026-11-26T00:00:00Z",
        },
    }

    def answer(method: str, path: str, body: bytes) -> tuple[int, bytes]:
        known = answers.get(path.partition("?")[0])
        return 200 if known else 404, json.dumps(known or {}).encode()

    with server_of(answer) as url:
        yield url


def _insert_job(engine: Engine, source: Path, *, model: str, model_version: str) -> Job:
    found = [one for page in open_source(str(source), s3_endpoint=None).list() for one in page.objects]
    with engine.begin() as db:
        job = jobs.insert_job(
            db, name="scenes", source=str(source), model=model, model_version=model_version, asked={}, fresh=False
        )
        listed = listing.add_assets(
            db,
            job=job,
            assets=[NewAsset(key=one.key, size_bytes=one.size_bytes, etag=one.etag) for one in found],
            cursor=None,
            skipped={},
            complete=True,
            chunk_size=1000,
        )
    assert listed is not None
    return listed


def _corner(size_hw: tuple[int, int]) -> BoolMask:
    pixels = np.zeros(size_hw, np.bool_)
    pixels[:9, :9] = True
    return pixels


def _row(asset_id: int, n: int, pixels: BoolMask) -> StoredMask:
    mask = mask_from_pixels(pixels, predicted_iou=0.9)
    x, y, width, height = (int(side) for side in mask.bbox_xywh)
    return StoredMask(
        asset_id=asset_id,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, width, height),
        area_px=mask.area_px,
        predicted_iou=0.9,
        stability_score=0.9,
        label=LABEL,
        prompt={"points": [[x + width / 2, y + height / 2, 1]]},
    )


def _intent(asset_id: int, key: str) -> Intent:
    return Intent(asset_uid=key, uri=key, asset_id=asset_id, mask_count=3, left_out=0, iou_sum=2.7, iou_min=0.9)


def _annotation(n: int, asset_id: int, version: str, masks: list[BoolMask], label: str) -> AnnotationRow:
    drawn = [mask_from_pixels(mask, predicted_iou=0.9) for mask in masks]
    regions = [RegionRow(verdict=Verdict.KEPT, mask_n=0, label=label)]
    if len(masks) > 1:
        regions.append(_drawn(Verdict.EDITED, drawn[1], label, mask_n=1))
    regions.append(RegionRow(verdict=Verdict.DELETED, mask_n=2, label=label))
    regions += [_drawn(Verdict.ADDED, mask, label) for mask in drawn[2:]]
    return AnnotationRow(
        annotation_id=n + 1,
        annotator=1,
        standing=AnnotationStatus.CHOSEN,
        ground_truth=False,
        lead_seconds=10.0,
        updated_at=READ_AT,
        model_version=version,
        asset_id=asset_id,
        regions=regions,
    )


def _drawn(verdict: Verdict, mask: Mask, label: str, *, mask_n: int | None = None) -> RegionRow:
    x, y, width, height = (int(side) for side in mask.bbox_xywh)
    return RegionRow(
        verdict=verdict,
        mask_n=mask_n,
        label=label,
        iou=0.8 if verdict is Verdict.EDITED else None,
        counts=mask.counts,
        bbox_xywh=(x, y, width, height),
        area_px=mask.area_px,
    )
