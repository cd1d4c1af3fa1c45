"""Every SQL statement. Each function takes an open connection, never commits, and returns frozen values or counts.

What holds under concurrency is said where it matters: claims, leases and records are single conditional UPDATEs, so a
message that comes twice, a second dispatcher or a worker that woke too late changes nothing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby, islice
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, RowMapping, text

from db.tables import JobState, PromptMatch

MAX_DEATHS_ALONE = 3  # an asset that kills its process this often while alone is failed with crashed_worker
MAX_TRANSIENT_FAILURES = 6  # with the back-off below a store may be away for about ten minutes
MAX_LIST_FAILURES = 10
_COPY_ROWS = 5000


class LeaseLost(RuntimeError):
    """The chunk is no longer this worker's: its lease expired, or its job was cancelled. Nothing was written."""


# ------------------------------------------------------------------------------------------------------------ values


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A row of `job`."""

    id: int
    name: str
    state: JobState
    source: str
    model: str
    model_version: str
    asked: dict[str, Any]
    fresh: bool
    list_cursor: str | None
    list_failures: int
    asset_count: int
    skipped: dict[str, int]
    error: str | None
    created_at: datetime
    listed_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def from_row(cls, row: RowMapping) -> Job:
        return cls(**{**row, "state": JobState(row["state"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How far a job is. Always true: listed = labeled + failed + pending, and running assets are among the pending.

    without_prompts: labeled without a look, in a job with prompts.
    """

    listed: int
    labeled: int
    failed: int
    running: int
    masks: int
    failed_by_kind: dict[str, int]
    reused: int
    without_prompts: int

    @property
    def pending(self) -> int:
        return self.listed - self.labeled - self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAsset:
    """What the listing knows of an object; key relative to the job's source."""

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A row of `asset` that waits for its outcome. deaths_alone is None unless it is a suspect."""

    id: int
    key: str
    size_bytes: int
    etag: str
    deaths_alone: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedChunk:
    """A chunk whose lease a worker holds, with what its job asked. `token` fences every write."""

    id: int
    token: int
    job_id: int
    first_asset_id: int
    last_asset_id: int
    transient_failures: int
    source: str
    model: str
    model_version: str
    asked: dict[str, Any]
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMask:
    """A row of `mask`; bbox in whole pixels of the upright image."""

    asset_id: int
    n: int
    counts: str
    bbox_xywh: tuple[int, int, int, int]
    area_px: int
    predicted_iou: float
    stability_score: float | None
    label: str | None
    prompt: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOutcome:
    """What a worker found for one asset, with its masks when it is labeled (error_kind None).

    Labeled without a size: not looked at, for its job has no prompt for it. Labeled with an error: some of its prompts
    could not be used.
    """

    asset_id: int
    error_kind: str | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None
    segment_ms: int | None = None
    masks: Sequence[StoredMask] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledAsset:
    """A labeled asset with its masks in the model's order."""

    asset_id: int
    key: str
    size_hw: tuple[int, int]
    segment_ms: int | None = None  # none where an earlier job's masks answered
    masks: list[StoredMask] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAsset:
    asset_id: int
    key: str
    error_kind: str
    error: str


# -------------------------------------------------------------------------------------------------------------- jobs

_JOB = """id, name, state, source, model, model_version, asked, fresh, list_cursor, list_failures, asset_count, skipped,
          error, created_at, listed_at, finished_at"""


def insert_job(
    db: Connection, *, name: str, source: str, model: str, model_version: str, asked: Mapping[str, Any], fresh: bool
) -> Job:
    """Store a new job; its listing begins when a dispatcher sees it."""
    statement = text(
        f"""INSERT INTO job (name, source, model, model_version, asked, fresh)
            VALUES (:name, :source, :model, :model_version, CAST(:asked AS jsonb), :fresh) RETURNING {_JOB}"""
    )
    values = {"name": name, "source": source, "model": model, "model_version": model_version, "fresh": fresh}
    return Job.from_row(db.execute(statement, {**values, "asked": json.dumps(dict(asked))}).mappings().one())


def get_job(db: Connection, *, job_id: int) -> Job | None:
    row = db.execute(text(f"SELECT {_JOB} FROM job WHERE id = :job_id"), {"job_id": job_id}).mappings().one_or_none()
    return Job.from_row(row) if row else None


def list_jobs(db: Connection, *, limit: int) -> list[Job]:
    """The newest jobs first."""
    rows = db.execute(text(f"SELECT {_JOB} FROM job ORDER BY id DESC LIMIT :limit"), {"limit": limit}).mappings()
    return [Job.from_row(row) for row in rows]


