"""A flat folder of a million files: how fast it is listed against os.scandir alone, and in how much memory.

    .venv/bin/python tests/benchmarks/listing.py [--files 1000000] [--stored] [--json]

The files are empty and in one temporary folder. Each kind of reading is a process of its own, three turns, medians:
`os.scandir` with the names alone, with each file's size and time, and `Source.list`. --stored: also a job's listing in
rounds of 2 s into the Postgres of the wheel (without fsync), as the dispatcher does it: its first and last quarter.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from db import jobs
from db.migrating import migrate
from db.session import Engine, open_engine
from db.states import JobState
from orchestrator.jobs.listing import Walks
from orchestrator.jobs.prepare import list_for_a_while
from orchestrator.local.postgres import EmbeddedPostgres
from tests.measured import Bar, report
from workers.storage.source import open_source

TURNS = 3
ROUND_SECONDS = 2.0


def names_alone(folder: str) -> int:
    with os.scandir(folder) as entries:
        return sum(1 for _ in entries)


def names_and_sizes(folder: str) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size == 0 for entry in entries)


def listed(folder: str) -> int:
    return sum(len(page.objects) for page in open_source(folder).list())


def measured(read: Callable[[str], int], folder: str) -> tuple[int, float, float]:
    """Files, seconds, peak memory in MB. Runs in a process of its own."""
    began = time.perf_counter()
    files = read(folder)
    seconds = time.perf_counter() - began
    return files, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(read: Callable[[str], int], folder: str) -> tuple[int, float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, read, folder).result()


@contextmanager
def flat_folder(files: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for n in range(files):
            os.close(os.open(f"{folder}/img_{n:08}.jpg", os.O_CREAT | os.O_WRONLY))
        yield folder


def against_scandir(folder: str, files: int) -> list[Bar]:
    rates: dict[str, list[float]] = {}
    peak = 0.0
    for _ in range(TURNS):
        for read in (names_alone, names_and_sizes, listed):
            found, seconds, memory = in_a_process(read, folder)
            assert found == files
            rates.setdefault(read.__name__, []).append(files / seconds)
            peak = memory if read is listed else peak
    alone, sizes, ours = (statistics.median(rates[read.__name__]) for read in (names_alone, names_and_sizes, listed))
    return [
        Bar(name="files a second", value=ours),
        Bar(name="os.scandir, names alone", value=alone),
        Bar(name="os.scandir, names, sizes and times", value=sizes),
        Bar(name="part of the names alone", value=ours / alone, bar=0.3, holds=ours / alone >= 0.3),
        Bar(name="part of names, sizes and times", value=ours / sizes, bar=0.3, holds=ours / sizes >= 0.3),
        Bar(name="peak memory, MB", value=peak, bar=300, holds=peak <= 300),
    ]


def into_postgres(folder: str) -> list[Bar]:
    with tempfile.TemporaryDirectory() as data, EmbeddedPostgres(Path(data) / "data", durable=False) as server:
        migrate(server.url)
        engine = open_engine(server.url)
        rates = list_job(engine, folder)
        engine.dispose()
    quarter = max(len(rates) // 4, 1)
    first, last = statistics.mean(rates[:quarter]), statistics.mean(rates[-quarter - 1 : -1] or rates)
    return [
        Bar(name="assets a second into Postgres", value=statistics.mean(rates)),
        Bar(
            name="last quarter of the rounds against the first", value=last / first, bar=0.7, holds=last / first >= 0.7
        ),
    ]


def list_job(engine: Engine, folder: str) -> list[float]:
    """Assets a second of each round."""
    with engine.begin() as db:
        job = jobs.insert_job(db, name="", source=folder, model="stub", model_version="v", asked={}, fresh=False)
    walks, rates = Walks(), []
    while job.state is JobState.LISTING:
        began = time.perf_counter()
        list_for_a_while(engine, job, walks, seconds=ROUND_SECONDS)
        with engine.begin() as db:
            now = jobs.get_job(db, job_id=job.id)
        assert now is not None
        rates.append((now.asset_count - job.asset_count) / (time.perf_counter() - began))
        job = now
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--stored", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with flat_folder(args.files) as folder:
        bars = against_scandir(folder, args.files)
        bars += into_postgres(folder) if args.stored else []
    report(bars, as_json=args.json)


if __name__ == "__main__":
    main()
