"""Measures the memory and time of exporting a reviewed job: it streams, so more assets must not need more memory.

`python tests/benchmarks/export.py [--json] [--assets 100000]`; minutes on two cores. It starts its own Postgres, fills
it by SQL with labeled assets of five masks, every second one annotated, and runs `maskfleet export --reviewed` on a
tenth of them and on all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine, text

from db.migrating import migrate
from db.session import open_engine
from db.states import AnnotationStatus, Verdict
from orchestrator.local.postgres import EmbeddedPostgres
from tests.factories import make_job
from tests.watchdog import guard
from workers.masks import encode_counts

SIZE_HW = (480, 640)
MASKS = 5
FORMATS = ("coco", "yolo", "label-studio")
# Runs its arguments, then prints their peak memory. Each export needs a child of its own, because a peak never falls.
MEASURE = (
    "import resource, subprocess, sys;"
    "code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--assets", type=int, default=100_000)
    args = parser.parse_args()
    guard()
    rows = []
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data") as postgres:
        migrate(postgres.url)
        engine = open_engine(postgres.url, statement_timeout_seconds=0)
        for count in (args.assets // 10, args.assets):
            job_id = fill(engine, count)
            for file_format in FORMATS:
                out = Path(folder) / f"{file_format}-{count}"
                rows.append({"assets": count, "format": file_format, **export(postgres.url, job_id, file_format, out)})
        engine.dispose()
    print(json.dumps({"rows": rows}, indent=2) if args.json else table(rows))


def fill(engine: Engine, count: int) -> int:
    """A finished, published job of so many assets. Every second asset is annotated as it was predicted."""
    job = make_job(engine, keys=[f"{n // 1000:04}/{n:07}.jpg" for n in range(count)], source=f"s3://bucket/{count}")
    pixels = np.zeros(SIZE_HW, bool)
    pixels[100:200, 100:300] = True
    pixels[140:160, 150:170] = False
    values = {
        "job": job.id,
        "height": SIZE_HW[0],
        "width": SIZE_HW[1],
        "last": MASKS - 1,
        "masks": MASKS,
        "counts": encode_counts(pixels),
        "area": int(pixels.sum()),
        "version": job.model_version,
        "project": count,
        "chosen": AnnotationStatus.CHOSEN,
        "kept": Verdict.KEPT,
    }
    with engine.begin() as db:
        for statement in (
            """INSERT INTO outcome (asset_id, job_id, width, height, mask_count)
               SELECT id, job_id, :width, :height, :masks FROM asset WHERE job_id = :job""",
            """INSERT INTO mask (asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, label)
               SELECT id, n, :counts, 100, 100, 200, 100, :area, 0.9, 'car'
               FROM asset, generate_series(0, :last) AS n WHERE job_id = :job""",
            """INSERT INTO ls_task (server, project_id, asset_uid, uri, task_id)
               SELECT 'http://ls', :project, id::text, key, id FROM asset WHERE job_id = :job""",
            """INSERT INTO ls_prediction (ls_task_id, model_version, asset_id, job_id, state, mask_count)
               SELECT t.id, :version, a.id, a.job_id, 'done', :masks
               FROM asset a JOIN ls_task t ON t.project_id = :project AND t.task_id = a.id WHERE a.job_id = :job""",
            """INSERT INTO ls_annotation (ls_task_id, annotation_id, standing, ground_truth, updated_at, model_version,
                                          asset_id)
               SELECT ls_task_id, asset_id, :chosen, false, now(), :version, asset_id
               FROM ls_prediction WHERE job_id = :job AND asset_id % 2 = 0""",
            """INSERT INTO ls_region (ls_annotation_id, i, verdict, mask_n, label)
               SELECT n.id, i, :kept, i, 'car'
               FROM ls_annotation n JOIN asset a ON a.id = n.asset_id, generate_series(0, :last) AS i
               WHERE a.job_id = :job""",
        ):
            db.execute(text(statement), values)
            db.execute(text("ANALYZE"))  # without it the next statement joins a hundred thousand rows one by one
    return job.id


def export(url: str, job_id: int, file_format: str, out: Path) -> dict[str, Any]:
    """Export annotated assets, and the others as predicted: peak memory of the command, seconds, bytes written."""
    command = [Path(sys.executable).with_name("maskfleet"), "export", str(job_id), "--reviewed", "--min-score", "0.5"]
    command += ["--format", file_format, "--out", out]
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)],
        env={**os.environ, "MASKFLEET_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in out.rglob("*")) if out.is_dir() else out.stat().st_size
    return {
        "peak_rss_mb": round(int(found.stdout) / 1000),
        "seconds": round(seconds, 1),
        "written_mb": round(written / 1e6, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'assets':>8}  {'format':<13} {'peak RSS':>9} {'seconds':>8} {'written':>10}"]
    lines += [
        f"{r['assets']:>8,}  {r['format']:<13} {r['peak_rss_mb']:>6} MB {r['seconds']:>8} {r['written_mb']:>7} MB"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