def find_unfinished_job(
    db: Connection, *, source: str, model_version: str, asked: Mapping[str, Any], fresh: bool
) -> Job | None:
    """The newest job that was asked exactly this and is not done."""
    statement = text(
        f"""SELECT {_JOB} FROM job WHERE source = :source AND model_version = :model_version AND fresh = :fresh
            AND asked = CAST(:asked AS jsonb) AND state <> 'done' ORDER BY id DESC LIMIT 1"""
    )
    values = {"source": source, "model_version": model_version, "asked": json.dumps(dict(asked)), "fresh": fresh}
    row = db.execute(statement, values).mappings().one_or_none()
    return Job.from_row(row) if row else None


def count_job(db: Connection, *, job_id: int) -> Counts:
    """Count a job's outcomes, exactly and in one snapshot."""
    by_kind = db.execute(
        text(
            """SELECT error_kind, count(*) AS assets, sum(mask_count) AS masks, count(answered_by) AS reused,
                      count(*) - count(width) AS without_size
               FROM outcome WHERE job_id = :job_id GROUP BY error_kind"""
        ),
        {"job_id": job_id},
    ).all()
    listed, running = db.execute(
        text(
            """SELECT (SELECT asset_count FROM job WHERE id = :job_id),
                      (SELECT coalesce(sum(cardinality(in_flight)), 0) FROM chunk
                       WHERE state = 'running' AND job_id = :job_id)"""
        ),
        {"job_id": job_id},
    ).one()
    failed_by_kind = {row.error_kind: row.assets for row in by_kind if row.error_kind is not None}
    return Counts(
        listed=listed,
        labeled=sum(row.assets for row in by_kind if row.error_kind is None),
        failed=sum(failed_by_kind.values()),
        running=int(running),
        masks=int(sum(row.masks for row in by_kind)),
        failed_by_kind=dict(sorted(failed_by_kind.items())),
        reused=sum(row.reused for row in by_kind),
        without_prompts=sum(row.without_size for row in by_kind if row.error_kind is None),
    )


def busy_share(db: Connection, *, job_id: int) -> float | None:
    """The part 0..1 of their time in which a job's workers had the model at work, from each one's first stored batch to
    its last; None where none stored two. Pauses between two runs of a job count as idle."""
    statement = text(
        """SELECT sum(busy) / nullif(sum(wall), 0) FROM (
               SELECT (sum(segment_ms) - sum(segment_ms) FILTER (WHERE created_at = first)) / 1000.0 AS busy,
                      extract(epoch FROM max(created_at) - min(created_at)) AS wall
               FROM (SELECT worker, created_at, coalesce(segment_ms, 0) AS segment_ms,
                            min(created_at) OVER (PARTITION BY worker) AS first
                     FROM outcome WHERE job_id = :job_id AND answered_by IS NULL) AS own
               GROUP BY worker) AS workers"""
    )
    share = db.execute(statement, {"job_id": job_id}).scalar_one()
    return None if share is None else min(float(share), 1.0)


def cancel_job(db: Connection, *, job_id: int) -> bool:
    """Stop a job; a running chunk is given back at its worker's next write. False if it was over already."""
    statement = "UPDATE job SET state = 'cancelled' WHERE id = :job_id AND state IN ('listing', 'running')"
    return db.execute(text(statement), {"job_id": job_id}).rowcount == 1


def resume_job(db: Connection, *, job_id: int) -> bool:
    """Let a cancelled or failed job go on where it stopped. False if it was neither."""
    statement = text(
        """UPDATE job SET state = CASE WHEN listed_at IS NULL THEN 'listing' ELSE 'running' END,
                  error = NULL, list_failures = 0, finished_at = NULL
           WHERE id = :job_id AND state IN ('cancelled', 'failed')"""
    )
    return db.execute(statement, {"job_id": job_id}).rowcount == 1


def retry_failed(db: Connection, *, job_id: int, error_kind: str | None) -> int:
    """Forget the failed outcomes of a job (of one kind, or all), so that those assets run again. Returns how many."""
    values = {"job_id": job_id, "kind": error_kind}
    forgotten = db.execute(
        text(
            """DELETE FROM outcome WHERE job_id = :job_id AND error_kind IS NOT NULL
               AND (CAST(:kind AS text) IS NULL OR error_kind = :kind) RETURNING asset_id"""
        ),
        values,
    ).scalars()
    ids = sorted(forgotten)
    if not ids:
        return 0
    db.execute(text("DELETE FROM suspect WHERE asset_id = ANY(:ids)"), {"ids": ids})
    # A chunk that a worker holds is fenced off by the new token: it would not look at these assets again.
    db.execute(
        text(
            """UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{}', lease_until = NULL,
                      transient_failures = 0, ready_at = NULL
               WHERE job_id = :job_id AND EXISTS (
                   SELECT 1 FROM unnest(CAST(:ids AS bigint[])) id WHERE id BETWEEN first_asset_id AND last_asset_id)"""
        ),
        {"job_id": job_id, "ids": ids},
    )
    db.execute(
        text("UPDATE job SET state = 'running', finished_at = NULL WHERE id = :job_id AND state = 'done'"),
        {"job_id": job_id},
    )
    return len(ids)


