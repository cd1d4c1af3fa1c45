"""How far jobs are and who works at them, from counters and from the few chunks that are open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

_RECENT_CHUNKS = 128  # those sent last: their outcomes give the rate
_RECENT_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Outcomes of one job so far."""

    labeled: int
    failed: int
    masks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """A worker that holds a chunk of the job. lease_seconds: until its lease expires; below 0 it has expired.

    in_flight: assets that it works on now. device and model are None when the worker wrote no row.
    """

    worker: str
    device: str | None
    model: str | None
    chunk_id: int
    in_flight: int
    held_seconds: float | None
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkCounts:
    """A job's open chunks. waiting: for room in the queue, or for their pause to end. queued: a message is sent."""

    waiting: int
    queued: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredThen:
    """Outcomes that were stored in one second, of the chunks that were looked at."""

    at: datetime
    labeled: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """The newest failed asset of one kind."""

    error_kind: str
    key: str
    error: str


def totals(db: Connection, *, job_ids: Sequence[int]) -> dict[int, Totals]:
    """Outcomes of these jobs."""
    statement = text(
        """SELECT job_id, coalesce(sum(assets) FILTER (WHERE error_kind = ''), 0)::bigint AS labeled,
                  coalesce(sum(assets) FILTER (WHERE error_kind <> ''), 0)::bigint AS failed,
                  sum(masks)::bigint AS masks
           FROM outcome_counter WHERE job_id = ANY(:ids) GROUP BY job_id"""
    )
    rows = db.execute(statement, {"ids": list(job_ids)})
    found = {row.job_id: Totals(labeled=row.labeled, failed=row.failed, masks=row.masks) for row in rows}
    return {job_id: found.get(job_id, Totals(labeled=0, failed=0, masks=0)) for job_id in job_ids}


def complete_up_to(db: Connection, *, job_id: int) -> int:
    """All listed assets of the job up to this id have an outcome. 0 when there is none."""
    statement = text(
        """SELECT coalesce(
               (SELECT first_asset_id - 1 FROM chunk WHERE job_id = :job_id AND state <> 'done'
                ORDER BY first_asset_id LIMIT 1),
               (SELECT last_asset_id FROM chunk WHERE job_id = :job_id ORDER BY first_asset_id DESC LIMIT 1), 0)"""
    )
    return int(db.execute(statement, {"job_id": job_id}).scalar_one())


def at_work(db: Connection, *, job_id: int) -> list[AtWork]:
    """The workers that hold a chunk of the job, by name."""
    statement = text(
        """SELECT c.worker, p.device, p.model, c.id AS chunk_id, cardinality(c.in_flight) AS in_flight,
                  extract(epoch FROM now() - c.claimed_at)::float AS held_seconds,
                  extract(epoch FROM c.lease_until - now())::float AS lease_seconds
           FROM chunk c LEFT JOIN LATERAL (
               SELECT device, model FROM process WHERE kind = 'worker' AND name = c.worker
               ORDER BY seen_at DESC LIMIT 1) p ON true
           WHERE c.job_id = :job_id AND c.state = 'running' ORDER BY c.worker, c.id"""
    )
    return [AtWork(**row) for row in db.execute(statement, {"job_id": job_id}).mappings()]


def count_chunks(db: Connection, *, job_id: int) -> ChunkCounts:
    statement = text("SELECT state, count(*) FROM chunk WHERE job_id = :job_id AND state <> 'done' GROUP BY state")
    found = {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id})}
    return ChunkCounts(waiting=found.get("new", 0), queued=found.get("sent", 0), running=found.get("running", 0))


