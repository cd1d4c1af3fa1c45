"""Chunks while a worker holds them: claimed, extended, recorded, finished, released.

Every write carries the lease's token. A worker that lost its lease gets LeaseLost, and writes nothing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from db import counters
from db.copied_outcomes import copy_outcomes, remember_bytes
from db.mask_rows import copy_masks
from db.results import StoredMask
from db.states import MaskCount

MAX_TRANSIENT_FAILURES = 6  # with the growing pause below, a store may be away for about ten minutes


_IS_HELD = """id = :id AND token = :token AND state = 'running'
              AND EXISTS (SELECT 1 FROM job WHERE id = chunk.job_id AND state IN ('listing', 'running'))"""


class LeaseLost(RuntimeError):
    """This worker no longer holds the chunk: its lease expired, or its job was cancelled. Nothing was written."""


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
    """A chunk that a worker holds by a lease, with its job's request. Every write must carry `token`."""

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
class NewOutcome:
    """What a worker found for one asset. A labeled asset has error_kind None, and its masks.

    Labeled without a size: its job has no prompt for it, so its image was not read. Labeled with an error: some of its
    prompts could not be used. etag: of the bytes that were read, when they are not those that were listed.
    answered_by: an asset with the same bytes, whose masks these are. bytes_keys: of `db.same_bytes`.
    """

    asset_id: int
    error_kind: str | None = None
    error: str | None = None
    width: int | None = None
    height: int | None = None
    segment_ms: int | None = None
    etag: str | None = None
    answered_by: int | None = None
    bytes_keys: Sequence[str] = ()
    masks: Sequence[StoredMask] = ()


def claim_chunk(
    db: Connection, *, chunk_id: int, worker: str, lease_seconds: float, pid: int | None = None
) -> ClaimedChunk | None:
    """Take the lease of a chunk. pid: of this process, with which `queue.expire_lease` can end the lease.

    None when it is finished, when a live worker holds it, when its job does not run, or when its job's prompts are not
    matched yet.
    """
    row = (
        db.execute(
            text(
                """UPDATE chunk SET state = 'running', token = token + 1, worker = :worker, worker_pid = :pid,
                          in_flight = '{}', claimed_at = now(), lease_until = now() + make_interval(secs => :lease)
                   FROM job
                   WHERE chunk.id = :id AND job.id = chunk.job_id AND job.state IN ('listing', 'running')
                     AND (job.asked->>'prompts' IS NULL OR job.matched IS NOT NULL)
                     AND chunk.state IN ('new', 'sent')
                   RETURNING chunk.id, chunk.token, job_id, first_asset_id, last_asset_id, transient_failures,
                             source, model, model_version, asked, fresh"""
            ),
            {"id": chunk_id, "worker": worker, "pid": pid, "lease": lease_seconds},
        )
        .mappings()
        .one_or_none()
    )
    return ClaimedChunk(**row) if row else None


_EARLIER = """SELECT DISTINCT ON (a.id) a.id, CAST(NULL AS text) AS etag, o.asset_id AS from_id
             FROM job j
             CROSS JOIN (SELECT * FROM asset WHERE job_id = :job_id AND id BETWEEN :first AND :last OFFSET 0) a
             JOIN asset b ON b.job_id = j.id AND a.key = b.key
             JOIN outcome o ON o.asset_id = b.id AND o.error_kind IS NULL AND a.etag = coalesce(o.etag, b.etag)
               AND (o.etag IS NOT NULL OR a.size_bytes = b.size_bytes)
             WHERE j.source = :source AND j.model_version = :model_version AND j.id < :job_id AND j.deleted_at IS NULL
               -- The same prompt file may mean an asset in one listing and not in another.
               AND ARRAY(SELECT key FROM prompt_match WHERE asset_id = a.id ORDER BY key)
                 = ARRAY(SELECT key FROM prompt_match WHERE asset_id = b.id ORDER BY key)
             ORDER BY a.id, b.id DESC"""


def answer_from_stored(db: Connection, *, chunk: ClaimedChunk) -> int:
    """Copy the masks of assets that an earlier job labeled: same source, key, etag and model_version.

    The etag is that of the bytes which the earlier job really read, and they may not be those that it listed. Returns
    how many assets were answered this way. Call it in the transaction of `claim_chunk`, under its lease. It is one
    statement, with one snapshot: an earlier job that is being deleted is seen with all masks of an outcome, or none.
    """
    values = {
        "source": chunk.source,
        "model_version": chunk.model_version,
        "job_id": chunk.job_id,
        "first": chunk.first_asset_id,
        "last": chunk.last_asset_id,
    }
    return len(copy_outcomes(db, _EARLIER, values))


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


_OUTCOME_FIELDS = ("asset_id", "error_kind", "error", "width", "height", "segment_ms", "answered_by", "etag")
# One statement for the chunk and its outcomes: it saves a way to the server and back in every batch.
_RECORD = text(
    f"""WITH held AS (
            UPDATE chunk SET lease_until = now() + make_interval(secs => :lease),
                   in_flight = CAST(:in_flight AS bigint[])
            WHERE {_IS_HELD} RETURNING id),
        written AS (
            INSERT INTO outcome (asset_id, error_kind, error, width, height, segment_ms, answered_by, etag, mask_count,
                                 job_id, worker)
            SELECT o.*, :job_id, :worker
            FROM held CROSS JOIN unnest(CAST(:asset_id AS bigint[]), CAST(:error_kind AS text[]),
                CAST(:error AS text[]), CAST(:width AS int[]), CAST(:height AS int[]), CAST(:segment_ms AS int[]),
                CAST(:answered_by AS bigint[]), CAST(:etag AS text[]), CAST(:mask_count AS int[])) AS o
            ON CONFLICT (asset_id) DO NOTHING RETURNING asset_id)
        SELECT EXISTS (SELECT FROM held), ARRAY(SELECT asset_id FROM written)"""
)


