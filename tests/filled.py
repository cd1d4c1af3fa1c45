"""A database as it is after months: one large job, mostly done and partly published and reviewed, and a few small ones.

The rows are made by the server itself, without triggers and foreign keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Engine, text

from db import jobs, partitions, progress
from db.publishing import LsProject
from tests.factories import make_job

CHUNK = 64
_OPEN_CHUNKS = 150  # 20 running, 60 sent, the rest new: as many for each size of the job
SOURCE, VERSION = "s3://bucket/photos", "stub@55555555+00000000"
LS_PROJECT = LsProject("http://label-studio:8080", 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The large job, and ids within it. open_chunk: one that no worker holds."""

    job_id: int
    first_asset_id: int
    assets: int
    open_chunk: int


def fill(engine: Engine, *, assets: int, masks_an_asset: int = 4) -> Filled:
    """Fill an empty, migrated database. A tenth of the assets is published, a tenth of that annotated, 1 % failed."""
    for _ in range(5):
        make_job(engine, keys=130, source="s3://bucket/small")
    job = make_job(engine, keys=0, source=SOURCE, model_version=VERSION)
    with engine.begin() as db:
        db.execute(text("SET LOCAL statement_timeout = 0"))
        db.execute(text("SET LOCAL session_replication_role = replica"))
        first = int(db.execute(text("SELECT nextval('asset_id_seq')")).scalar_one())
        db.execute(text("SELECT setval('asset_id_seq', :last)"), {"last": first + assets})
        db.execute(
            text("UPDATE job SET asset_count = :n, state = 'running', finished_at = NULL WHERE id = :job"),
            {"n": assets, "job": job.id},
        )
        partitions.make_partitions(db, last_asset_id=first + assets)
        values = {
            "job": job.id,
            "first": first,
            "last": first + assets - 1,
            "done": first + assets - _OPEN_CHUNKS * CHUNK,
            "chunk": CHUNK,
            "masks": masks_an_asset,
            "published": first + assets // 10,
            "annotated": first + assets // 100,
            "version": VERSION,
            **LS_PROJECT.values(),
        }
        for statement in (*_JOB, *_LABEL_STUDIO, *_COUNTERS):
            db.execute(text(statement), values)
        open_chunk = db.execute(text("SELECT min(id) FROM chunk WHERE job_id = :job AND state = 'new'"), values)
        found = Filled(job_id=job.id, first_asset_id=first, assets=assets, open_chunk=open_chunk.scalar_one())
        _check(db, found)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text("SET statement_timeout = 0"))
        db.execute(text("VACUUM ANALYZE"))
        # Otherwise the statistics change between two calls, by the rows that were rolled back.
        tables = "SELECT oid::regclass FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        for table in db.execute(text(tables)).scalars().all():
            db.execute(text(f"ALTER TABLE {table} SET (autovacuum_enabled = false)"))
    return found


def _check(db: Connection, filled: Filled) -> None:
    counts = jobs.count_job(db, job_id=filled.job_id)
    assert counts.listed == filled.assets
    assert counts.pending >= (_OPEN_CHUNKS - 20) * CHUNK
    assert progress.complete_up_to(db, job_id=filled.job_id) > filled.first_asset_id


_JOB = (
    """INSERT INTO asset (id, job_id, key, size_bytes, etag)
       SELECT id, :job, to_char(id, 'FM000000000') || '.jpg', 10, md5(id::text)
       FROM generate_series(:first, :last) id""",
    """INSERT INTO chunk (job_id, first_asset_id, last_asset_id, state, token, sent_at, claimed_at, lease_until, worker)
       SELECT :job, a, least(a + :chunk - 1, :last), state, CASE WHEN state IN ('done', 'running') THEN 1 ELSE 0 END,
              CASE WHEN state <> 'new' THEN now() - (:last - a) * interval '10 ms' END, now() - interval '1 minute',
              CASE WHEN state IN ('running', 'done') THEN now() + interval '1 minute' END, 'w' || a % 8
       FROM generate_series(:first, :last, :chunk) a
       CROSS JOIN LATERAL (SELECT CASE WHEN a < :done THEN 'done' WHEN a < :done + 20 * :chunk THEN 'running'
                                       WHEN a < :done + 80 * :chunk THEN 'sent' ELSE 'new' END AS state) s
       ORDER BY a""",
    """INSERT INTO outcome (asset_id, job_id, error_kind, error, width, height, mask_count, segment_ms, worker,
                            created_at)
       SELECT id, :job, CASE WHEN id % 100 = 0 THEN CASE WHEN id % 200 = 0 THEN 'not_image' ELSE 'truncated' END END,
              CASE WHEN id % 100 = 0 THEN 'a reason' END, CASE WHEN id % 100 > 0 THEN 1000 END,
              CASE WHEN id % 100 > 0 THEN 800 END, CASE WHEN id % 100 > 0 THEN :masks ELSE 0 END, 50,
              'w' || id / 64 % 8, now() - (:last - id) * interval '10 ms'
       FROM generate_series(:first, :done - 1) id""",
    """INSERT INTO mask
       SELECT id, n, repeat('0', 60), n, n, 20, 20, 300, 0.5 + n / 10.0, 0.9, 'label ' || n,
              jsonb_build_object('text', 'phrase ' || n)
       FROM generate_series(:first, :done - 1) id CROSS JOIN generate_series(0, :masks - 1) n WHERE id % 100 > 0""",
    """INSERT INTO embedding (address, asset_id, state, size_bytes, stored_at)
       SELECT 'd10efaca/fp16/' || md5(id::text), id, CASE WHEN id % 10 = 0 THEN 'wanted' ELSE 'stored' END, 1000, now()
       FROM generate_series(:first, :annotated) id""",
)