def delete_job(db: Connection, *, job_id: int) -> bool:
    """Remove a job with its assets, outcomes and masks."""
    return db.execute(text("DELETE FROM job WHERE id = :job_id"), {"job_id": job_id}).rowcount == 1


# ----------------------------------------------------------------------------------------------------------- prompts

_PROMPT_KEY = {
    PromptMatch.KEY: "a.key",
    PromptMatch.STEM: r"regexp_replace(a.key, '\.[^./]*$', '')",
    PromptMatch.NUMBER: r"ltrim(regexp_replace(a.key, '^.*/|\.[^./]*$', '', 'g'), '0')",
}


def store_prompts(db: Connection, *, job_id: int, rows: Iterable[tuple[str, str]]) -> None:
    """Store a job's prompts: (key, JSON list of prompts) in any number, read as they come.

    Rows of one key are joined in their order.
    """
    db.execute(text("SET LOCAL statement_timeout = 0"))  # a million rows take longer than any other statement may
    db.execute(
        text(
            """CREATE TEMPORARY TABLE new_prompt (n bigint GENERATED ALWAYS AS IDENTITY, key text COLLATE "C",
                                                  prompts jsonb) ON COMMIT DROP"""
        )
    )
    remaining = iter(rows)
    while batch := list(islice(remaining, _COPY_ROWS)):
        _copy(db, "new_prompt (key, prompts)", iter(batch))
    db.execute(
        text(
            """INSERT INTO prompt (job_id, key, prompts)
               SELECT :job_id, key, jsonb_path_query_array(jsonb_agg(prompts ORDER BY n), '$[*][*]')
               FROM new_prompt GROUP BY key"""
        ),
        {"job_id": job_id},
    )


def prompted_assets(db: Connection, *, chunk: ClaimedChunk, match: PromptMatch) -> set[int]:
    """Which of a chunk's assets the job has prompts for."""
    statement = text(
        f"""SELECT a.id FROM asset a JOIN prompt p ON p.job_id = a.job_id AND p.key = {_PROMPT_KEY[match]}
            WHERE a.job_id = :job_id AND a.id BETWEEN :first AND :last AND p.prompts <> '[]'"""
    )
    values = {"job_id": chunk.job_id, "first": chunk.first_asset_id, "last": chunk.last_asset_id}
    return set(db.execute(statement, values).scalars())


def prompts_of(db: Connection, *, asset_id: int, match: PromptMatch) -> list[Any]:
    """What an asset's job asks of it, each a prompt's JSON or {"error": why it cannot be used}."""
    statement = text(
        f"""SELECT p.prompts FROM asset a JOIN prompt p ON p.job_id = a.job_id AND p.key = {_PROMPT_KEY[match]}
            WHERE a.id = :asset_id"""
    )
    found: list[Any] = db.execute(statement, {"asset_id": asset_id}).scalar_one()
    return found


def unmatched_prompts(db: Connection, *, job_id: int, match: PromptMatch, limit: int) -> tuple[int, list[str]]:
    """Prompts whose key no asset of the job has: how many keys, and the first of them."""
    unmatched = f"""FROM prompt p WHERE p.job_id = :job_id AND NOT EXISTS (
                        SELECT 1 FROM asset a WHERE a.job_id = :job_id AND {_PROMPT_KEY[match]} = p.key)"""
    count = int(db.execute(text(f"SELECT count(*) {unmatched}"), {"job_id": job_id}).scalar_one())
    first = text(f"SELECT p.key {unmatched} ORDER BY p.key LIMIT :limit")
    return count, list(db.execute(first, {"job_id": job_id, "limit": limit}).scalars()) if count else []


def assets_with_unused_prompts(db: Connection, *, job_id: int, limit: int) -> tuple[int, list[tuple[str, str]]]:
    """Labeled assets some of whose prompts could not be used: how many, and the first as (key, why)."""
    statement = text(
        """SELECT a.key, o.error, count(*) OVER () AS n FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NULL AND o.error IS NOT NULL ORDER BY a.key LIMIT :limit"""
    )
    rows = db.execute(statement, {"job_id": job_id, "limit": limit}).all()
    return (rows[0].n if rows else 0), [(row.key, row.error) for row in rows]


