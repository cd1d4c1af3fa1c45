"""Times the work around the model: listing keys, and moving images through a worker, each beside its plain loop.

`python tests/benchmarks/throughput.py [--json] [--keys 1000000] [--images 48]`; minutes on two cores. It starts its
own Postgres, its own Redis if one is installed, and its own S3 endpoint that lists in pages.
"""

from __future__ import annotations

import argparse
import http.server
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
import psutil
import psycopg2
import redis
from PIL import Image
from pycocotools import mask as coco_mask
from sqlalchemy import Engine, text

from db import jobs
from db.migrating import migrate
from db.session import open_engine, psycopg2_url
from db.settings import Settings, settings
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import Deployment, draw_pictures
from tests.redis_server import redis_program, serve_redis
from tests.watchdog import guard
from workers.engine.boxed_runs import encode_runs, take_runs
from workers.images.pixels import RgbImage
from workers.masks import BoolMask, Mask

PAGE = 1000
MASKS_AN_IMAGE = 100
SIZE_HW = (1024, 1024)
ROUNDS = 3
IDLE_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--deployed-keys", type=int, default=100_000, help="listed by a deployment with Redis")
    parser.add_argument("--images", type=int, default=48)
    args = parser.parse_args()
    guard()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data") as server:
        migrate(server.url)
        bars = measure_deployment(server.url, args.deployed_keys, Path(folder))
        bars += [*measure_ingest(server.url, args.keys), *measure_pipeline(server.url, args.images, Path(folder))]
    if args.json:
        print(json.dumps({"bars": bars}, indent=2))
    else:
        for bar in bars:
            verdict = "" if bar["bar"] is None else ("holds" if bar["holds"] else "DOES NOT HOLD")
            print(f"{bar['name']:58} {bar['value']:>12,} {bar['bar'] or '':>8} {verdict}")


def bar(name: str, value: float, least: float | None = None, most: float | None = None) -> dict[str, Any]:
    limit = least if least is not None else most
    holds = (least is None or value >= least) and (most is None or value <= most)
    return {"name": name, "value": round(value, 2), "bar": limit, "holds": holds}


# -------------------------------------------------------------------------------------------------------- deployment


def measure_deployment(url: str, keys: int, folder: Path) -> list[dict[str, Any]]:
    """Redis while keys are listed and nobody works on them; then the load of a deployment with nothing to do.

    The model is the tests' stub. Without a Redis nothing is measured.
    """
    program = redis_program()
    if program is None:
        print("no redis-server: the deployment is not measured", file=sys.stderr)
        return []
    logs = folder / "logs"
    logs.mkdir()
    engine = open_engine(url)
    with serve_redis(program, logs) as broker, redis.Redis.from_url(f"{broker}/0") as client, paging_store(keys) as s3:
        deployment = Deployment(
            database_url=url,
            broker_url=f"{broker}/0",
            folder=logs,
            engine=engine,
            settings={"MASKFLEET_S3_ENDPOINT": s3, "MASKFLEET_CHUNK_SIZE": "64", "MASKFLEET_LEASE_SECONDS": "60"},
        )
        try:
            empty_bytes = int(client.info("memory")["used_memory"])
            job_id = deployment.submit("s3://b/p")
            deployment.start("dispatch")
            most_bytes = most_memory_until(client, lambda: deployment.read(job_id)[0].state != "listing")
            deployment.call("cancel", str(job_id))
            deployment.start("worker", "--devices", "cpu")
            done = deployment.submit(draw_pictures(folder / "pictures", 200))
            deployment.wait_until_done(done)
            idle_percent = cpu_percent_of(deployment.started, IDLE_SECONDS)
            left = [key.decode() for key in client.scan_iter() if not key.startswith(b"_kombu.binding")]
        finally:
            deployment.stop_all()
            engine.dispose()
    return [
        bar(f"Redis while {keys:,} keys are listed, most MB", most_bytes / 1e6, most=5),
        bar("Redis with nothing in it, MB", empty_bytes / 1e6),
        bar(f"idle deployment, CPU % of a core over {IDLE_SECONDS} s", idle_percent, most=1),
        bar("keys left in Redis by finished chunks", len(left), most=0),
    ]


def most_memory_until(client: redis.Redis, is_over: Callable[[], bool]) -> int:
    most_bytes = 0
    while not is_over():
        most_bytes = max(most_bytes, int(client.info("memory")["used_memory"]))
        time.sleep(0.05)
    return most_bytes


