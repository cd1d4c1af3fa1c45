"""Replays the protocol of many workers against a real Postgres, and says what saturates first.

    .venv/bin/python tests/benchmarks/simulation.py [--workers 8 16 32 64] [--rate 2] [--masks 100] [--seconds 20]
                                                    [--database URL] [--json]

A simulated worker does all that a real one does in Postgres (take_window, claim, heartbeat, record, finish) and sleeps
where a real one has its GPU at work: --rate assets a second each, with --masks masks an asset. It computes nothing, so
one machine has many of them. Without --database the Postgres of the wheel is used, with fsync; it takes 50 connections,
so workers share 40, as behind a pooler. With --database: an empty database of a server of one's own.

Each level of workers has a job of its own. The books are compared at its end: every asset has one outcome at most, and
listed = labeled + failed + pending.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue as queues
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
from sqlalchemy import Engine, text

from db import jobs, leases, queue
from db.leases import ClaimedChunk, NewOutcome
from db.migrating import migrate
from db.session import open_engine
from orchestrator.local.postgres import EmbeddedPostgres
from tests.factories import make_job
from tests.measured import outcome_with

BATCH, CHUNK = 4, 64
HEARTBEAT_SECONDS = 20.0  # a third of the usual lease
LEASE_SECONDS = 60.0
PROCESSES = 4
CONNECTIONS = 40
REACHED = 0.9  # of the wanted rate: below it something is saturated


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one simulated worker does. rate: assets a second of its GPU. masks: of an asset."""

    workers: int
    rate: float
    masks: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """What was seen with one number of workers. Milliseconds are the 95th percentile of a whole transaction.

    postgres_cores, client_cores: CPU seconds a second. wal_mb: a second. waits: the commonest wait events of busy
    connections, with their share of all looks.
    """

    workers: int
    wanted: float
    reached: float
    claim_ms: float
    record_ms: float
    heartbeat_ms: float
    postgres_cores: float
    client_cores: float
    wal_mb: float
    commits: float
    waits: dict[str, float]
    says: str


