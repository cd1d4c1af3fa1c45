"""Cost follows what is asked, not how much is stored: looks, writing masks, deleting a job.

    .venv/bin/python tests/benchmarks/scale.py [--section looks|writing|delete] [--json]

looks: each at 10,000 and at 1,000,000 assets, by turns, in one run. writing: outcomes with 100 masks each by one and by
four writers, against bare COPY of the same lines into a bare table, by turns. delete: a job of 1,000,000 masks, and how
long another job's writes and reads wait meanwhile. Postgres is that of the wheel, without fsync.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from sqlalchemy import Connection, Engine, text

from db import jobs, leases, queue
from db.leases import ClaimedChunk
from db.migrating import migrate
from db.session import open_engine
from orchestrator.jobs.delete import delete_job
from orchestrator.jobs.reports import read_report
from orchestrator.label_studio.publish import _look
from orchestrator.local.postgres import EmbeddedPostgres
from orchestrator.terminal.jobs import read_job
from tests.factories import chunk_ids, make_job
from tests.filled import LS_PROJECT, Filled, fill
from tests.measured import COUNTS, Bar, outcome_with, report

SMALL, LARGE = 10_000, 1_000_000
TURNS = 30
MASKS, BATCH, LARGE_BATCH = 100, 4, 16  # masks an asset; assets that one commit stores


@contextmanager
def database(*, filled_with: int = 0) -> Iterator[tuple[Engine, Filled | None]]:
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data", durable=False) as server:
        migrate(server.url)
        engine = open_engine(server.url, pool_size=10)
        yield engine, fill(engine, assets=filled_with) if filled_with else None
        engine.dispose()


# looks


def looks() -> list[Bar]:
    with database(filled_with=SMALL) as (small, of_small), database(filled_with=LARGE) as (large, of_large):
        assert of_small is not None
        assert of_large is not None
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in LOOKS}
        for _ in range(TURNS):
            for name, look in LOOKS.items():
                for found, engine, filled in zip(times[name], (small, large), (of_small, of_large), strict=True):
                    found.append(look(engine, filled))
    bars = []
    for name, (at_small, at_large) in times.items():
        ratio = statistics.median(at_large) / statistics.median(at_small)
        bars.append(Bar(name=f"{name}, ms at {LARGE:,} assets", value=1000 * statistics.median(at_large)))
        bars.append(Bar(name=f"{name}, times {SMALL:,} assets", value=ratio, bar=1.5, holds=ratio <= 1.5))
    return bars


def _timed(do: Callable[[Engine, Filled], object]) -> Callable[[Engine, Filled], float]:
    def run(engine: Engine, filled: Filled) -> float:
        began = time.perf_counter()
        do(engine, filled)
        return time.perf_counter() - began

    return run


def _show(engine: Engine, filled: Filled) -> None:
    job, counts = read_job(engine, filled.job_id)
    with engine.begin() as db:
        read_report(db, job, counts, with_failed=False)


def _poll(engine: Engine, filled: Filled) -> None:
    with engine.begin() as db:
        job = jobs.get_job(db, job_id=filled.job_id)
    assert job is not None
    seen = _SEEN.get(id(engine)) or _look(engine, LS_PROJECT, job, None)
    _SEEN[id(engine)] = seen
    _look(engine, LS_PROJECT, job, seen)


_SEEN: dict[int, Any] = {}


def _undone(do: Callable[[Connection, Filled], object]) -> Callable[[Engine, Filled], float]:
    """Time one call in a transaction that is rolled back."""

    def run(engine: Engine, filled: Filled) -> float:
        with engine.connect() as db, db.begin() as transaction:
            prepared = _prepare(db, filled) if do is _record else filled
            began = time.perf_counter()
            do(db, prepared)  # type: ignore[arg-type]
            took = time.perf_counter() - began
            transaction.rollback()
        return took

    return run


def _claim(db: Connection, filled: Filled) -> ClaimedChunk:
    chunk = leases.claim_chunk(db, chunk_id=filled.open_chunk, worker="w", lease_seconds=60)
    assert chunk is not None
    leases.answer_from_stored(db, chunk=chunk)
    leases.pending_assets(db, chunk=chunk)
    return chunk


def _prepare(db: Connection, filled: Filled) -> Any:
    chunk = _claim(db, filled)
    return chunk, [outcome_with(n, masks=10) for n in range(chunk.first_asset_id, chunk.first_asset_id + BATCH)]


def _record(db: Connection, prepared: Any) -> None:
    chunk, outcomes = prepared
    leases.record(db, chunk=chunk, outcomes=outcomes, in_flight=[], worker="w", lease_seconds=60)


LOOKS: dict[str, Callable[[Engine, Filled], float]] = {
    "watch's look": _timed(lambda engine, filled: read_job(engine, filled.job_id)),
    "show": _timed(_show),
    "follow's poll": _timed(_poll),
    "claim, with its assets": _undone(_claim),
    "record": _undone(_record),
    "top_up": _undone(lambda db, _: queue.take_window(db, window=64)),
}


# writing


def writing() -> list[Bar]:
    bars = []
    with database() as (engine, _):
        url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with engine.begin() as db:
            columns = (
                "asset_id, n, counts, bbox_x, bbox_y, bbox_w, bbox_h, area_px, predicted_iou, stability_score, label"
            )
            db.execute(text(f"CREATE TABLE bare AS SELECT {columns}, prompt FROM mask"))
        for writers, batch in ((1, BATCH), (4, BATCH), (1, LARGE_BATCH), (4, LARGE_BATCH)):
            ours, bare = [], []
            for _ in range(3):
                bare.append(_rate(_copy_bare, url, writers=writers, batch=batch))
                ours.append(_rate(_write_job, url, writers=writers, batch=batch))
            ratio = statistics.median(ours) / statistics.median(bare)
            who = f"{writers} writer{'s' if writers > 1 else ''}, {batch} assets a commit"
            bars.append(Bar(name=f"masks a second, {who}", value=statistics.median(ours)))
            bars.append(Bar(name=f"bare COPY, {who}", value=statistics.median(bare)))
            bars.append(Bar(name=f"part of bare COPY, {who}", value=ratio, bar=0.5, holds=ratio >= 0.5))
        with engine.begin() as db:
            heap, index, rows = db.execute(
                text(
                    """SELECT sum(pg_relation_size(inhrelid)), sum(pg_indexes_size(inhrelid)),
                              (SELECT count(*) FROM mask)
                       FROM pg_inherits WHERE inhparent = 'mask'::regclass"""
                )
            ).one()
        bars.append(Bar(name=f"bytes a mask with {len(COUNTS)} bytes of counts, table", value=float(heap / rows)))
        bars.append(Bar(name="bytes a mask, index", value=float(index / rows)))
    return bars


ASSETS_A_WRITER = 512


def _rate(write: Callable[[str, int, int, Barrier], float], url: str, *, writers: int, batch: int) -> float:
    """Masks a second of all writers together. A writer is a process, as a worker is; it returns its own seconds."""
    context = get_context("fork")
    with context.Manager() as shared, ProcessPoolExecutor(writers, mp_context=context) as pool:
        all_ready = shared.Barrier(writers)
        seconds = list(pool.map(write, [url] * writers, range(writers), [batch] * writers, [all_ready] * writers))
    return sum(ASSETS_A_WRITER * MASKS / taken for taken in seconds)


def _write_job(url: str, n: int, size: int, all_ready: Barrier) -> float:
    engine = open_engine(url)
    keys = ASSETS_A_WRITER + size
    job = make_job(engine, keys=keys, chunk_size=keys, source=f"s3://b/{n}", fresh=True)
    with engine.begin() as db:
        chunk = leases.claim_chunk(db, chunk_id=chunk_ids(engine, job)[0], worker=f"w{n}", lease_seconds=600)
    assert chunk is not None
    outcomes = [outcome_with(k, masks=MASKS) for k in range(chunk.first_asset_id, chunk.last_asset_id + 1)]
    began = 0.0
    for start in range(0, len(outcomes), size):
        if start == size:  # a worker's connection lives for hours: its first batch, which loads the catalog, is no rate
            all_ready.wait()
            began = time.perf_counter()
        batch = outcomes[start : start + size]
        with engine.begin() as db:
            leases.record(db, chunk=chunk, outcomes=batch, in_flight=[], worker=f"w{n}", lease_seconds=600)
    with engine.begin() as db:
        leases.finish_chunk(db, chunk=chunk)
    return time.perf_counter() - began


def _copy_bare(url: str, n: int, size: int, all_ready: Barrier) -> float:
    engine = open_engine(url)
    line = _line()
    batch = "".join(line % (k, m) for k in range(size) for m in range(MASKS)).encode()
    began = 0.0
    for turn in range(1 + ASSETS_A_WRITER // size):
        if turn == 1:
            all_ready.wait()
            began = time.perf_counter()
        with engine.begin() as db:
            cursor: Any = db.connection.cursor()
            cursor.copy_expert("COPY bare FROM STDIN", io.BytesIO(batch))
    return time.perf_counter() - began


def _line() -> str:
    prompt = json.dumps({"points": [[512.5, 341.5, 1]]})
    return f"%d\t%d\t{COUNTS}\t10\t10\t100\t100\t5000\t0.9123\t0.9512\tcar\t{prompt}\n"


# delete


def delete() -> list[Bar]:
    with database(filled_with=LARGE // 4) as (engine, filled):
        assert filled is not None
        with engine.begin() as db:
            jobs.cancel_job(db, job_id=filled.job_id)
            masks = db.execute(text("SELECT count(*) FROM mask")).scalar_one()
        stop, waits = threading.Event(), list[float]()
        beside = threading.Thread(target=_work_beside, args=(engine, stop, waits))
        beside.start()
        began = time.perf_counter()
        delete_job(engine, filled.job_id, store=None)
        seconds = time.perf_counter() - began
        stop.set()
        beside.join()
    return [
        Bar(name=f"seconds to delete {masks:,} masks of {filled.assets:,} assets", value=seconds),
        Bar(name="longest write or read of another job meanwhile, seconds", value=max(waits)),
        Bar(name="median of them, seconds", value=statistics.median(waits)),
    ]


def _work_beside(engine: Engine, stop: threading.Event, waits: list[float]) -> None:
    """Claim, record and read masks of another job, over and over, and note how long each took."""
    job = make_job(engine, keys=4000, chunk_size=BATCH, source="s3://b/beside", fresh=True)
    for chunk_id in chunk_ids(engine, job):
        if stop.is_set():
            return
        began = time.perf_counter()
        with engine.begin() as db:
            chunk = leases.claim_chunk(db, chunk_id=chunk_id, worker="w", lease_seconds=60)
        assert chunk is not None
        outcomes = [outcome_with(n, masks=10) for n in range(chunk.first_asset_id, chunk.last_asset_id + 1)]
        with engine.begin() as db:
            leases.record(db, chunk=chunk, outcomes=outcomes, in_flight=[], worker="w", lease_seconds=60)
        read_job(engine, job.id)
        waits.append(time.perf_counter() - began)


SECTIONS: dict[str, Callable[[], list[Bar]]] = {"looks": looks, "writing": writing, "delete": delete}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, action="append")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    bars = [bar for name in args.section or SECTIONS for bar in SECTIONS[name]()]
    report(bars, as_json=args.json)


if __name__ == "__main__":
    main()