def classes_of(db: Connection, *, job_id: int) -> dict[str, int]:
    """How many masks a job has of each class of its detector, or of each phrase, the most frequent first."""
    statement = text(
        """SELECT coalesce(m.prompt->>'class', m.prompt->>'text') AS class, count(*) AS n
           FROM asset a JOIN mask m ON m.asset_id = a.id
           WHERE a.job_id = :job_id AND coalesce(m.prompt->>'class', m.prompt->>'text') IS NOT NULL
           GROUP BY 1 ORDER BY 2 DESC, 1"""
    )
    return {row[0]: row.n for row in db.execute(statement, {"job_id": job_id})}


# ----------------------------------------------------------------------------------------------------------- listing


def jobs_to_list(db: Connection) -> list[Job]:
    rows = db.execute(text(f"SELECT {_JOB} FROM job WHERE state = 'listing' ORDER BY id")).mappings()
    return [Job.from_row(row) for row in rows]


def add_assets(
    db: Connection,
    *,
    job: Job,
    assets: Sequence[NewAsset],
    cursor: str | None,
    skipped: Mapping[str, int],
    complete: bool,
    chunk_size: int,
) -> Job | None:
    """Store what was listed after `job.list_cursor`, with the new cursor, in one transaction.

    The cursor is compared before it is set: if another lister was here first, or the job was cancelled, nothing is
    stored and None is returned. Otherwise the job as it is now.
    """
    row = (
        db.execute(
            text(
                f"""UPDATE job SET list_cursor = :cursor, asset_count = asset_count + :n, list_failures = 0,
                           skipped = CAST(:skipped AS jsonb),
                           listed_at = CASE WHEN :complete THEN now() END,
                           state = CASE WHEN :complete THEN 'running' ELSE state END
                    WHERE id = :id AND state = 'listing' AND list_cursor IS NOT DISTINCT FROM :before
                    RETURNING {_JOB}"""
            ),
            {
                "id": job.id,
                "before": job.list_cursor,
                "cursor": cursor if cursor is not None else job.list_cursor,
                "n": len(assets),
                "complete": complete,
                "skipped": json.dumps({k: job.skipped.get(k, 0) + skipped.get(k, 0) for k in {*job.skipped, *skipped}}),
            },
        )
        .mappings()
        .one_or_none()
    )
    if row is None:
        return None
    if assets:
        _copy_assets(db, job_id=job.id, assets=assets, chunk_size=chunk_size)
    return Job.from_row(row)


def _copy_assets(db: Connection, *, job_id: int, assets: Sequence[NewAsset], chunk_size: int) -> None:
    ids = list(
        db.execute(
            text("SELECT nextval('asset_id_seq') FROM generate_series(1, :n)"),
            {"n": len(assets)},
        ).scalars()
    )
    rows = ((i, job_id, a.key, a.size_bytes, a.etag) for i, a in zip(ids, assets, strict=True))
    _copy(db, "asset (id, job_id, key, size_bytes, etag)", rows)
    runs = [ids[k : k + chunk_size] for k in range(0, len(ids), chunk_size)]
    _copy(db, "chunk (job_id, first_asset_id, last_asset_id)", ((job_id, run[0], run[-1]) for run in runs))


def record_list_failure(db: Connection, *, job: Job, error: str, lasting: bool) -> None:
    """Count a failed listing; a lasting error, or too many of the passing ones, fails the job."""
    db.execute(
        text(
            """UPDATE job SET list_failures = list_failures + 1, error = :error,
                      state = CASE WHEN :lasting OR list_failures + 1 >= :most THEN 'failed' ELSE state END
               WHERE id = :id AND state = 'listing'"""
        ),
        {"id": job.id, "error": error, "lasting": lasting, "most": MAX_LIST_FAILURES},
    )


# ---------------------------------------------------------------------------------------------------------- dispatch


def reap(db: Connection) -> int:
    """Take back the chunks whose lease expired, and judge what was in flight in them. Returns how many chunks.

    An asset that was in flight with others becomes a suspect and will run alone; one that dies alone for the third
    time is failed with crashed_worker. Safe to run twice at once: each chunk is locked by one reaper.
    """
    expired = db.execute(
        text(
            """SELECT id, in_flight FROM chunk WHERE state = 'running' AND lease_until < now()
               ORDER BY id FOR UPDATE SKIP LOCKED"""
        )
    ).all()
    for chunk in expired:
        _count_deaths(db, in_flight=chunk.in_flight)
        db.execute(
            text(
                """UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{}', lease_until = NULL
                   WHERE id = :id"""
            ),
            {"id": chunk.id},
        )
    return len(expired)


