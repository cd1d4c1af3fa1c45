"""Make a submitted job ready: list its source, then match its prompts with the listed assets.

Two dispatchers may do this at the same time. The second one stores nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

from db import jobs, listing, prompts
from db.jobs import Job
from db.session import DBAPIError, Engine, is_about_values
from db.settings import settings
from db.states import JobState
from db.texts import storable
from orchestrator.jobs.listing import Selection, Walks, listed_part
from orchestrator.jobs.shards import list_in_parallel
from orchestrator.prompts.key_matching import MatchingError, match
from workers.errors import AssetError, SourceError, TransientError, redact
from workers.storage.asset import SkipReason
from workers.storage.source import open_source

_PAGE = 5000

log = logging.getLogger(__name__)
Key = TypeVar("Key", str, tuple[int, str])


def list_for_a_while(engine: Engine, job: Job, walks: Walks, *, seconds: float) -> None:
    """Store the next pages of a job's source. An error is the job's own, and other jobs do not wait for it."""
    try:
        source = open_source(job.source, s3_endpoint=settings().s3_endpoint)
        if job.asked.get("list_shards") and list_in_parallel(engine, job, source, seconds=seconds):
            return
        pages = walks.take(job, listed_part(source, job.asked), lambda: _known_keys(engine, job))
        current = _list(engine, job, pages, give_way_at=time.monotonic() + seconds)
        if current is not None and current.state is JobState.LISTING:
            walks.keep(current, pages)
    except (SourceError, AssetError) as error:
        _note_failure(engine, job, str(error), lasting=True)
    except TransientError as error:
        _note_failure(engine, job, str(error), lasting=False)
    except DBAPIError as error:
        if not is_about_values(error):
            raise
        _note_failure(engine, job, f"{job.source}: its listing cannot be stored: {error.orig}", lasting=True)


def _list(engine: Engine, job: Job, pages: Iterator[Selection], *, give_way_at: float) -> Job | None:
    """Store pages. While one is stored, the next one is fetched. Returns the job as it then is."""
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
                break
    return current


def match_prompts(engine: Engine, job: Job, *, stop: threading.Event | None = None) -> bool:
    """Find which assets a listed job's prompts mean, and store the result. The job's chunks wait for it.

    False: the disk had no room, and the job's error says so. stop: gives up soon after it is set.
    """
    stop = stop or threading.Event()
    keys = _pages(engine, job, prompts.prompt_keys)
    assets = _pages(engine, job, prompts.asset_keys)
    try:
        with match(keys, assets, source=job.source, stop=stop) as matching:
            # A prompt whose key equals the asset's key needs no row.
            pairs = ((pair.asset, pair.key) for pair in matching.pairs(exact=False))
            # The first one comes when all are sorted, which takes minutes for ten million. Postgres ends a transaction
            # that waits for so long, and the job would be matched anew without end.
            first, report = list(islice(pairs, 1)), matching.report().as_json()
            with engine.begin() as db:
                prompts.store_matches(db, job_id=job.id, pairs=chain(first, pairs), matched=report)
    except MatchingError as error:
        if stop.is_set():
            return True
        log.error("job %d: %s", job.id, error, extra={"job": job.id})
        with engine.begin() as db:
            jobs.note_error(db, job_id=job.id, error=str(error))
        return False
    return True


def _pages(engine: Engine, job: Job, read: Callable[..., list[Key]]) -> Iterator[Key]:
    """All rows of a query that pages by key. Each page has its own transaction, so no snapshot is held for minutes."""
    after: str | None = None
    while True:
        with engine.begin() as db:
            page = read(db, job_id=job.id, after=after, limit=_PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        last: Any = page[-1]
        after = last if isinstance(last, str) else last[1]


def _known_keys(engine: Engine, job: Job) -> set[str]:
    """The keys that the job has, where its limit counts each key of a list once: at most as many as the limit."""
    is_counted = job.asked.get("keys") and job.asked.get("limit") is not None and job.asset_count
    return {key for _, key in _pages(engine, job, prompts.asset_keys)} if is_counted else set()


def _store(engine: Engine, job: Job, page: Selection) -> Job | None:
    assets, skipped = page.assets, page.skipped
    with engine.begin() as db:
        if job.asked.get("keys"):
            assets = listing.new_ones(db, job_id=job.id, assets=assets)
            twice = skipped.get(SkipReason.DUPLICATE_KEY, 0) + len(page.assets) - len(assets)
            skipped = skipped | {SkipReason.DUPLICATE_KEY: twice}
        return listing.add_assets(
            db,
            job=job,
            assets=assets,
            cursor=page.cursor,
            skipped=skipped,
            complete=page.complete,
            chunk_size=settings().chunk_size,
        )


def _note_failure(engine: Engine, job: Job, error: str, *, lasting: bool) -> None:
    log.error("job %d: %s could not be listed: %s", job.id, job.source, redact(error), extra={"job": job.id})
    with engine.begin() as db:
        jobs.record_list_failure(db, job=job, error=storable(redact(error)), lasting=lasting)
