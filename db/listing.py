"""SQL of a listing: a page of assets and the listing's cursor are stored in one transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from db.copying import copy_rows
from db.jobs import JOB_COLUMNS, Job
from db.partitions import make_partitions


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAsset:
    """An object as the listing returns it. key: relative to the job's source."""

    key: str
    size_bytes: int
    etag: str


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
    """Store the assets listed after `job.list_cursor`, and the new cursor, in one transaction.

    The cursor is compared before it is set. If another lister was faster, or the job was cancelled, nothing is stored
    and the result is None. Otherwise the result is the job as it is now.
    """
    row = (
        db.execute(
            text(
                f"""UPDATE job SET list_cursor = :cursor, asset_count = asset_count + :n, list_failures = 0,
                           list_failing_since = NULL, list_retry_at = NULL,
                           error = CASE WHEN list_failures > 0 THEN NULL ELSE error END,
                           skipped = CAST(:skipped AS jsonb),
                           listed_at = CASE WHEN :complete THEN now() END,
                           state = CASE WHEN :complete THEN 'running' ELSE state END
                    WHERE id = :id AND state = 'listing' AND list_cursor IS NOT DISTINCT FROM :before
                    RETURNING {JOB_COLUMNS}"""
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


def new_ones(db: Connection, *, job_id: int, assets: Sequence[NewAsset]) -> list[NewAsset]:
    """Those of these assets that the job does not have, each once. For lists that may name a key several times."""
    by_key = {asset.key: asset for asset in assets}
    statement = text("SELECT key FROM asset WHERE job_id = :job_id AND key = ANY(:keys)")
    known = set(db.execute(statement, {"job_id": job_id, "keys": list(by_key)}).scalars())
    return [asset for key, asset in by_key.items() if key not in known]


def _copy_assets(db: Connection, *, job_id: int, assets: Sequence[NewAsset], chunk_size: int) -> None:
    ids = list(
        db.execute(
            text("SELECT nextval('asset_id_seq') FROM generate_series(1, :n)"),
            {"n": len(assets)},
        ).scalars()
    )
    make_partitions(db, last_asset_id=ids[-1])
    rows = ((i, job_id, a.key, a.size_bytes, a.etag) for i, a in zip(ids, assets, strict=True))
    copy_rows(db, "asset (id, job_id, key, size_bytes, etag)", rows)
    runs = [ids[k : k + chunk_size] for k in range(0, len(ids), chunk_size)]
    copy_rows(db, "chunk (job_id, first_asset_id, last_asset_id)", ((job_id, run[0], run[-1]) for run in runs))