def cpu_percent_of(commands: Sequence[subprocess.Popen[bytes]], seconds: float) -> float:
    """CPU of these commands and of all their child processes, in percent of a core."""
    time.sleep(5)  # the work after the last chunk
    roots = [psutil.Process(command.pid) for command in commands]
    processes = [part for root in roots for part in (root, *root.children(recursive=True))]

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = spent()
    time.sleep(seconds)
    return 100 * (spent() - before) / seconds


# ------------------------------------------------------------------------------------------------------------ ingest


class PagingStore(http.server.BaseHTTPRequestHandler):
    """ListObjectsV2 of a bucket with `keys` objects; nothing else."""

    protocol_version = "HTTP/1.1"
    keys = 0

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        first = int(query["continuation-token"][0]) if "continuation-token" in query else 0
        if "start-after" in query:
            first = int(query["start-after"][0].rsplit("/", 1)[1].removesuffix(".jpg")) + 1
        last = min(first + PAGE, self.keys)
        contents = "".join(
            f"<Contents><Key>p/2026/{n:09}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{n:032x}&quot;</ETag><Size>204800</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for n in range(first, last)
        )
        more = last < self.keys
        token = f"<NextContinuationToken>{last}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>p/</Prefix>'
            f"<KeyCount>{last - first}</KeyCount><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _serve_store(keys: int, port: Any) -> None:
    PagingStore.keys = keys
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PagingStore)
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def paging_store(keys: int) -> Iterator[str]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve_store, args=(keys, there), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{here.recv()}"
    process.terminate()


INGEST = """
import resource, sys, threading, time
from db import jobs
from db.session import open_engine
from db.settings import settings
from orchestrator.jobs.request import Request, submit_job
from workers.storage.source import open_source

what = sys.argv[1]
started = time.perf_counter()
if what == "list":
    source = open_source("s3://b/p", s3_endpoint=settings().s3_endpoint)
    assert sum(len(page.objects) for page in source.list()) == int(sys.argv[2])
else:
    from orchestrator.jobs import dispatch
    engine = open_engine(settings().database_url.get_secret_value())
    with engine.begin() as db:
        job = submit_job(db, Request(source="s3://b/p", model="sam_vit_b"))
    started = time.perf_counter()
    dispatch.top_up = lambda engine: 0 if what == "ingest" else None
    while True:
        with engine.begin() as db:
            now = jobs.get_job(db, job_id=job.id)
            if now.listed_at:
                break
        dispatch.tick(engine)
    assert now.asset_count == int(sys.argv[2])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure_ingest(database_url: str, keys: int) -> list[dict[str, Any]]:
    """Listing into Postgres beside the bare listing loop. Each runs in a process of its own, in turn."""
    listing, ingesting, rss = [], [], []
    with paging_store(keys) as endpoint:
        environment = os.environ | {"MASKFLEET_S3_ENDPOINT": endpoint, "MASKFLEET_DATABASE_URL": database_url}
        environment["MASKFLEET_BROKER_URL"] = f"filesystem://{tempfile.mkdtemp()}"
        for _ in range(ROUNDS if keys <= 200_000 else 1):
            for what, seconds in (("list", listing), ("ingest", ingesting)):
                command = [sys.executable, "-P", "-c", INGEST, what, str(keys)]
                out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                seconds.append(float(out.split()[0]))
                rss.append(float(out.split()[1]))
    bare, ours = keys / statistics.median(listing), keys / statistics.median(ingesting)
    return [
        bar("bare listing, keys a second", bare),
        bar("listing into Postgres, keys a second", ours),
        bar("listing into Postgres / bare listing", ours / bare, least=0.5),
        bar("peak memory of the lister, MB", max(rss), most=300),
    ]


# ---------------------------------------------------------------------------------------------------------- pipeline


def draw_masks(count: int) -> list[BoolMask]:
    """Ready masks like a model's: blobs of many sizes in a 1 MP frame, (H, W) bool."""
    rng = np.random.default_rng(7)
    rows, columns = np.ogrid[: SIZE_HW[0], : SIZE_HW[1]]
    masks = []
    for _ in range(count):
        y, x = rng.integers(0, SIZE_HW[0]), rng.integers(0, SIZE_HW[1])
        radius = rng.integers(12, 160)
        angle = np.arctan2(rows - y, columns - x)
        wavy = radius * (1 + 0.2 * np.sin(rng.integers(3, 12) * angle))
        masks.append((rows - y) ** 2 + (columns - x) ** 2 < wavy**2)
    return masks


