"""SQL of `delete`: a job goes in short transactions, and what is interrupted can go on.

Masks and outcomes of an asset go in one transaction. So whoever copies an earlier job's masks sees all of them or none.
The job's chunks go last: those that are left say what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.partitions import Partition, partitions

_PROMPTS = 5000
_LOCK_WAIT = "2s"  # whoever reads masks waits no longer than this for a partition that is emptied


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedChunks:
    """What one transaction deleted. addresses: of stored embeddings, whose bytes are to be deleted after the commit."""

    assets: int
    masks: int
    addresses: list[str]


def begin_deletion(db: Connection, *, job_id: int) -> bool:
    """Let no command find the job any more, and nothing work on it. False if it is listing or running."""
    statement = text(
        """UPDATE job SET deleted_at = coalesce(deleted_at, now())
           WHERE id = :job_id AND state NOT IN ('listing', 'running')"""
    )
    return db.execute(statement, {"job_id": job_id}).rowcount == 1


def begun_deletions(db: Connection) -> list[int]:
    """The jobs of which a deletion was begun and not ended."""
    return list(db.execute(text("SELECT id FROM job WHERE deleted_at IS NOT NULL ORDER BY id")).scalars())


class SharedPartition(RuntimeError):
    """Another job has assets in a partition that is to be emptied. Nothing of it was deleted."""


_OTHERS = text("SELECT EXISTS (SELECT 1 FROM asset WHERE id >= :first AND id < :bound AND job_id <> :job_id)")


def whole_partitions(db: Connection, *, job_id: int) -> list[Partition]:
    """The partitions of masks that belong to this job alone, as far as listings have committed."""
    first, last, given = db.execute(
        text(
            """SELECT min(first_asset_id), max(last_asset_id), (SELECT last_value FROM asset_id_seq)
               FROM chunk WHERE job_id = :job_id"""
        ),
        {"job_id": job_id},
    ).one()
    if first is None:
        return []
    touched = [p for p in partitions(db) if p.first <= last and p.bound > first and p.bound <= given]
    return [
        p
        for p in touched
        if not db.execute(_OTHERS, {"first": p.first, "bound": p.bound, "job_id": job_id}).scalar_one()
    ]


def empty_partition(db: Connection, *, job_id: int, partition: Partition) -> None:
    """Delete a job's outcomes in a partition that is the job's alone, and all masks there at once.

    Raises DBAPIError when the partition is in use for longer than two seconds, and SharedPartition.
    """
    values = {"first": partition.first, "bound": partition.bound, "job_id": job_id}
    db.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'"))
    db.execute(text("DELETE FROM outcome WHERE asset_id >= :first AND asset_id < :bound AND job_id = :job_id"), values)
    db.execute(text(f"LOCK TABLE {partition.table} IN ACCESS EXCLUSIVE MODE"))
    # Ids are given before their assets are committed: a listing may have had some here that `whole_partitions` could
    # not see. From now on nobody can write their masks.
    if db.execute(_OTHERS, values).scalar_one():
        raise SharedPartition(f"{partition.table} has assets of another job")
    db.execute(text(f"TRUNCATE {partition.table}"))


def delete_chunks(db: Connection, *, job_id: int, most: int) -> DeletedChunks | None:
    """Delete the next chunks of a job, at most so many, with all there is of their assets. None when none is left."""
    chunks = db.execute(
        text(
            """SELECT id, first_asset_id, last_asset_id FROM chunk WHERE job_id = :job_id
               ORDER BY first_asset_id LIMIT :most FOR UPDATE"""
        ),
        {"job_id": job_id, "most": most},
    ).all()
    if not chunks:
        return None
    values = {"job_id": job_id, "first": chunks[0].first_asset_id, "last": chunks[-1].last_asset_id}
    ids = list(
        db.execute(
            text("SELECT id FROM asset WHERE id BETWEEN :first AND :last AND job_id = :job_id ORDER BY id"), values
        ).scalars()
    )
    of_them = {"ids": ids}
    masks = db.execute(text("DELETE FROM mask WHERE asset_id = ANY(:ids)"), of_them).rowcount
    db.execute(text("DELETE FROM outcome WHERE asset_id = ANY(:ids)"), of_them)
    kept = db.execute(text("DELETE FROM embedding WHERE asset_id = ANY(:ids) RETURNING address, state"), of_them)
    addresses = [row.address for row in kept if row.state == "stored"]
    db.execute(text("DELETE FROM same_bytes WHERE asset_id = ANY(:ids)"), of_them)
    db.execute(text("DELETE FROM asset WHERE id = ANY(:ids)"), of_them)
    db.execute(text("DELETE FROM chunk WHERE id = ANY(:chunks)"), {"chunks": [chunk.id for chunk in chunks]})
    return DeletedChunks(assets=len(ids), masks=masks, addresses=addresses)


def delete_prompts(db: Connection, *, job_id: int) -> int:
    """Delete the next prompts of a job. Returns how many; 0 when none is left."""
    statement = text(
        """DELETE FROM prompt WHERE job_id = :job_id AND key = ANY(ARRAY(
               SELECT key FROM prompt WHERE job_id = :job_id ORDER BY key LIMIT :most))"""
    )
    return db.execute(statement, {"job_id": job_id, "most": _PROMPTS}).rowcount


def end_deletion(db: Connection, *, job_id: int) -> bool:
    """Delete the job's own row and its counters. Call it when no chunk and no prompt is left."""
    db.execute(text("DELETE FROM prediction_counter WHERE job_id = :job_id"), {"job_id": job_id})
    statement = text("DELETE FROM job WHERE id = :job_id AND deleted_at IS NOT NULL")
    return db.execute(statement, {"job_id": job_id}).rowcount == 1
