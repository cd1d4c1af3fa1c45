"""Prompts of ten million assets take minutes to match. Other jobs do not wait for them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine

from db import jobs, prompts
from db.jobs import Job
from db.session import DBAPIError
from orchestrator.jobs import matching
from orchestrator.jobs.matching import Matchings
from orchestrator.jobs.prepare import match_prompts
from orchestrator.prompts.key_matching import Matching, MatchingError, Pair, match
from tests.factories import make_job
from tests.waiting import wait_for

pytestmark = pytest.mark.integration
USUAL = Matching.pairs


def prompted(engine: Engine, *, keys: int) -> Job:
    job = make_job(engine, keys=keys, asked={"prompts": {"format": "json-lines"}})
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=[(f"{n:04}", '[{"n": 1}]') for n in range(keys)])
    return job


def unmatched(engine: Engine) -> list[Job]:
    with engine.begin() as db:
        return jobs.jobs_to_match(db)


def before_pairs(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[int]], object]) -> None:
    """Call `act` with the assets' ids of a matching that has found its pairs."""

    def pairs(found: Matching, *, exact: bool = True) -> Iterator[Pair]:
        act([pair.asset for pair in USUAL(found)])
        yield from USUAL(found, exact=exact)

    monkeypatch.setattr(Matching, "pairs", pairs)


def test_a_job_is_matched_while_the_matching_of_a_large_one_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = prompted(engine, keys=9), prompted(engine, keys=2)
    may_go_on = threading.Event()
    before_pairs(monkeypatch, lambda assets: may_go_on.wait() if len(assets) == large.asset_count else None)

    with Matchings(engine) as matchings:
        matchings.go_on(unmatched(engine), seconds=0.1)
        wait_for(lambda: [job.id for job in unmatched(engine)] == [large.id], "the small job's matching")
        late = prompted(engine, keys=3)
        matchings.go_on(unmatched(engine), seconds=0.1)
        wait_for(lambda: [job.id for job in unmatched(engine)] == [large.id], f"the matching of job {late.id}")
        may_go_on.set()
        wait_for(lambda: not unmatched(engine), f"the matching of job {small.id}")


def test_a_matching_that_is_stopped_leaves_nothing_and_says_nothing_on_its_job(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prompted(engine, keys=9)
    sorting = threading.Event()

    def never_ends(found: Matching) -> None:
        sorting.set()
        found._db.execute("WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT sum(n) FROM n")

    monkeypatch.setattr(Matching, "report", never_ends)
    with Matchings(engine) as matchings:
        matchings.go_on([job], seconds=0)
        assert sorting.wait(300)
        [endless] = [thread for thread in threading.enumerate() if thread.name == f"match {job.id}"]

    endless.join(300)
    assert [(one.id, one.error) for one in unmatched(engine)] == [(job.id, None)]


def test_a_disk_without_room_is_tried_again_after_a_pause_that_grows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prompted(engine, keys=2)
    tries: list[int] = []

    def no_room(_: object) -> None:
        tries.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    before_pairs(monkeypatch, no_room)
    now = 1000.0
    monkeypatch.setattr(matching, "time", SimpleNamespace(monotonic=lambda: now))
    with Matchings(engine) as matchings:
        begun = []
        for _ in range(60):
            matchings.go_on(unmatched(engine), seconds=300)
            begun.append(len(tries))
            now += 1

    assert begun[:12] == [1] * 10 + [2] * 2
    assert begun[28:32] == [2, 2, 3, 3]
    [failed] = unmatched(engine)
    assert failed.id == job.id
    assert "is the disk full?" in (failed.error or "")


def test_what_ends_a_matching_is_raised_in_the_dispatchers_round_and_it_begins_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted(engine, keys=2)
    away = [DBAPIError.instance("SELECT", None, Exception("Postgres is away"), Exception)]

    def fail_once(_: object) -> None:
        if away:
            raise away.pop()

    before_pairs(monkeypatch, fail_once)
    with Matchings(engine) as matchings:
        with pytest.raises(Exception, match="Postgres is away"):
            matchings.go_on(unmatched(engine), seconds=300)
        matchings.go_on(unmatched(engine), seconds=300)

    assert not unmatched(engine)


def test_a_matching_that_ended_after_the_jobs_were_read_is_not_made_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For ten million it would take minutes, and store nothing."""
    job = prompted(engine, keys=2)
    begun: list[int] = []
    may_go_on = threading.Event()

    def wait_there(_: object) -> None:
        begun.append(1)
        may_go_on.wait()

    before_pairs(monkeypatch, wait_there)
    with Matchings(engine) as matchings:
        matchings.go_on(unmatched(engine), seconds=0)
        [thread] = [one for one in threading.enumerate() if one.name == f"match {job.id}"]
        read_before = unmatched(engine)
        may_go_on.set()
        thread.join(300)
        matchings.go_on(read_before, seconds=300)

    assert (begun, unmatched(engine)) == ([1], [])


def test_a_stop_is_heeded_between_two_steps() -> None:
    stop = threading.Event()

    def keys() -> Iterator[str]:
        for n in range(1_000_000):
            if n == 10_000:
                stop.set()
            yield f"{n}.jpg"

    with pytest.raises(MatchingError, match="interrupted"), match(keys(), [], source="/x", stop=stop):
        pass


def test_a_stopped_matching_is_no_failure(engine: Engine) -> None:
    job, stop = prompted(engine, keys=1000), threading.Event()
    stop.set()

    assert match_prompts(engine, job, stop=stop)

    assert [one.id for one in unmatched(engine)] == [job.id]
