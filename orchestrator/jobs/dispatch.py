"""The dispatcher: lists the sources of new jobs and keeps the queue topped up. Safe to run twice, or not at all."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from db import jobs, listing
from db.jobs import Job
from db.session import DBAPIError, Engine, is_passing
from db.settings import settings
from db.states import JobState
from orchestrator.jobs.listing import Selection, select
from workers.errors import AssetError, SourceError, TransientError, redact
from workers.running.tasks import top_up
from workers.storage.source import open_source

_LONGEST_PAUSE_SECONDS = 5.0
_LIST_SECONDS = 2.0  # then the other jobs and the queue get their turn

log = logging.getLogger(__name__)


def dispatch(engine: Engine, stop: threading.Event, *, idle_seconds: float = 1.0) -> None:
    """Run until `stop` is set. While Postgres is away it waits, with growing pauses."""
    pause = idle_seconds
    while not stop.is_set():
        try:
            busy = tick(engine)
            pause = 0.05 if busy else idle_seconds
        except DBAPIError as error:
            if not is_passing(error):
                raise
            pause = min(max(pause, idle_seconds) * 2, _LONGEST_PAUSE_SECONDS)
            log.warning("Postgres did not answer, next try in %g s: %s", pause, redact(str(error.orig)))
        stop.wait(pause)


def tick(engine: Engine) -> bool:
    """One round over all jobs; True while a listing goes on."""
    with engine.begin() as db:
        if jobs.is_idle(db):
            return False
        to_list = jobs.jobs_to_list(db)
    for job in to_list:
        _list_for_a_while(engine, job)
    top_up(engine)
    return bool(to_list)


def _list_for_a_while(engine: Engine, job: Job) -> None:
    """Store the next pages of a job's source; the next page is fetched while one is stored."""
    give_way_at = time.monotonic() + _LIST_SECONDS
    try:
        source = open_source(job.source, s3_endpoint=settings().s3_endpoint)
        pages = select(source, asked=job.asked, after=job.list_cursor, found=job.asset_count)
        current: Job | None = job
        with ThreadPoolExecutor(1, thread_name_prefix="list") as fetching:
            ahead = fetching.submit(next, pages)
            while current is not None and current.state is JobState.LISTING:
                page: Selection = ahead.result()
                more = not page.complete and time.monotonic() < give_way_at
                if more:
                    ahead = fetching.submit(next, pages)
                current = _store(engine, current, page)
                if not more:
                    return
    except (SourceError, AssetError) as error:
        _note_failure(engine, job, str(error), lasting=True)
    except TransientError as error:
        _note_failure(engine, job, str(error), lasting=False)


def _store(engine: Engine, job: Job, page: Selection) -> Job | None:
    with engine.begin() as db:
        return listing.add_assets(
            db,
            job=job,
            assets=page.assets,
            cursor=page.cursor,
            skipped=page.skipped,
            complete=page.complete,
            chunk_size=settings().chunk_size,
        )


def _note_failure(engine: Engine, job: Job, error: str, *, lasting: bool) -> None:
    log.error("job %d: %s could not be listed: %s", job.id, job.source, redact(error))
    with engine.begin() as db:
        jobs.record_list_failure(db, job=job, error=redact(error), lasting=lasting)