def record(
    db: Connection,
    *,
    chunk: ClaimedChunk,
    outcomes: Sequence[NewOutcome],
    in_flight: Sequence[int],
    worker: str,
    lease_seconds: float,
) -> None:
    """Store outcomes with their masks, mark the assets in flight next, and extend the lease: all or nothing.

    Raises LeaseLost when this worker no longer holds the lease. An outcome that already exists is kept.
    """
    values = {"in_flight": list(in_flight), "lease": lease_seconds, "worker": worker, "job_id": chunk.job_id}
    values |= {name: [getattr(outcome, name) for outcome in outcomes] for name in _OUTCOME_FIELDS}
    values["mask_count"] = [len(outcome.masks) for outcome in outcomes]
    held, inserted = db.execute(_RECORD, {"id": chunk.id, "token": chunk.token, **values}).one()
    if not held:
        raise LeaseLost(_lost(chunk))
    inserted = set(inserted)
    kept = [outcome for outcome in outcomes if outcome.asset_id in inserted]
    copy_masks(db, masks=(mask for outcome in kept for mask in outcome.masks))
    remember_bytes(db, keys=[(key, outcome.asset_id) for outcome in kept for key in outcome.bytes_keys])
    if numbers := _mask_numbers(kept):
        counters.add_masks(db, job_id=chunk.job_id, numbers=numbers)


def extend_lease(db: Connection, *, chunk: ClaimedChunk, lease_seconds: float) -> None:
    """Heartbeat. Raises LeaseLost when this worker no longer holds the chunk, or the job was cancelled."""
    _hold(db, chunk=chunk, set_="", lease=lease_seconds)


def finish_chunk(db: Connection, *, chunk: ClaimedChunk) -> None:
    """Mark the chunk done. Raises LeaseLost when this worker no longer holds it."""
    _hold(db, chunk=chunk, set_="state = 'done', in_flight = '{}'", lease=0)


def release_chunk(
    db: Connection, *, chunk: ClaimedChunk, transient_error: bool = False, most_failures: int | None = None
) -> None:
    """Release the chunk. After a transient error it becomes ready again after 10 s, 20 s, 40 s ... (at most 640 s).

    most_failures: what its count of transient failures may reach by this one, for an error that tried no asset.
    """
    db.execute(
        text(
            """UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{}', lease_until = NULL,
                      transient_failures =
                          greatest(transient_failures, least(transient_failures + :failed, CAST(:most AS int))),
                      ready_at = CASE WHEN :failed > 0
                          THEN now() + make_interval(secs => 10 * power(2, least(transient_failures, 6))) END
               WHERE id = :id AND token = :token AND state = 'running'"""
        ),
        {
            "id": chunk.id,
            "token": chunk.token,
            "failed": int(transient_error),
            "most": most_failures,  # least() leaves a null out
        },
    )


def _hold(db: Connection, *, chunk: ClaimedChunk, set_: str, lease: float) -> None:
    """Write to a chunk only while this worker holds it and its job runs. The row stays locked until the commit."""
    changes = f", {set_}" if set_ else ""
    held = db.execute(
        text(f"UPDATE chunk SET lease_until = now() + make_interval(secs => :lease){changes} WHERE {_IS_HELD}"),
        {"id": chunk.id, "token": chunk.token, "lease": lease},
    )
    if held.rowcount != 1:
        raise LeaseLost(_lost(chunk))


def _lost(chunk: ClaimedChunk) -> str:
    return f"chunk {chunk.id} of job {chunk.job_id} is no longer held with token {chunk.token}"


def _mask_numbers(outcomes: Sequence[NewOutcome]) -> dict[tuple[MaskCount, str], int]:
    """What `mask_counter` counts of these outcomes."""
    masks = [mask for outcome in outcomes for mask in outcome.masks]
    looked_at = [o for o in outcomes if o.error_kind is None and o.width is not None]
    prompts = [mask.prompt for mask in masks if mask.prompt is not None]
    names = [p.get("text") if p.get("class") is None else p["class"] for p in prompts]
    found: dict[MaskCount, Counter[Any]] = {
        MaskCount.LABEL: Counter([mask.label for mask in masks]),
        MaskCount.CLASS: Counter(names),
        MaskCount.IOU_PERCENT: _iou_percents([mask.predicted_iou for mask in masks]),
        MaskCount.MASKS_AN_ASSET: Counter([len(outcome.masks) for outcome in looked_at]),
        MaskCount.SAME_BYTES: Counter(["" for outcome in outcomes if outcome.answered_by is not None]),
    }
    return {
        (kind, str(value)): number
        for kind, values in found.items()
        for value, number in values.items()
        if value is not None
    }


def _iou_percents(ious: Sequence[float]) -> Counter[str]:
    """Rounded down, from 0 to 99, as SQL does with the REAL that is stored."""
    found: Counter[str] = Counter()
    for stored, number in Counter(array("f", ious)).items():
        found["NaN" if stored != stored else str(int(min(max(stored * 100, 0), 99)))] += number
    return found