def _count_deaths(db: Connection, *, in_flight: Sequence[int]) -> None:
    values = {"ids": list(in_flight), "alone": 1 if len(in_flight) == 1 else 0, "most": MAX_DEATHS_ALONE}
    db.execute(
        text(
            """INSERT INTO suspect (asset_id, deaths_alone)
               SELECT id, :alone FROM unnest(CAST(:ids AS bigint[])) id
               WHERE NOT EXISTS (SELECT 1 FROM outcome WHERE asset_id = id)
               ON CONFLICT (asset_id) DO UPDATE SET deaths_alone = suspect.deaths_alone + :alone"""
        ),
        values,
    )
    db.execute(
        text(
            """INSERT INTO outcome (asset_id, job_id, error_kind, error)
               SELECT s.asset_id, a.job_id, 'crashed_worker',
                      'the worker process died ' || s.deaths_alone || ' times with this asset alone in flight'
               FROM suspect s JOIN asset a ON a.id = s.asset_id
               WHERE s.asset_id = ANY(:ids) AND s.deaths_alone >= :most
               ON CONFLICT (asset_id) DO NOTHING"""
        ),
        values,
    )


def expire_lease(db: Connection, *, chunk_id: int, worker: str) -> None:
    """Let the lease of a worker that is known to be dead end now, for the reaper to judge."""
    db.execute(
        text(
            """UPDATE chunk SET lease_until = now() - interval '1 second'
               WHERE id = :id AND worker = :worker AND state = 'running'"""
        ),
        {"id": chunk_id, "worker": worker},
    )


def expire_all_leases(db: Connection) -> None:
    """Let every lease end now. For the embedded run, which knows that no other worker is alive."""
    db.execute(text("UPDATE chunk SET lease_until = now() - interval '1 second' WHERE state = 'running'"))
    db.execute(text("UPDATE chunk SET state = 'new' WHERE state = 'sent'"))


_STALE = "state = 'sent' AND sent_at < now() - make_interval(secs => :secs)"


def has_stale_sent(db: Connection, *, resend_seconds: float) -> bool:
    """Whether a chunk was sent longer ago than this and never claimed: its message waits, or was lost."""
    statement = text(f"SELECT EXISTS (SELECT 1 FROM chunk WHERE {_STALE})")
    return bool(db.execute(statement, {"secs": resend_seconds}).scalar_one())


def resend_stale(db: Connection, *, resend_seconds: float) -> int:
    """Let the stale chunks be sent again; returns how many."""
    return db.execute(text(f"UPDATE chunk SET state = 'new' WHERE {_STALE}"), {"secs": resend_seconds}).rowcount


def take_window(db: Connection, *, window: int) -> list[int]:
    """Mark as sent as many new chunks as the queue has room for, in turn over the jobs; returns their ids.

    Publish them only after the commit: a crash in between is healed by `resend_stale`.
    """
    room = window - int(db.execute(text("SELECT count(*) FROM chunk WHERE state = 'sent'")).scalar_one())
    if room <= 0:
        return []
    statement = text(
        """WITH candidate AS (
               SELECT c.id, row_number() OVER (PARTITION BY j.id ORDER BY c.id) AS turn
               FROM job j CROSS JOIN LATERAL (
                   SELECT id FROM chunk WHERE job_id = j.id AND state = 'new' AND (ready_at IS NULL OR ready_at < now())
                   ORDER BY id LIMIT :room) c
               WHERE j.state IN ('listing', 'running')),
           taken AS (
               SELECT id FROM chunk WHERE id IN (SELECT id FROM candidate ORDER BY turn, id LIMIT :room)
               AND state = 'new' FOR UPDATE SKIP LOCKED)
           UPDATE chunk SET state = 'sent', sent_at = now() FROM taken WHERE chunk.id = taken.id RETURNING chunk.id"""
    )
    return sorted(db.execute(statement, {"room": room}).scalars())


def unsend(db: Connection, *, chunk_ids: Sequence[int]) -> None:
    """Take chunks back whose messages could not be published."""
    db.execute(text("UPDATE chunk SET state = 'new' WHERE id = ANY(:ids) AND state = 'sent'"), {"ids": list(chunk_ids)})


def finish_jobs(db: Connection) -> list[int]:
    """Mark as done the listed jobs without an open chunk; returns their ids."""
    statement = text(
        """UPDATE job SET state = 'done', finished_at = now(), error = NULL WHERE state = 'running'
           AND NOT EXISTS (SELECT 1 FROM chunk WHERE job_id = job.id AND state <> 'done') RETURNING id"""
    )
    return list(db.execute(statement).scalars())


def is_idle(db: Connection) -> bool:
    """True when no job has anything left to list or to run."""
    return not db.execute(text("SELECT EXISTS (SELECT 1 FROM job WHERE state IN ('listing', 'running'))")).scalar_one()


# ------------------------------------------------------------------------------------------------------------ worker