class ReadyMasks:
    """A model that has its masks ready as pixels. Its only cost is their run lengths, made by the engine's encoder."""

    def __init__(self, masks: Sequence[BoolMask]) -> None:
        self._masks = masks

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[None]:
        return [None] * len(images)

    def automatic(self, image: RgbImage, embedding: None, params: Any) -> list[Mask]:
        return [_encode(pixels) for pixels in self._masks]


def _encode(pixels: BoolMask) -> Mask:
    """A mask's run lengths from its box, as the mask engine makes them."""
    x, y, width, height = cv2.boundingRect(pixels.view(np.uint8))
    runs = take_runs(np.ascontiguousarray(pixels[y : y + height, x : x + width].T), (x, y))
    return Mask(
        counts=encode_runs(runs, SIZE_HW),
        size_hw=SIZE_HW,
        bbox_xywh=(x, y, width, height),
        area_px=runs.area_px,
        predicted_iou=0.9,
    )


def plain_loop(url: str, folder: Path, names: Sequence[str], masks: Sequence[BoolMask]) -> None:
    """The loop that a person writes in an afternoon: read, decode, encode, insert row by row, commit each image."""
    dsn = psycopg2_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = psycopg2.connect(dsn)
    cursor = connection.cursor()
    cursor.execute("CREATE TABLE IF NOT EXISTS plain_mask (image text, n int, counts text, bbox float[], area int)")
    for name in names:
        np.asarray(Image.open(folder / name).convert("RGB"))
        for n, pixels in enumerate(masks):
            rle = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
            cursor.execute(
                "INSERT INTO plain_mask VALUES (%s, %s, %s, %s, %s)",
                (name, n, rle["counts"].decode(), coco_mask.toBbox(rle).tolist(), int(coco_mask.area(rle))),
            )
        connection.commit()
    connection.close()


def our_worker(engine: Engine, folder: Path, masks: Sequence[BoolMask]) -> None:
    """One worker's run of one chunk, with everything except Celery's message."""
    from orchestrator.jobs.dispatch import tick
    from orchestrator.jobs.request import Request, submit_job
    from workers.detectors import detector as detectors
    from workers.running.chunk import run_chunk
    from workers.running.worker import Worker

    with engine.begin() as db:
        job = submit_job(db, Request(source=str(folder), model="sam_vit_b", fresh=True))
    tick(engine)
    with engine.begin() as db:
        chunk_ids = list(db.execute(text("SELECT id FROM chunk WHERE job_id = :id"), {"id": job.id}).scalars())
    worker = Worker(
        name="benchmark",
        engine=engine,
        settings=Settings(),
        load_model=lambda _: ReadyMasks(masks),
        load_detector=lambda asked: detectors.load(asked, "cpu"),
        draining=lambda: False,
        on_hang=lambda: None,
    )
    for chunk_id in chunk_ids:
        run_chunk(worker, chunk_id)
    with engine.begin() as db:
        counts = jobs.count_job(db, job_id=job.id)
    assert (counts.pending, counts.failed, counts.masks) == (0, 0, counts.listed * len(masks)), counts


def measure_pipeline(database_url: str, images: int, folder: Path) -> list[dict[str, Any]]:
    """Images a second of a worker and of the plain loop, in turn, with 100 ready masks for each image of 1 MP."""
    os.environ["MASKFLEET_DATABASE_URL"] = database_url
    os.environ["MASKFLEET_BROKER_URL"] = f"filesystem://{folder / 'broker'}"
    settings.cache_clear()
    source, masks = folder / "images", draw_masks(MASKS_AN_IMAGE)
    source.mkdir()
    noise = np.random.default_rng(3).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    for n in range(images):
        Image.fromarray(np.roll(noise, n, axis=0)).resize(SIZE_HW[::-1]).save(source / f"{n:04}.jpg", quality=75)
    names = sorted(file.name for file in source.iterdir())
    engine = open_engine(database_url)
    plain: list[float] = []
    ours: list[float] = []
    for _ in range(ROUNDS):
        plain.append(_timed(lambda: plain_loop(database_url, source, names, masks)))
        ours.append(_timed(lambda: our_worker(engine, source, masks)))
    engine.dispose()
    slow, fast = images / statistics.median(plain), images / statistics.median(ours)
    return [
        bar("plain loop, images a second", slow),
        bar("one worker, images a second", fast),
        bar("one worker / plain loop", fast / slow, least=3),
    ]


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
