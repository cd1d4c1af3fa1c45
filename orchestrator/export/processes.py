"""An export in parts, several at once: each part is a range of keys, written by a process of its own.

Parts are named in export.json in their order. What a killed export had finished out of order is written again.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import count, takewhile
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from db import results
from db.jobs import Job
from db.results import LabeledAsset
from db.session import Connection, open_engine
from db.settings import settings
from orchestrator.export.errors import ExportError
from orchestrator.export.files import collect_seldom
from orchestrator.export.parts import Parts, WritePart, upload, write_part
from orchestrator.export.selection import Selection

MakeWriter = Callable[[Connection, Job], WritePart]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRange:
    """One part: the labeled assets with after < key <= upto. upto: None is the end of the job."""

    name: str
    after: str
    upto: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartWriter:
    """What a process needs. It is sent to it, so nothing open is in it. out: a folder or s3://bucket/prefix."""

    database_url: str
    job: Job
    selection: Selection
    make_writer: MakeWriter
    out: str

    def write(self, part: PartRange) -> dict[str, Any]:
        """Write one part. Returns its entry of export.json."""
        engine = open_engine(self.database_url, statement_timeout_seconds=0)
        try:
            with engine.connect() as db:
                if "://" not in self.out:
                    return self._write_into(db, Path(self.out), part)
                with TemporaryDirectory(prefix="maskfleet-export-") as staging:
                    entry = self._write_into(db, Path(staging), part)
                    upload(Path(staging), self.out)
                    return entry
        finally:
            engine.dispose()

    def _write_into(self, db: Connection, folder: Path, part: PartRange) -> dict[str, Any]:
        found = self.selection.assets(db, self.job, after=part.after)
        assets: Iterator[LabeledAsset] = takewhile(lambda a: part.upto is None or a.key <= part.upto, found)
        entry = write_part(folder / part.name, assets, self.make_writer(db, self.job))
        return entry | {"last_key": part.upto or entry["last_key"] or part.after}


def write_parts_at_once(
    parts: Parts, ranges: Iterator[PartRange], writer: PartWriter, *, processes: int, progress: Callable[[int], None]
) -> None:
    """Write the parts that are not there yet.

    progress: called with how many assets are in finished parts.
    """
    progress(parts.count("assets"))
    # A server that has imported all once forks the processes. A fork of this one would share its connection.
    server = get_context("forkserver")
    server.set_forkserver_preload(["orchestrator.export.formats"])
    with ProcessPoolExecutor(
        processes, mp_context=server, initializer=_begin_process, initargs=(dict(os.environ),)
    ) as pool:
        running: deque[Future[dict[str, Any]]] = deque()
        try:
            for part in ranges:
                running.append(pool.submit(writer.write, part))
                if len(running) > 2 * processes:
                    _name_first(parts, running)
                    progress(parts.count("assets"))
            while running:
                _name_first(parts, running)
                progress(parts.count("assets"))
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process(environment: dict[str, str]) -> None:
    """The server may be older than a change of this process's environment."""
    os.environ.clear()
    os.environ.update(environment)
    settings.cache_clear()
    collect_seldom()


def _name_first(parts: Parts, running: deque[Future[dict[str, Any]]]) -> None:
    try:
        entry = running.popleft().result()
    except BrokenProcessPool as error:
        said = "a process that writes a part was killed (out of memory?): the same command goes on"
        raise ExportError(said) from error
    parts.finished.append(entry)
    parts.store()


def part_ranges(
    db: Connection, job: Job, *, after: str, first: int, part_assets: int, suffix: str
) -> Iterator[PartRange]:
    """The parts behind a key, of so many assets of the job each: labeled ones, failed ones and pending ones."""
    for n in count(first):
        upto = results.key_after(db, job_id=job.id, after=after, assets=part_assets)
        if upto is None and n and results.key_after(db, job_id=job.id, after=after, assets=1) is None:
            return
        yield PartRange(name=f"part-{n:05}{suffix}", after=after, upto=upto)
        if upto is None:
            return
        after = upto