def claim_chunk(db: Connection, *, chunk_id: int, worker: str, lease_seconds: float) -> ClaimedChunk | None:
    """Take the lease of a chunk. None when it is finished, held by a live worker, or its job does not run."""
    row = (
        db.execute(
            text(
                """UPDATE chunk SET state = 'running', token = token + 1, worker = :worker, in_flight = '{}',
                          lease_until = now() + make_interval(secs => :lease)
                   FROM job
                   WHERE chunk.id = :id AND job.id = chunk.job_id AND job.state IN ('listing', 'running')
                     AND chunk.state IN ('new', 'sent')
                   RETURNING chunk.id, chunk.token, job_id, first_asset_id, last_asset_id, transient_failures,
                             source, model, model_version, asked, fresh"""
            ),
            {"id": chunk_id, "worker": worker, "lease": lease_seconds},
        )
        .mappings()
        .one_or_none()
    )
    return ClaimedChunk(**row) if row else None


def answer_from_stored(db: Connection, *, chunk: ClaimedChunk) -> int:
    """Copy the masks of assets that an earlier job labeled: same source, key, etag and model_version.

    Returns how many assets were answered so. Call it under the lease that `claim_chunk` gave, in its transaction.
    """
    statement = text(
        """WITH answered AS (
               INSERT INTO outcome (asset_id, job_id, error, width, height, mask_count, worker, answered_by)
               SELECT DISTINCT ON (a.id) a.id, a.job_id, o.error, o.width, o.height, o.mask_count, o.worker, o.asset_id
               FROM job j
               JOIN asset b ON b.job_id = j.id
               JOIN asset a ON a.key = b.key AND a.etag = b.etag AND a.size_bytes = b.size_bytes
               JOIN outcome o ON o.asset_id = b.id AND o.error_kind IS NULL
               WHERE j.source = :source AND j.model_version = :model_version AND j.id < :job_id
                 AND a.job_id = :job_id AND a.id BETWEEN :first AND :last
               ORDER BY a.id, b.id DESC
               ON CONFLICT (asset_id) DO NOTHING
               RETURNING asset_id, answered_by)
           SELECT asset_id, answered_by FROM answered"""
    )
    values = {
        "source": chunk.source,
        "model_version": chunk.model_version,
        "job_id": chunk.job_id,
        "first": chunk.first_asset_id,
        "last": chunk.last_asset_id,
    }
    answered = db.execute(statement, values).all()
    if answered:
        # A statement of its own: the rows of `outcome` that a mask refers to must be visible.
        db.execute(
            text(
                """INSERT INTO mask SELECT p.new_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou,
                          stability_score, label, prompt
                   FROM unnest(CAST(:new AS bigint[]), CAST(:old AS bigint[])) AS p (new_id, old_id)
                   JOIN mask ON mask.asset_id = p.old_id"""
            ),
            {"new": [row.asset_id for row in answered], "old": [row.answered_by for row in answered]},
        )
    return len(answered)


def pending_assets(db: Connection, *, chunk: ClaimedChunk) -> list[Asset]:
    """The chunk's assets without an outcome, in key order; suspects last."""
    statement = text(
        """SELECT a.id, a.key, a.size_bytes, a.etag, s.deaths_alone
           FROM asset a LEFT JOIN suspect s ON s.asset_id = a.id
           WHERE a.job_id = :job_id AND a.id BETWEEN :first AND :last
             AND NOT EXISTS (SELECT 1 FROM outcome o WHERE o.asset_id = a.id)
           ORDER BY s.asset_id IS NOT NULL, a.id"""
    )
    values = {"job_id": chunk.job_id, "first": chunk.first_asset_id, "last": chunk.last_asset_id}
    return [Asset(**row) for row in db.execute(statement, values).mappings()]


def record(
    db: Connection,
    *,
    chunk: ClaimedChunk,
    outcomes: Sequence[NewOutcome],
    in_flight: Sequence[int],
    worker: str,
    lease_seconds: float,
) -> None:
    """Store outcomes with their masks, say what is in flight next, and extend the lease: all or nothing.

    Raises LeaseLost when the lease is another's by now. An outcome that exists already is kept.
    """
    _hold(
        db, chunk=chunk, set_="in_flight = CAST(:in_flight AS bigint[])", in_flight=list(in_flight), lease=lease_seconds
    )
    if not outcomes:
        return
    inserted = set(
        db.execute(
            text(
                """INSERT INTO outcome (asset_id, job_id, error_kind, error, width, height, mask_count, segment_ms,
                                        worker)
                   SELECT *, :worker FROM unnest(CAST(:asset_id AS bigint[]), CAST(:job_id AS bigint[]),
                       CAST(:error_kind AS text[]), CAST(:error AS text[]), CAST(:width AS int[]),
                       CAST(:height AS int[]), CAST(:mask_count AS int[]), CAST(:segment_ms AS int[]))
                   ON CONFLICT (asset_id) DO NOTHING RETURNING asset_id"""
            ),
            {
                "worker": worker,
                "job_id": [chunk.job_id] * len(outcomes),
                "mask_count": [len(outcome.masks) for outcome in outcomes],
                **{
                    name: [getattr(outcome, name) for outcome in outcomes]
                    for name in ("asset_id", "error_kind", "error", "width", "height", "segment_ms")
                },
            },
        ).scalars()
    )
    _copy(
        db,
        """mask (asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label,
                 prompt)""",
        (_mask_row(mask) for outcome in outcomes if outcome.asset_id in inserted for mask in outcome.masks),
    )


