"""The dispatcher: lists the sources of new jobs, matches their prompts, keeps the queue full.

Two may run at once. Without one, nothing is lost.
"""

from __future__ import annotations

import logging
import threading
import time

from db import brake, embeddings, jobs
from db.session import DBAPIError, Engine, is_passing
from orchestrator.jobs.listing import Walks
from orchestrator.jobs.matching import Matchings
from orchestrator.jobs.prepare import list_for_a_while, match_prompts
from workers.errors import redact
from workers.running.tasks import top_up

_LONGEST_PAUSE_SECONDS = 5.0
_LIST_SECONDS = 2.0  # then the other jobs and the queue get their turn
_MATCH_SECONDS = 2.0  # then a matching goes on beside the rounds
_JUDGE_SECONDS = 5.0  # between two looks at the jobs' failed assets

log = logging.getLogger(__name__)


def dispatch(engine: Engine, stop: threading.Event, *, idle_seconds: float = 1.0) -> None:
    """Run until `stop` is set. While Postgres is away it waits, with growing pauses."""
    with Matchings(engine) as matchings:
        _rounds(engine, stop, matchings, idle_seconds)


def _rounds(engine: Engine, stop: threading.Event, matchings: Matchings, idle_seconds: float) -> None:
    pause, judge_at, walks = idle_seconds, 0.0, Walks()
    while not stop.is_set():
        try:
            busy = tick(engine, walks, matchings)
            if time.monotonic() >= judge_at:
                pause_failing(engine)
                judge_at = time.monotonic() + _JUDGE_SECONDS
            pause = 0.05 if busy else idle_seconds
        except DBAPIError as error:
            if not is_passing(error):
                raise
            pause = min(max(pause, idle_seconds) * 2, _LONGEST_PAUSE_SECONDS)
            log.warning("Postgres did not answer, next try in %g s: %s", pause, redact(str(error.orig)))
        stop.wait(pause)


def tick(engine: Engine, walks: Walks | None = None, matchings: Matchings | None = None) -> bool:
    """One round over all jobs; True while a listing goes on. walks, matchings: of the rounds before."""
    with engine.begin() as db:
        if jobs.is_idle(db) and not embeddings.has_wanted(db):
            return False
        to_list = jobs.jobs_to_list(db)
    walks = walks or Walks()
    walks.keep_only({job.id for job in to_list})
    for job in to_list:
        list_for_a_while(engine, job, walks, seconds=_LIST_SECONDS)
    with engine.begin() as db:
        to_match = jobs.jobs_to_match(db)
    if matchings is not None:
        matchings.go_on(to_match, seconds=_MATCH_SECONDS)
    else:
        for job in to_match:
            match_prompts(engine, job)
    top_up(engine)
    return bool(to_list)


def pause_failing(engine: Engine) -> None:
    """Pause the jobs of which too many assets failed, and say so."""
    with engine.begin() as db:
        paused = brake.pause_failing_jobs(db)
    for one in paused:
        log.error("job %d is paused: %s", one.job_id, one.reason, extra={"job": one.job_id})
