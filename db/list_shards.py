"""SQL of a listing in parallel: each range of keys has a cursor of its own. A page and its cursor are one transaction.

The job's row is locked first. So the pages of a job are stored one after the other, and its chunks hold runs of ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.jobs import JOB_COLUMNS, Job
from db.listing import NewAsset, add_assets


@dataclass(frozen=True, slots=True, kw_only=True)
class ListShard:
    """The keys with cursor < key <= upto, which are not listed yet. upto: None is the end of the source."""

    n: int
    cursor: str
    upto: str | None


def open_shards(db: Connection, *, job_id: int) -> list[ListShard]:
    """The ranges of a job that are not listed to their end. At first that is one range with all keys."""
    values = {"job_id": job_id}
    # Not VALUES: the job may be cancelled and deleted since the caller read it.
    first = "INSERT INTO list_shard (job_id, n, cursor) SELECT id, 0, '' FROM job WHERE id = :job_id "
    first += "ON CONFLICT DO NOTHING"
    db.execute(text(first), values)
    statement = "SELECT n, cursor, upto FROM list_shard WHERE job_id = :job_id AND NOT is_done ORDER BY n"
    return [ListShard(**row) for row in db.execute(text(statement), values).mappings()]


def add_shard_page(
    db: Connection,
    *,
    job: Job,
    shard: ListShard,
    assets: Sequence[NewAsset],
    cursor: str,
    skipped: Mapping[str, int],
    is_done: bool,
    chunk_size: int,
) -> Job | None:
    """Store the assets listed after `shard.cursor`, and the new cursor. is_done: the range is at its end.

    If another lister was faster, or the job was cancelled, nothing is stored and the result is None. Otherwise the
    result is the job as it is now. It is listed when all its ranges are.
    """
    now = _lock(db, job_id=job.id)
    if now is None:
        return None
    moved = db.execute(
        text(
            """UPDATE list_shard SET cursor = :cursor, is_done = :is_done
               WHERE job_id = :job_id AND n = :n AND NOT is_done
                 AND cursor = :before AND upto IS NOT DISTINCT FROM :upto"""
        ),
        {"cursor": cursor, "is_done": is_done, **_where(job, shard)},
    )
    if moved.rowcount != 1:
        return None
    left = "SELECT EXISTS (SELECT 1 FROM list_shard WHERE job_id = :job_id AND NOT is_done)"
    complete = is_done and not db.execute(text(left), {"job_id": job.id}).scalar_one()
    return add_assets(
        db, job=now, assets=assets, cursor=None, skipped=skipped, complete=complete, chunk_size=chunk_size
    )


def split_shard(db: Connection, *, job: Job, shard: ListShard, at: str) -> tuple[ListShard, ListShard] | None:
    """Make two ranges of one: up to the key `at`, and behind it. None when the range has changed meanwhile."""
    if shorten_shard(db, job=job, shard=shard, upto=at) is None:
        return None
    n = db.execute(
        text(
            """INSERT INTO list_shard (job_id, n, cursor, upto)
               SELECT :job_id, max(n) + 1, :at, :upto FROM list_shard WHERE job_id = :job_id RETURNING n"""
        ),
        {"at": at, **_where(job, shard)},
    ).scalar_one()
    return ListShard(n=shard.n, cursor=shard.cursor, upto=at), ListShard(n=n, cursor=at, upto=shard.upto)


def shorten_shard(db: Connection, *, job: Job, shard: ListShard, upto: str) -> ListShard | None:
    """Let a range end sooner, because nothing is behind that key. None when the range has changed meanwhile.

    None also when it would end later: the keys there belong to the next range.
    """
    if _lock(db, job_id=job.id) is None:
        return None
    changed = db.execute(
        text(
            """UPDATE list_shard SET upto = :at WHERE job_id = :job_id AND n = :n AND NOT is_done
                 AND cursor = :before AND cursor < :at AND (upto IS NULL OR upto > :at)
                 AND upto IS NOT DISTINCT FROM :upto"""
        ),
        {"at": upto, **_where(job, shard)},
    )
    return ListShard(n=shard.n, cursor=shard.cursor, upto=upto) if changed.rowcount == 1 else None


def _lock(db: Connection, *, job_id: int) -> Job | None:
    """The job's row, locked until the commit. None when the job is not listing."""
    statement = f"SELECT {JOB_COLUMNS} FROM job WHERE id = :id AND state = 'listing' FOR UPDATE"
    row = db.execute(text(statement), {"id": job_id}).mappings().one_or_none()
    return Job.from_row(row) if row else None


def _where(job: Job, shard: ListShard) -> dict[str, object]:
    return {"job_id": job.id, "n": shard.n, "before": shard.cursor, "upto": shard.upto}