def extend_lease(db: Connection, *, chunk: ClaimedChunk, lease_seconds: float) -> None:
    """Heartbeat. Raises LeaseLost when the chunk is no longer ours or its job was cancelled."""
    _hold(db, chunk=chunk, set_="", lease=lease_seconds)


def finish_chunk(db: Connection, *, chunk: ClaimedChunk) -> None:
    """Mark the chunk done. Raises LeaseLost when it is no longer ours."""
    _hold(db, chunk=chunk, set_="state = 'done', in_flight = '{}'", lease=0)


def release_chunk(db: Connection, *, chunk: ClaimedChunk, transient_error: bool = False) -> None:
    """Give the chunk back with what is left of it; after a transient error not before a growing pause."""
    db.execute(
        text(
            """UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{}', lease_until = NULL,
                      transient_failures = transient_failures + :failed,
                      ready_at = CASE WHEN :failed > 0
                          THEN now() + make_interval(secs => 10 * power(2, least(transient_failures, 6))) END
               WHERE id = :id AND token = :token AND state = 'running'"""
        ),
        {"id": chunk.id, "token": chunk.token, "failed": int(transient_error)},
    )


def note_error(db: Connection, *, job_id: int, error: str) -> None:
    """Let `show` say what keeps a job from going on; forgotten when it is done."""
    db.execute(
        text("UPDATE job SET error = :error WHERE id = :id AND state IN ('listing', 'running')"),
        {"id": job_id, "error": error},
    )


def _hold(db: Connection, *, chunk: ClaimedChunk, set_: str, lease: float, **values: Any) -> None:
    """Write to a chunk only while this worker holds it and its job runs; the row stays locked to the commit."""
    changes = f", {set_}" if set_ else ""
    held = db.execute(
        text(
            f"""UPDATE chunk SET lease_until = now() + make_interval(secs => :lease){changes}
                WHERE id = :id AND token = :token AND state = 'running'
                  AND EXISTS (SELECT 1 FROM job WHERE id = chunk.job_id AND state IN ('listing', 'running'))"""
        ),
        {"id": chunk.id, "token": chunk.token, "lease": lease, **values},
    )
    if held.rowcount != 1:
        raise LeaseLost(f"chunk {chunk.id} of job {chunk.job_id} is no longer held with token {chunk.token}")


def _mask_row(mask: StoredMask) -> tuple[Any, ...]:
    scores = (mask.area_px, mask.predicted_iou, mask.stability_score)
    prompt = None if mask.prompt is None else json.dumps(mask.prompt, ensure_ascii=False)
    return (mask.asset_id, mask.n, mask.counts, *mask.bbox_xywh, *scores, mask.label, prompt)


# ----------------------------------------------------------------------------------------------------------- results


def labeled_assets(db: Connection, *, job_id: int, page: int = 500) -> Iterator[LabeledAsset]:
    """Stream a job's labeled assets in key order with their masks, in bounded memory; not those without a prompt in a
    job with prompts, which were not looked at.

    Pages by key, so that it holds no cursor and no long snapshot: an outcome recorded meanwhile may appear.
    """
    after = ""
    while True:
        rows = db.execute(
            text(
                """SELECT a.id, a.key, o.width, o.height FROM asset a JOIN outcome o ON o.asset_id = a.id
                   WHERE a.job_id = :job_id AND a.key > :after AND o.error_kind IS NULL AND o.width IS NOT NULL
                   ORDER BY a.key LIMIT :page"""
            ),
            {"job_id": job_id, "after": after, "page": page},
        ).all()
        masks = masks_of(db, asset_ids=[row.id for row in rows])
        for row in rows:
            yield LabeledAsset(
                asset_id=row.id, key=row.key, size_hw=(row.height, row.width), masks=masks.get(row.id, [])
            )
        if len(rows) < page:
            return
        after = rows[-1].key