def assets_per_second(db: Connection, *, job_id: int) -> float | None:
    """How many outcomes workers stored a second, over the last ten minutes at most. None when that is not known yet.

    Answers from stored outcomes do not count: they come at another speed. Nor does the first batch: nobody knows how
    long it took.
    """
    statement = text(
        """WITH recent AS (
               SELECT first_asset_id, last_asset_id FROM chunk
               WHERE job_id = :job_id AND state IN ('running', 'done') AND sent_at IS NOT NULL
               ORDER BY sent_at DESC LIMIT :chunks)
           SELECT count(*) FILTER (WHERE created_at > first)
                  / greatest(extract(epoch FROM now() - min(first)), 1)
           FROM (
               SELECT o.created_at, min(o.created_at) OVER () AS first
               -- OFFSET 0: chunk by chunk by key, or the planner may read all outcomes.
               FROM recent CROSS JOIN LATERAL (
                   SELECT created_at FROM outcome
                   WHERE asset_id BETWEEN first_asset_id AND last_asset_id AND job_id = :job_id
                     AND answered_by IS NULL AND created_at > now() - make_interval(secs => :secs) OFFSET 0) o) s"""
    )
    values = {"job_id": job_id, "chunks": _RECENT_CHUNKS, "secs": _RECENT_SECONDS}
    rate = db.execute(statement, values).scalar_one()
    return float(rate) if rate else None


def last_errors(db: Connection, *, job_id: int) -> list[LastError]:
    """The newest failed asset of each kind."""
    statement = text(
        """SELECT o.error_kind, a.key, coalesce(o.error, '') AS error
           FROM (SELECT DISTINCT error_kind FROM outcome_counter WHERE job_id = :job_id AND error_kind <> '') kind
           CROSS JOIN LATERAL (
               SELECT asset_id, error_kind, error FROM outcome
               WHERE job_id = :job_id AND error_kind = kind.error_kind
               ORDER BY created_at DESC, asset_id DESC LIMIT 1) o
           JOIN asset a ON a.id = o.asset_id ORDER BY o.error_kind"""
    )
    return [LastError(**row) for row in db.execute(statement, {"job_id": job_id}).mappings()]


def stored_over_time(db: Connection, *, job_id: int, chunks: int = 48) -> list[StoredThen]:
    """When outcomes were stored, of at most so many chunks, evenly spread over those that were sent."""
    statement = text(
        """WITH recent AS (
               SELECT first_asset_id FROM chunk
               WHERE job_id = :job_id AND state IN ('running', 'done') AND sent_at IS NOT NULL
               ORDER BY sent_at DESC LIMIT :recent),
           span AS (
               SELECT first_asset_id AS first, greatest(
                   (SELECT max(first_asset_id) FROM recent),
                   coalesce(
                       (SELECT first_asset_id - 1 FROM chunk WHERE job_id = :job_id AND state <> 'done'
                        ORDER BY first_asset_id LIMIT 1),
                       (SELECT first_asset_id FROM chunk WHERE job_id = :job_id
                        ORDER BY first_asset_id DESC LIMIT 1))) AS last
               FROM chunk WHERE job_id = :job_id ORDER BY first_asset_id LIMIT 1),
           chosen AS (
               SELECT DISTINCT c.first_asset_id, c.last_asset_id
               FROM span CROSS JOIN generate_series(0, CAST(:chunks AS int) - 1) AS i
               CROSS JOIN LATERAL (
                   SELECT first_asset_id, last_asset_id FROM chunk
                   WHERE job_id = :job_id AND first_asset_id >= first + i * (last - first) / (:chunks - 1)
                   ORDER BY first_asset_id LIMIT 1) c)
           SELECT date_trunc('second', o.created_at) AS at, count(*) FILTER (WHERE o.error_kind IS NULL) AS labeled,
                  count(*) FILTER (WHERE o.error_kind IS NOT NULL) AS failed
           -- OFFSET 0: chunk by chunk by key, or the planner may read all outcomes.
           FROM chosen CROSS JOIN LATERAL (
               SELECT created_at, error_kind FROM outcome
               WHERE asset_id BETWEEN first_asset_id AND last_asset_id AND job_id = :job_id OFFSET 0) o
           GROUP BY 1 ORDER BY 1"""
    )
    values = {"job_id": job_id, "chunks": chunks, "recent": _RECENT_CHUNKS}
    rows = db.execute(statement, values).mappings()
    return [StoredThen(**row) for row in rows]