_LABEL_STUDIO = (
    """INSERT INTO ls_task (server, project_id, asset_uid, uri, task_id)
       SELECT :server, :project_id, substr(md5(id::text), 1, 16), 's3://bucket/photos/' || id, id
       FROM generate_series(:first, :published - 1) id WHERE id % 100 > 0""",
    """INSERT INTO ls_prediction (ls_task_id, model_version, asset_id, job_id, state, mask_count, iou_sum, iou_min,
                                  error)
       SELECT id, :version, task_id, :job,
              CASE task_id % 1000 WHEN 1 THEN 'sending' WHEN 2 THEN 'refused' ELSE 'done' END, :masks, :masks, 0.9,
              CASE task_id % 1000 WHEN 2 THEN 'it does not fit' END
       FROM ls_task""",
    """INSERT INTO ls_annotation (ls_task_id, annotation_id, annotator, standing, ground_truth, lead_seconds,
                                  updated_at, model_version, asset_id)
       SELECT id, id, id % 5, 'chosen', false, 12, now(), :version, task_id FROM ls_task
       WHERE task_id < :annotated AND task_id % 1000 > 2""",
    """INSERT INTO ls_region (ls_annotation_id, i, verdict, mask_n, label)
       SELECT a.id, n, CASE WHEN a.id % 3 = 0 AND n = 0 THEN 'deleted' ELSE 'kept' END, n, 'label ' || n
       FROM ls_annotation a CROSS JOIN generate_series(0, :masks - 1) n""",
    "INSERT INTO ls_pull (server, project_id, watermark) VALUES (:server, :project_id, now())",
    """INSERT INTO click (ls_task_id, kind, answered_by, milliseconds, prompt_id)
       SELECT id, 'point', 'decoder', 90, 'p' || id FROM ls_task WHERE task_id < :annotated""",
)

_COUNTERS = (
    """INSERT INTO outcome_counter
       SELECT :job, coalesce(error_kind, ''), slot, count(*), sum(mask_count), 0, count(*) - count(width), 0, 0
       FROM (SELECT *, asset_id / 64 % 32 AS slot FROM outcome WHERE job_id = :job) o
       GROUP BY coalesce(error_kind, ''), slot""",
    """INSERT INTO mask_counter (job_id, kind, value, slot, number)
       SELECT :job, kind, value, slot, sum(assets)::bigint
       FROM (SELECT slot, assets - without_size AS assets FROM outcome_counter
             WHERE job_id = :job AND error_kind = '') o
       CROSS JOIN (
           SELECT 'label' AS kind, 'label ' || n AS value FROM generate_series(0, :masks - 1) n
           UNION ALL SELECT 'class', 'phrase ' || n FROM generate_series(0, :masks - 1) n
           UNION ALL SELECT 'iou_percent', (greatest(0, least(99, floor((0.5 + n / 10.0)::real * 100))))::text
                     FROM generate_series(0, :masks - 1) n
           UNION ALL SELECT 'masks_an_asset', CAST(:masks AS int)::text) v
       GROUP BY kind, value, slot""",
    """INSERT INTO prediction_counter
       SELECT :job, server, project_id, state, 0, count(*), sum(mask_count - left_out), sum(left_out), sum(iou_sum)
       FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id GROUP BY server, project_id, state""",
    """INSERT INTO worker_time
       SELECT :job, worker, min(created_at), max(created_at), 50, sum(segment_ms) FROM outcome WHERE job_id = :job
       GROUP BY worker""",
)