def sample_labeled(db: Connection, *, job_id: int, limit: int, page: int = 10) -> Iterator[LabeledAsset]:
    """Stream at most `limit` of a job's labeled assets, spread evenly over them, in the order they were listed."""
    rows = db.execute(
        text(
            """WITH labeled AS (
                   SELECT asset_id, width, height, segment_ms, row_number() OVER (ORDER BY asset_id) - 1 AS i,
                          count(*) OVER () AS n
                   FROM outcome WHERE job_id = :job_id AND error_kind IS NULL AND width IS NOT NULL)
               SELECT a.id, a.key, l.width, l.height, l.segment_ms FROM labeled l JOIN asset a ON a.id = l.asset_id
               WHERE i = 0 OR i * :limit / n > (i - 1) * :limit / n ORDER BY a.id"""
        ),
        {"job_id": job_id, "limit": limit},
    ).all()
    for start in range(0, len(rows), page):
        masks = masks_of(db, asset_ids=[row.id for row in rows[start : start + page]])
        for row in rows[start : start + page]:
            yield LabeledAsset(
                asset_id=row.id,
                key=row.key,
                size_hw=(row.height, row.width),
                segment_ms=row.segment_ms,
                masks=masks.get(row.id, []),
            )


def masks_per_asset(db: Connection, *, job_id: int) -> dict[int, int]:
    """How many labeled assets have each number of masks, by rising number."""
    statement = text(
        """SELECT mask_count, count(*) FROM outcome
           WHERE job_id = :job_id AND error_kind IS NULL AND width IS NOT NULL
           GROUP BY mask_count ORDER BY mask_count"""
    )
    return {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id})}


def predicted_iou_percents(db: Connection, *, job_id: int) -> dict[int, int]:
    """How many masks have each predicted IoU in whole percents, cut off and kept within 0..99, by rising percent."""
    statement = text(
        """SELECT greatest(0, least(99, floor(predicted_iou * 100)))::int AS percent, count(*)
           FROM mask JOIN outcome USING (asset_id)
           WHERE job_id = :job_id AND predicted_iou <> 'NaN' GROUP BY percent ORDER BY percent"""
    )
    return {row[0]: row[1] for row in db.execute(statement, {"job_id": job_id})}


def failed_assets(db: Connection, *, job_id: int, limit: int | None = None) -> list[FailedAsset]:
    """A job's failed assets in key order."""
    statement = text(
        """SELECT a.id AS asset_id, a.key, o.error_kind, coalesce(o.error, '') AS error
           FROM outcome o JOIN asset a ON a.id = o.asset_id
           WHERE o.job_id = :job_id AND o.error_kind IS NOT NULL ORDER BY a.key LIMIT :limit"""
    )
    return [FailedAsset(**row) for row in db.execute(statement, {"job_id": job_id, "limit": limit}).mappings()]


def labels_of(db: Connection, *, job_id: int) -> list[str]:
    """The distinct labels of a job's masks, in alphabetical order; masks without one are not counted."""
    statement = text(
        """SELECT DISTINCT label FROM mask JOIN outcome USING (asset_id)
           WHERE job_id = :job_id AND label IS NOT NULL ORDER BY label"""
    )
    return list(db.execute(statement, {"job_id": job_id}).scalars())


def masks_of(db: Connection, *, asset_ids: Sequence[int]) -> dict[int, list[StoredMask]]:
    """The masks of these assets in the model's order; assets without any are not in it."""
    rows = db.execute(
        text(
            """SELECT asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score,
                      label, prompt FROM mask WHERE asset_id = ANY(:ids) ORDER BY asset_id, n"""
        ),
        {"ids": list(asset_ids)},
    )
    masks = (
        StoredMask(
            asset_id=row.asset_id,
            n=row.n,
            counts=row.counts,
            bbox_xywh=(row.bbox_x, row.bbox_y, row.bbox_w, row.bbox_h),
            area_px=row.area_px,
            predicted_iou=row.predicted_iou,
            stability_score=row.stability_score,
            label=row.label,
            prompt=row.prompt,
        )
        for row in rows
    )
    return {asset_id: list(group) for asset_id, group in groupby(masks, key=attrgetter("asset_id"))}


def _copy(db: Connection, into: str, rows: Iterator[tuple[Any, ...]]) -> None:
    """COPY rows into a table: 6 times as fast as inserting them, measured with mask rows."""
    buffer = io.StringIO()
    for row in rows:
        buffer.write("\t".join([_copy_field(value) for value in row]))
        buffer.write("\n")
    if buffer.tell():
        buffer.seek(0)
        cursor: Any = db.connection.cursor()
        cursor.copy_expert(f"COPY {into} FROM STDIN", buffer)
        cursor.close()


def _copy_field(value: Any) -> str:
    """One field of COPY's text format. COCO counts may hold a backslash, keys anything but NUL."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return str(value)
