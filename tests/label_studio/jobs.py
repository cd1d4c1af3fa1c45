"""Labeled jobs to publish, made through the queries that workers use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from sqlalchemy import Engine

from db import jobs
from db.jobs import Job
from db.leases import NewOutcome
from db.results import StoredMask
from tests.factories import chunk_ids, claim, finish, make_job, pending, record
from workers.masks import encode_counts

SIZE_HW = (60, 80)


def ring(asset_id: int, n: int, label: str | None = "car") -> StoredMask:
    """A square with a hole, a little to the right of the mask before."""
    x = n % 50
    pixels = np.zeros(SIZE_HW, bool)
    pixels[10:40, x : x + 30] = True
    pixels[20:25, x + 10 : x + 15] = False
    return StoredMask(
        asset_id=asset_id,
        n=n,
        counts=encode_counts(pixels),
        bbox_xywh=(x, 10, 30, 30),
        area_px=int(pixels.sum()),
        predicted_iou=1.02 - n / 10_000,
        stability_score=0.9,
        label=label,
        prompt=None,
    )


def noise(asset_id: int, n: int) -> StoredMask:
    """A mask of single pixels, which takes a brush of 20 KB in JSON."""
    pixels = np.random.default_rng(n).random(SIZE_HW) < 0.5
    return dataclasses.replace(ring(asset_id, n), counts=encode_counts(pixels), area_px=int(pixels.sum()))


def rings(count: int = 2, label: str | None = "car") -> Callable[[int], list[StoredMask]]:
    return lambda asset_id: [ring(asset_id, n, label) for n in range(count)]


def labeled_job(
    engine: Engine,
    *,
    keys: Sequence[str] | int = 3,
    masks: Callable[[int], list[StoredMask]] | None = None,
    source: str = "s3://bucket/photos",
    model_version: str = "stub@55555555+00000000",
    done: bool = True,
) -> Job:
    """A job whose assets (all, or those of its first chunk) are labeled. masks: of an asset, by its id."""
    job = make_job(engine, keys=keys, source=source, model_version=model_version, chunk_size=64)
    for chunk_id in chunk_ids(engine, job)[: None if done else 1]:
        label_chunk(engine, chunk_id, masks or rings())
    return read_job(engine, job.id)


def label_chunk(engine: Engine, chunk_id: int, masks: Callable[[int], list[StoredMask]]) -> None:
    chunk = claim(engine, chunk_id)
    assert chunk is not None
    height, width = SIZE_HW
    outcomes = [
        NewOutcome(asset_id=asset.id, width=width, height=height, segment_ms=5, masks=masks(asset.id))
        for asset in pending(engine, chunk)
    ]
    record(engine, chunk, outcomes)
    finish(engine, chunk)


def read_job(engine: Engine, job_id: int) -> Job:
    with engine.begin() as db:
        job = jobs.get_job(db, job_id=job_id)
    assert job is not None
    return job