@dataclass(slots=True)
class Worker:
    """One simulated worker: a thread. Its seconds are kept by what they were for."""

    engine: Engine
    name: str
    load: Load
    messages: Any
    until: float
    window: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"claim": [], "record": [], "heartbeat": []})
    assets: int = 0
    beat_at: float = 0.0

    def run(self) -> None:
        time.sleep(random.random() * BATCH / self.load.rate)  # not in step
        while time.monotonic() < self.until:
            self._top_up()
            try:
                chunk_id = self.messages.get(timeout=0.2)
            except queues.Empty:
                continue
            chunk = self._timed("claim", self._claim, chunk_id)
            if chunk is not None:
                self._work_through(chunk)

    def _top_up(self) -> None:
        with self.engine.begin() as db:
            queue.reap(db)
            jobs.finish_jobs(db)
        with self.engine.begin() as db:
            taken = queue.take_window(db, window=self.window)
        for chunk_id in taken.all:
            self.messages.put(chunk_id)

    def _claim(self, chunk_id: int) -> tuple[ClaimedChunk, list[int]] | None:
        with self.engine.begin() as db:
            chunk = leases.claim_chunk(db, chunk_id=chunk_id, worker=self.name, lease_seconds=LEASE_SECONDS)
            if chunk is None:
                return None
            leases.answer_from_stored(db, chunk=chunk)
            return chunk, [asset.id for asset in leases.pending_assets(db, chunk=chunk)]

    def _work_through(self, claimed: tuple[ClaimedChunk, list[int]]) -> None:
        chunk, assets = claimed
        self.beat_at = time.monotonic() + HEARTBEAT_SECONDS
        for start in range(0, len(assets), BATCH):
            ids = assets[start : start + BATCH]
            ready_at = time.monotonic() + len(ids) / self.load.rate
            outcomes = [outcome_with(asset_id, masks=self.load.masks) for asset_id in ids]
            self._sleep_until(ready_at, chunk)
            ahead = assets[start + BATCH : start + 3 * BATCH]
            self._timed("record", self._record, chunk, outcomes, ahead)
            self.assets += len(ids)
            if time.monotonic() > self.until:
                with self.engine.begin() as db:
                    leases.release_chunk(db, chunk=chunk)
                return
        with self.engine.begin() as db:
            leases.finish_chunk(db, chunk=chunk)

    def _sleep_until(self, moment: float, chunk: ClaimedChunk) -> None:
        while (left := moment - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            if time.monotonic() > self.beat_at:
                self._timed("heartbeat", self._beat, chunk)
                self.beat_at = time.monotonic() + HEARTBEAT_SECONDS

    def _beat(self, chunk: ClaimedChunk) -> None:
        with self.engine.begin() as db:
            leases.extend_lease(db, chunk=chunk, lease_seconds=LEASE_SECONDS)

    def _record(self, chunk: ClaimedChunk, outcomes: Sequence[NewOutcome], ahead: Sequence[int]) -> None:
        with self.engine.begin() as db:
            leases.record(
                db, chunk=chunk, outcomes=outcomes, in_flight=ahead, worker=self.name, lease_seconds=LEASE_SECONDS
            )

    def _timed(self, what: str, do: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        found = do(*arguments)
        self.seconds[what].append(time.perf_counter() - began)
        return found


_MESSAGES: list[Any] = []  # the queue of this process


def _take(messages: Any) -> None:
    _MESSAGES[:] = [messages]


def run_part(url: str, load: Load, part: int, workers: int) -> dict[str, Any]:
    """Some of the workers, in a process of their own. Returns their seconds, assets and CPU seconds."""
    engine = open_engine(url, pool_size=max(min(workers, CONNECTIONS // PROCESSES), 1))
    engine.pool._max_overflow = 0  # type: ignore[attr-defined]
    until = time.monotonic() + load.seconds
    window = queue.window_of(workers=load.workers, jobs=1, most=max(64, 2 * load.workers))
    crew = [
        Worker(engine=engine, name=f"w{part}.{n}", load=load, messages=_MESSAGES[0], until=until, window=window)
        for n in range(workers)
    ]
    threads = [threading.Thread(target=worker.run) for worker in crew]
    cpu = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    return {
        "assets": sum(worker.assets for worker in crew),
        "cpu": time.process_time() - cpu,
        **{name: [s for worker in crew for s in worker.seconds[name]] for name in ("claim", "record", "heartbeat")},
    }


def run_level(engine: Engine, url: str, load: Load) -> Level:
    wanted = int(load.workers * load.rate * load.seconds)
    with engine.begin() as db:
        db.execute(text("UPDATE job SET state = 'cancelled' WHERE state IN ('listing', 'running')"))
    # A source of its own: otherwise the assets of an earlier level would answer.
    job = make_job(
        engine, keys=2 * wanted + CHUNK * load.workers, chunk_size=CHUNK, source=f"s3://bucket/{time.monotonic_ns()}"
    )
    shares = [load.workers // PROCESSES + (n < load.workers % PROCESSES) for n in range(PROCESSES)]
    forked = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(PROCESSES, mp_context=forked, initializer=_take, initargs=(forked.Queue(),)) as pool,
        _watched(engine) as seen,
    ):
        began = time.monotonic()
        parts = [pool.submit(run_part, url, load, n, share) for n, share in enumerate(shares) if share]
        found = [part.result() for part in parts]
        seconds = time.monotonic() - began
    with engine.begin() as db:
        counts = jobs.count_job(db, job_id=job.id)
        stored, masks = db.execute(
            text(
                """SELECT (SELECT count(*) FROM outcome WHERE job_id = :job), (
                       SELECT count(*) FROM outcome o JOIN mask USING (asset_id) WHERE o.job_id = :job)"""
            ),
            {"job": job.id},
        ).one()
    assets = sum(part["assets"] for part in found)
    assert counts.labeled == stored == assets, (counts, stored, assets)
    assert counts.masks == masks == assets * load.masks
    assert counts.listed == counts.labeled + counts.failed + counts.pending
    return _level(load, found, seen, seconds)


def _level(load: Load, found: Sequence[dict[str, Any]], seen: dict[str, Any], seconds: float) -> Level:
    wanted = load.workers * load.rate
    reached = sum(part["assets"] for part in found) / load.seconds
    waits: Counter[str] = seen["waits"]
    looks = max(sum(waits.values()), 1)
    level = Level(
        workers=load.workers,
        wanted=wanted,
        reached=reached,
        claim_ms=_percentile(found, "claim"),
        record_ms=_percentile(found, "record"),
        heartbeat_ms=_percentile(found, "heartbeat"),
        postgres_cores=seen["postgres_cpu"] / seconds,
        client_cores=sum(part["cpu"] for part in found) / load.seconds,
        wal_mb=seen["wal_bytes"] / seconds / 1e6,
        commits=seen["commits"] / seconds,
        waits={name: round(n / looks, 2) for name, n in waits.most_common(4)},
        says="",
    )
    return Level(**{**asdict(level), "says": judge(level, cores=psutil.cpu_count() or 1)})


def judge(level: Level, *, cores: int) -> str:
    """What is saturated. Cores first: a machine without idle cores makes everything else wait."""
    if level.reached >= REACHED * level.wanted:
        return "keeps up"
    waiting = {kind: sum(n for name, n in level.waits.items() if name.startswith(kind)) for kind in ("Lock", "IO")}
    if level.postgres_cores + level.client_cores > 0.85 * cores:
        return f"the machine's {cores} cores ({level.postgres_cores:.1f} by Postgres)"
    if waiting["Lock"] > 0.3:
        return "locks between workers"
    if waiting["IO"] + sum(n for name, n in level.waits.items() if name.startswith("LWLock:WAL")) > 0.3:
        return "the disk, or the log that is written to it"
    return "nothing seen here: other work on the machine, or the connections that workers share"


def _percentile(found: Sequence[dict[str, Any]], name: str) -> float:
    values = sorted(1000 * s for part in found for s in part[name])
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else (values or [0.0])[0]


@contextmanager
def _watched(engine: Engine) -> Iterator[dict[str, Any]]:
    """What the server does meanwhile: WAL, commits, CPU of its processes, what its connections wait for."""
    seen: dict[str, Any] = {"waits": Counter(), "postgres_cpu": 0.0}
    stop = threading.Event()
    processes: dict[int, float] = {}

    def look() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            while not stop.wait(0.1):
                rows = db.execute(
                    text(
                        """SELECT pid, state, wait_event_type || ':' || wait_event FROM pg_stat_activity
                           WHERE pid <> pg_backend_pid()"""
                    )
                ).all()
                seen["waits"].update(row[2] or "on a core" for row in rows if row.state == "active")
                seen["postgres_cpu"] += _cpu_since(processes, [row.pid for row in rows])

    thread = threading.Thread(target=look)
    before = _server_numbers(engine)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        after = _server_numbers(engine)
        seen["wal_bytes"], seen["commits"] = (float(b - a) for a, b in zip(before, after, strict=True))


def _cpu_since(processes: dict[int, float], pids: Sequence[int]) -> float:
    """CPU seconds of these processes since the last call. 0 where the server is on another machine."""
    used = 0.0
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        now = times.user + times.system
        used += now - processes.get(pid, now)
        processes[pid] = now
    return used


def _server_numbers(engine: Engine) -> tuple[float, float]:
    with engine.begin() as db:
        row = db.execute(
            text(
                """SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0'),
                          (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())"""
            )
        ).one()
    return float(row[0]), float(row[1])


@contextmanager
def database(url: str | None) -> Iterator[str]:
    if url is not None:
        migrate(url)
        yield url
        return
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data") as server:
        migrate(server.url)
        yield server.url


def simulate(url: str, loads: Sequence[Load]) -> list[Level]:
    engine = open_engine(url, statement_timeout_seconds=0)
    try:
        return [run_level(engine, url, load) for load in loads]
    finally:
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--database")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    loads = [Load(workers=workers, rate=args.rate, masks=args.masks, seconds=args.seconds) for workers in args.workers]
    with database(args.database) as url:
        levels = simulate(url, loads)
    if args.json:
        print(json.dumps({"levels": [asdict(level) for level in levels]}, indent=2))
        return
    print("workers  wanted/s  reached/s  claim ms  record ms  beat ms  pg cores  client  WAL MB/s  commits/s  says")
    for x in levels:
        print(
            f"{x.workers:7}  {x.wanted:8.1f}  {x.reached:9.1f}  {x.claim_ms:8.1f}  {x.record_ms:9.1f}  "
            f"{x.heartbeat_ms:7.1f}  {x.postgres_cores:8.2f}  {x.client_cores:6.2f}  {x.wal_mb:8.2f}  "
            f"{x.commits:9.1f}  {x.says}; {x.waits}"
        )


if __name__ == "__main__":
    main()
