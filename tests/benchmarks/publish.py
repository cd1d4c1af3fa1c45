"""Times publishing beside the bare HTTP import of the same bodies and beside the SDK's import_tasks.

`python tests/benchmarks/publish.py [--json] [--tasks 1000] [--masks 50] [--as auto]`; minutes on two cores. It starts
its own Label Studio on SQLite and its own Postgres. The three take turns in one run, each into a project of its own.
So other load on the machine slows all three equally. Only the ratios count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from label_studio_sdk import LabelStudio as Sdk
from sqlalchemy import Engine, text

from db import jobs
from db.jobs import Job
from db.leases import NewOutcome
from db.migrating import migrate
from db.results import StoredMask
from db.session import open_engine
from db.states import JobState
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.outgoing import MAX_TASKS
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import publish_job
from orchestrator.local.postgres import EmbeddedPostgres
from tests.factories import chunk_ids, claim, finish, make_job, pending, record
from tests.label_studio.server import Server, serve
from tests.watchdog import guard
from workers.masks import encode_counts
from workers.training.scenes import draw_scene

SIZE_HW = (1024, 1024)
SCENES = 20  # drawn once, and used again for later assets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--masks", type=int, default=50)
    parser.add_argument("--as", dest="as_", default="auto", choices=["auto", "polygon", "brush", "rectangle"])
    parser.add_argument("--rounds", type=int, default=2, help="parts that the tasks are published in, taking turns")
    args = parser.parse_args()
    guard()
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "data") as postgres,
        serve(Path(folder) / "label-studio") as server,
    ):
        migrate(postgres.url)
        engine = open_engine(postgres.url)
        found = measure(engine, server, args)
        engine.dispose()
    bars = make_bars(found)
    print(json.dumps({"bars": bars, **found}, indent=2) if args.json else table(bars, found))
    sys.exit(0 if all(bar["holds"] for bar in bars) else 1)


def measure(engine: Engine, server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way for all tasks, our own CPU seconds, and the seconds of publishing again."""
    masks = [list(drawn_masks(seed, args.masks)) for seed in range(SCENES)]
    counts = [args.tasks // args.rounds + (n < args.tasks % args.rounds) for n in range(args.rounds)]
    options = Options(as_=args.as_)
    spent: dict[str, list[float]] = {"ours": [], "cpu": [], "again": [], "bare": [], "sdk": []}
    body_bytes = 0
    with LabelStudio(server.url, server.token) as client:
        projects = {
            way: client.create_project(title=f"benchmark {way}", label_config=label_config(["object"]))
            for way in ("ours", "bare", "sdk", "warm-up")
        }
        # Enough to start the processes that find regions. With --follow they are also running already.
        warm_up = make_labeled_job(engine, MAX_TASKS, masks, source="s3://bucket/warm-up")
        publish_job(engine, client, warm_up, projects["warm-up"].id, options)
        for n, count in enumerate(counts):
            job = make_labeled_job(engine, count, masks, source=f"s3://bucket/part{n}")
            started, cpu = time.perf_counter(), cpu_seconds()
            report = publish_job(engine, client, job, projects["ours"].id, options)
            spent["ours"].append(time.perf_counter() - started)
            spent["cpu"].append(cpu_seconds() - cpu)
            assert report.created == count, report
            started = time.perf_counter()
            again = publish_job(engine, client, job, projects["ours"].id, options)
            spent["again"].append(time.perf_counter() - started)
            assert again.created + again.attached + again.adopted == 0, again

            bodies = list(bodies_of(client, projects["ours"].id, count))
            body_bytes += sum(len(body) for body in bodies)
            spent["bare"].append(post_bare(server, projects["bare"].id, bodies))
            spent["sdk"].append(post_with_sdk(server, projects["sdk"].id, bodies))
            print(f"part {n + 1}: " + ", ".join(f"{way} {s[-1]:.1f} s" for way, s in spent.items()), file=sys.stderr)
    return {
        "tasks": args.tasks,
        "masks_a_task": args.masks,
        "as": args.as_,
        "kb_a_task": round(body_bytes / args.tasks / 1000, 1),
        **{f"{way}_seconds": round(sum(seconds), 2) for way, seconds in spent.items()},
        "load": round(os.getloadavg()[0], 1),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its running child processes."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def drawn_masks(seed: int, count: int) -> Iterator[StoredMask]:
    """Masks of a drawn scene, repeated up to the count with their scores falling."""
    drawn = draw_scene(seed, SIZE_HW).masks
    for n in range(count):
        pixels = np.ascontiguousarray(drawn[n % len(drawn)])
        ys, xs = np.nonzero(pixels)
        box = (int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1)
        yield StoredMask(
            asset_id=0,
            n=n,
            counts=encode_counts(pixels),
            bbox_xywh=box,
            area_px=int(pixels.sum()),
            predicted_iou=0.99 - n / 1000,
            stability_score=0.9,
            label=None,
            prompt=None,
        )


def make_labeled_job(engine: Engine, count: int, masks: Sequence[Sequence[StoredMask]], *, source: str) -> Job:
    made = make_job(engine, keys=count, source=source)
    for chunk_id in chunk_ids(engine, made):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        outcomes = [
            NewOutcome(asset_id=asset.id, width=SIZE_HW[1], height=SIZE_HW[0], masks=of_asset(masks, asset.id))
            for asset in pending(engine, chunk)
        ]
        record(engine, chunk, outcomes)
        finish(engine, chunk)
    with engine.begin() as db:
        db.execute(text("ANALYZE"))
        job = jobs.get_job(db, job_id=made.id)
    assert job is not None
    assert job.state is JobState.DONE
    return job


def of_asset(masks: Sequence[Sequence[StoredMask]], asset_id: int) -> list[StoredMask]:
    names = StoredMask.__slots__
    return [
        StoredMask(**{**{name: getattr(mask, name) for name in names}, "asset_id": asset_id})
        for mask in masks[asset_id % len(masks)]
    ]


def bodies_of(client: LabelStudio, project_id: int, count: int) -> Iterator[bytes]:
    """The newest tasks as the server has them, in requests with as many tasks as ours."""
    newest = sorted((task["id"] for task in client.list_tasks(project_id, include=("id",))), reverse=True)[:count]
    items = [{"filter": "filter:tasks:id", "operator": "greater_or_equal", "type": "Number", "value": min(newest)}]
    tasks = []
    for task in client.list_tasks(project_id, items, whole=True, page_size=20):
        predictions = [{k: p[k] for k in ("model_version", "score", "result")} for p in task["predictions"]]
        tasks.append({"data": task["data"], "predictions": predictions})
    for start in range(0, len(tasks), MAX_TASKS):
        part = tasks[start : start + MAX_TASKS]
        yield json.dumps(part, ensure_ascii=False, separators=(",", ":")).encode()


def post_bare(server: Server, project_id: int, bodies: Sequence[bytes]) -> float:
    headers = {"Authorization": f"Token {server.token}", "Content-Type": "application/json"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=300) as client:
        started = time.perf_counter()
        for body in bodies:
            client.post(f"/api/projects/{project_id}/import?return_task_ids=true", content=body).raise_for_status()
        return time.perf_counter() - started


def post_with_sdk(server: Server, project_id: int, bodies: Sequence[bytes]) -> float:
    sdk = Sdk(base_url=server.url, api_key=server.token, timeout=300)
    requests = [json.loads(body) for body in bodies]
    started = time.perf_counter()
    for request in requests:
        sdk.projects.import_tasks(project_id, request=request, return_task_ids=True, request_options={"max_retries": 0})
    return time.perf_counter() - started


def make_bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    ours = found["ours_seconds"]
    cpu_ms = found["cpu_seconds"] / found["tasks"] * 1000
    return [
        bar("rate, times the bare import's", found["bare_seconds"] / ours, 0.8),
        bar("rate, times the SDK's", found["sdk_seconds"] / ours, 1.5),
        bar("own CPU a task, ms", cpu_ms, 20, most=True),
        bar("publishing again, share of the first time", found["again_seconds"] / ours, 0.05, most=True),
    ]


def bar(name: str, value: float, limit: float, *, most: bool = False) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "bar": limit, "holds": value <= limit if most else value >= limit}


def table(bars: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    lines = [f"{'ok  ' if b['holds'] else 'FAIL'} {b['name']:<45} {b['value']:>8.3g}  (bar {b['bar']:g})" for b in bars]
    return "\n".join([*lines, ", ".join(f"{name} {value}" for name, value in found.items())])


if __name__ == "__main__":
    main()
