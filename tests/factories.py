"""Rows for tests, made through the product's own queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Engine, text

from db import jobs, leases, listing, queue
from db.jobs import Counts, Job
from db.leases import Asset, ClaimedChunk, NewOutcome
from db.listing import NewAsset
from db.results import StoredMask
from orchestrator.jobs.delete import delete_job

LEASE_SECONDS = 60.0


def make_job(
    engine: Engine,
    *,
    keys: Sequence[str] | int = 3,
    chunk_size: int = 64,
    source: str = "s3://bucket/photos",
    model: str = "stub",
    model_version: str = "stub@55555555+00000000",
    fresh: bool = False,
    asked: Mapping[str, object] | None = None,
) -> Job:
    """A listed job with these keys (or with this number of keys)."""
    names = [f"{n:04}.jpg" for n in range(keys)] if isinstance(keys, int) else keys
    with engine.begin() as db:
        job = jobs.insert_job(
            db, name="a job", source=source, model=model, model_version=model_version, asked=asked or {}, fresh=fresh
        )
        listed = listing.add_assets(
            db,
            job=job,
            assets=[NewAsset(key=name, size_bytes=10, etag=f"etag-{name}") for name in names],
            cursor=names[-1] if names else None,
            skipped={},
            complete=True,
            chunk_size=chunk_size,
        )
        assert listed is not None
        return listed


def chunk_ids(engine: Engine, job: Job) -> list[int]:
    with engine.begin() as db:
        return list(db.execute(text("SELECT id FROM chunk WHERE job_id = :id ORDER BY id"), {"id": job.id}).scalars())


def claim(engine: Engine, chunk_id: int, worker: str = "one") -> ClaimedChunk | None:
    with engine.begin() as db:
        return leases.claim_chunk(db, chunk_id=chunk_id, worker=worker, lease_seconds=LEASE_SECONDS)


def pending(engine: Engine, chunk: ClaimedChunk) -> list[Asset]:
    with engine.begin() as db:
        return leases.pending_assets(db, chunk=chunk)


def record(
    engine: Engine, chunk: ClaimedChunk, outcomes: Sequence[NewOutcome] = (), in_flight: Sequence[int] = ()
) -> None:
    with engine.begin() as db:
        leases.record(
            db, chunk=chunk, outcomes=outcomes, in_flight=in_flight, worker="one", lease_seconds=LEASE_SECONDS
        )


def finish(engine: Engine, chunk: ClaimedChunk) -> None:
    with engine.begin() as db:
        leases.finish_chunk(db, chunk=chunk)
        jobs.finish_jobs(db)


def labeled(asset_id: int, masks: int = 1) -> NewOutcome:
    """A labeled outcome with that many small masks. counts and label have characters that COPY must escape."""
    stored = [
        StoredMask(
            asset_id=asset_id,
            n=n,
            counts="0\\1`\\",
            bbox_xywh=(0, n, 2, 1),
            area_px=2,
            predicted_iou=0.9,
            stability_score=0.95 if n % 2 else None,
            label="tab\there\nand \\N" if n % 2 else None,
            prompt={"points": [[1, n, 1]]},
        )
        for n in range(masks)
    ]
    return NewOutcome(asset_id=asset_id, width=4, height=3, segment_ms=5, masks=stored)


def expire_lease(engine: Engine, chunk: ClaimedChunk) -> None:
    with engine.begin() as db:
        db.execute(text("UPDATE chunk SET lease_until = now() - interval '1 s' WHERE id = :id"), {"id": chunk.id})


def reap(engine: Engine) -> int:
    with engine.begin() as db:
        return queue.reap(db)


def count(engine: Engine, job: Job) -> Counts:
    with engine.begin() as db:
        return jobs.count_job(db, job_id=job.id)


def delete(engine: Engine, job: Job) -> None:
    """Cancel a job if it is at work, and delete it."""
    with engine.begin() as db:
        jobs.cancel_job(db, job_id=job.id)
    delete_job(engine, job.id, store=None)
