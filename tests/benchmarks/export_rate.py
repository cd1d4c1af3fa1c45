"""Exports 1,000,000 masks to COCO and Parquet, by one and two processes, against pyarrow writing ready rows.

    .venv/bin/python tests/benchmarks/export_rate.py [--assets 200000] [--json]

Five masks of 192 bytes of counts an asset, in parts of an eighth of the assets. Ready rows are the rows of the Parquet
export as Python values: one process makes columns of them and writes them with the export's own compression, without
Postgres. Postgres is that of the wheel, without fsync, and has been read once before.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine, text

from db import jobs, results
from db.jobs import Job
from db.migrating import migrate
from db.session import open_engine
from orchestrator.export.formats import ExportFormat, Question
from orchestrator.export.mask_tables import GROUP_ROWS, MASKS
from orchestrator.export.parquet import export_parquet
from orchestrator.export.selection import Selection
from orchestrator.local.postgres import EmbeddedPostgres
from tests.factories import make_job
from tests.measured import COUNTS, Bar, report

MASKS_AN_ASSET = 5
PARTS = 8


def fill(engine: Engine, assets: int) -> Job:
    job = make_job(engine, keys=[f"{n // 1000:04}/{n:07}.jpg" for n in range(assets)], source="s3://bucket/photos")
    with engine.begin() as db:
        for statement in (
            """INSERT INTO outcome (asset_id, job_id, width, height, mask_count)
               SELECT id, job_id, 1024, 768, :masks FROM asset WHERE job_id = :job""",
            # Other counts in each: equal ones would be compressed to nothing.
            """INSERT INTO mask (asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou,
                                 stability_score, label, prompt)
               SELECT id, n, md5(id::text || n) || substr(:counts, 33), 10, 10, 100, 100, 5000, 0.9123, 0.9512, 'car',
                      '{"points": [[512.5, 341.5, 1]]}'
               FROM asset, generate_series(0, :masks - 1) AS n WHERE job_id = :job""",
        ):
            db.execute(text(statement), {"job": job.id, "masks": MASKS_AN_ASSET, "counts": COUNTS})
            db.execute(text("ANALYZE"))
    return job


def export(
    engine: Engine, job: Job, file_format: ExportFormat, out: Path, *, processes: int, part_assets: int
) -> float:
    """Seconds of an export in parts."""
    question = Question(
        file_format=file_format,
        part_assets=part_assets,
        selection=Selection(page=file_format.page),
        processes=processes,
    )
    began = time.perf_counter()
    with engine.connect() as db:
        question.write(db, job, jobs.count_job(db, job_id=job.id), str(out))
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def ready_rows(engine: Engine, job: Job, out: Path, masks: int) -> float:
    """Masks a second of writing rows that are there, in row groups of the export's size."""
    with engine.connect() as db:
        assets = islice(results.bare_assets(db, job_id=job.id), GROUP_ROWS // MASKS_AN_ASSET)
        export_parquet(db, job, Selection(), out, assets)
    ready = pq.read_table(out.parent / "masks" / out.name, schema=MASKS)
    rows = list(zip(*(column.to_pylist() for column in ready.columns), strict=True))
    began = time.perf_counter()
    with pq.ParquetWriter(out, MASKS, compression="zstd") as writer:
        for _ in range(0, masks, len(rows)):
            columns = zip(zip(*rows, strict=True), MASKS, strict=True)
            writer.write_table(pa.Table.from_arrays([pa.array(v, field.type) for v, field in columns], schema=MASKS))
    return masks / (time.perf_counter() - began)


def measure(assets: int) -> list[Bar]:
    masks = assets * MASKS_AN_ASSET
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data", durable=False) as server:
        migrate(server.url)
        engine = open_engine(server.url, statement_timeout_seconds=0)
        job = fill(engine, assets)
        ready = ready_rows(engine, job, Path(folder) / "ready.parquet", masks)
        bars = [Bar(name="pyarrow, ready rows, masks a second", value=ready)]
        for file_format in (ExportFormat.PARQUET, ExportFormat.COCO):
            rates = {}
            for processes in (1, 2):
                out = Path(folder) / f"{file_format}-{processes}"
                seconds = export(engine, job, file_format, out, processes=processes, part_assets=assets // PARTS)
                rates[processes] = masks / seconds
                part = rates[processes] / ready
                name = f"{file_format}, {processes} process{'es' if processes > 1 else ''}"
                bars.append(Bar(name=f"{name}, masks a second", value=rates[processes]))
                bars.append(Bar(name=f"{name}, part of ready rows", value=part, bar=0.4, holds=part >= 0.4))
            bars.append(Bar(name=f"{file_format}, two processes against one", value=rates[2] / rates[1]))
        engine.dispose()
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=int, default=200_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bars = measure(args.assets)
    report(bars, as_json=args.json)


if __name__ == "__main__":
    main()
