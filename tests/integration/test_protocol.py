"""The protocol of chunks under any order of events, by several workers, on a real Postgres.

Hypothesis draws the order: listing, dispatching, messages that are lost or doubled, claims, commits, heartbeats, leases
that run out, cancel, resume, retry, delete. `protocol_model` says after each step what must be in the database. At the
end of each run everything is drained, and then every asset has exactly one outcome.

MASKFLEET_TEST_EXAMPLES=500 makes the run longer.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, text

from db import jobs, leases, listing, queue, results
from db.jobs import Job
from db.leases import LeaseLost, NewOutcome
from db.listing import NewAsset
from orchestrator.jobs.delete import JobRunsError, delete_job
from tests.factories import labeled
from tests.integration.protocol_model import ACTIVE, Claim, Model, ModelChunk, ModelJob

pytestmark = pytest.mark.integration

EXAMPLES = int(os.environ.get("MASKFLEET_TEST_EXAMPLES", "40"))
CHUNK_SIZE, WINDOW, LEASE_SECONDS, LONG_AGO = 3, 4, 3600.0, "now() - interval '2 hours'"
KINDS = ("not_found", "internal")
ANY = st.integers(min_value=0, max_value=10**6)


class Protocol(RuleBasedStateMachine):
    """messages: what waits in the broker. claims: what workers hold, or held and still believe to hold."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.model = Model()
        self.messages: list[int] = []
        self.claims: list[Claim] = []
        self.old_rows: dict[int, Job] = {}
        with engine.begin() as db:
            db.execute(text("TRUNCATE job, mask RESTART IDENTITY CASCADE"))

    # submit and list

    @precondition(lambda self: len(self.model.jobs) < 3)
    @rule()
    def submit(self) -> None:
        with self.engine.begin() as db:
            job = jobs.insert_job(db, name="", source="s3://b", model="stub", model_version="v", asked={}, fresh=False)
        self.model.jobs[job.id] = ModelJob(job.id)
        self.old_rows[job.id] = job

    @initialize(count=st.integers(1, 9))
    def begin(self, count: int) -> None:
        """A run begins with chunks, for without them nothing can happen."""
        self.submit()
        self.list_a_page(0, count, True, False)
        self.dispatch("all")

    @precondition(lambda self: any(job.state == "listing" for job in self.model.jobs.values()))
    @rule(which=ANY, count=st.integers(0, 7), complete=st.booleans(), by_a_late_lister=st.booleans())
    def list_a_page(self, which: int, count: int, complete: bool, by_a_late_lister: bool) -> None:
        job = pick([job for job in self.model.jobs.values() if job.state == "listing"], which)
        start = len(job.keys)
        keys = [f"{n:03}" for n in range(start, start + count)]
        with self.engine.begin() as db:
            now = found(jobs.get_job(db, job_id=job.id))
            before = self.old_rows[job.id] if by_a_late_lister else now
            stored = listing.add_assets(
                db,
                job=before,
                assets=[NewAsset(key=key, size_bytes=1, etag=key) for key in keys],
                cursor=keys[-1] if keys else None,
                skipped={},
                complete=complete,
                chunk_size=CHUNK_SIZE,
            )
        assert (stored is None) == (before.list_cursor != now.list_cursor)
        self.old_rows[job.id] = now
        if stored is None:
            return
        job.keys += keys
        job.state, job.listed = ("running" if complete else "listing"), complete
        with self.engine.begin() as db:
            self._take_over_chunks(db, job)

    def _take_over_chunks(self, db: Connection, job: ModelJob) -> None:
        rows = db.execute(
            text(
                """SELECT c.id, a.id AS asset, a.key FROM chunk c
                   JOIN asset a ON a.job_id = c.job_id AND a.id BETWEEN first_asset_id AND last_asset_id
                   WHERE c.job_id = :job ORDER BY a.id"""
            ),
            {"job": job.id},
        )
        for row in rows:
            chunk = self.model.chunks.setdefault(row.id, ModelChunk(row.id, job, {}))
            chunk.assets[row.asset] = row.key

    # dispatch, deliver

    @rule(publish=st.sampled_from(["all", "none", "broker away"]))
    def dispatch(self, publish: str) -> None:
        """publish=none: the dispatcher dies between its commit and its messages."""
        with self.engine.begin() as db:
            assert sorted(jobs.finish_jobs(db)) == sorted(self.model.finish())
            taken = queue.take_window(db, window=WINDOW)
        self._check_window(taken)
        for chunk_id in taken.all:
            self.model.chunks[chunk_id].state = "sent"
        if publish == "all":
            self.messages += taken.all
        elif publish == "broker away":
            with self.engine.begin() as db:
                queue.unsend(db, chunk_ids=taken.all)
            for chunk_id in taken.all:
                self.model.chunks[chunk_id].state = "new"

    def _check_window(self, taken: queue.Window) -> None:
        for chunk_ids, returned in ((taken.returned, True), (taken.new, False)):
            chunks = [c for c in self.model.chunks.values() if c.was_claimed == returned and c.job.state in ACTIVE]
            ready = {chunk.id for chunk in chunks if chunk.state == "new" and not chunk.paused}
            sent = [c for c in self.model.chunks.values() if c.state == "sent" and c.job.state in ACTIVE]
            room = max(WINDOW - len([c for c in sent if c.was_claimed] if returned else sent), 0)
            assert set(chunk_ids) <= ready
            assert len(chunk_ids) == min(room, len(ready))

    @rule()
    def send_again_what_was_lost(self) -> None:
        """Long after the last sending."""
        with self.engine.begin() as db:
            db.execute(text(f"UPDATE chunk SET sent_at = {LONG_AGO} WHERE state = 'sent'"))
            before = {c.id for c in self.model.chunks.values() if c.state == "sent"}
            queue.resend_stale(db, resend_seconds=60, queue_is_empty=not self.messages)
            after = set(db.execute(text("SELECT id FROM chunk WHERE state = 'sent'")).scalars())
        for chunk_id in before - after:
            self.model.chunks[chunk_id].state = "new"
        if not self.messages:
            assert not after

    @precondition(lambda self: self.messages)
    @rule(which=ANY, doubled=st.booleans())
    def deliver(self, which: int, doubled: bool) -> None:
        chunk_id = pick(self.messages, which)
        if not doubled:
            self.messages.remove(chunk_id)
        self._claim(chunk_id)

    @rule(which=ANY)
    def deliver_a_message_that_nobody_sent(self, which: int) -> None:
        self._claim(pick([*self.model.chunks, 10**12], which))

    @precondition(lambda self: self.messages)
    @rule()
    def lose_all_messages(self) -> None:
        self.messages.clear()

    def _claim(self, chunk_id: int) -> None:
        expected = self.model.may_claim(chunk_id)
        with self.engine.begin() as db:
            chunk = leases.claim_chunk(db, chunk_id=chunk_id, worker="w", lease_seconds=LEASE_SECONDS)
            assert (chunk is not None) == expected, f"claim of {chunk_id}"
            if chunk is None:
                return
            modelled = self.model.chunks[chunk_id]
            answered = self.model.answered(modelled)
            assert leases.answer_from_stored(db, chunk=chunk) == len(answered)
            assets = [asset.id for asset in leases.pending_assets(db, chunk=chunk)]
        self.model.outcomes |= dict.fromkeys(answered)
        assert assets == self.model.pending(modelled)
        claim = Claim(chunk, assets)
        modelled.give_back()
        modelled.state, modelled.holder, modelled.was_claimed = "running", claim, True
        self.claims.append(claim)

    # workers

    @precondition(lambda self: self.claims)
    @rule(which=ANY, count=st.integers(0, 3), ahead=st.integers(0, 2), kind=st.sampled_from([None, None, *KINDS]))
    def commit(self, which: int, count: int, ahead: int, kind: str | None) -> None:
        claim = pick(self.claims, which)
        done, in_flight = claim.todo[:count], claim.todo[count : count + ahead]
        outcomes = [labeled(asset) if kind is None else NewOutcome(asset_id=asset, error_kind=kind) for asset in done]

        def write(db: Connection) -> None:
            leases.record(
                db, chunk=claim.chunk, outcomes=outcomes, in_flight=in_flight, worker="w", lease_seconds=LEASE_SECONDS
            )

        if self._write(claim, write):
            for asset in done:
                self.model.outcomes.setdefault(asset, kind)
            claim.todo = claim.todo[count:]
            chunk = self.model.chunks[claim.chunk.id]
            chunk.in_flight, chunk.expired = in_flight, False

    @precondition(lambda self: self.claims)
    @rule(which=ANY)
    def heartbeat(self, which: int) -> None:
        claim = pick(self.claims, which)
        if self._write(claim, lambda db: leases.extend_lease(db, chunk=claim.chunk, lease_seconds=LEASE_SECONDS)):
            self.model.chunks[claim.chunk.id].expired = False

    @precondition(lambda self: any(not claim.todo for claim in self.claims))
    @rule(which=ANY)
    def finish_a_chunk(self, which: int) -> None:
        claim = pick([claim for claim in self.claims if not claim.todo], which)
        if self._write(claim, lambda db: leases.finish_chunk(db, chunk=claim.chunk)):
            chunk = self.model.chunks[claim.chunk.id]
            assert not self.model.pending(chunk)
            chunk.give_back()
            chunk.state = "done"

    @precondition(lambda self: self.claims)
    @rule(which=ANY)
    def work_through_a_chunk(self, which: int) -> None:
        """As a worker does that nothing disturbs. It does not forget the chunk: late threads of it may write again."""
        claim = pick(self.claims, which)
        while claim in self.claims and claim.todo:
            self.commit(self.claims.index(claim), 3, 0, None)
        if claim in self.claims:
            self.finish_a_chunk([c for c in self.claims if not c.todo].index(claim))

    @precondition(lambda self: self.claims)
    @rule(which=ANY, after_an_error=st.booleans())
    def release(self, which: int, after_an_error: bool) -> None:
        claim = pick(self.claims, which)
        with self.engine.begin() as db:
            leases.release_chunk(db, chunk=claim.chunk, transient_error=after_an_error)
            # Only `pauses_end` ends a pause, not the time that a busy machine takes.
            db.execute(text("UPDATE chunk SET ready_at = now() + interval '1 day' WHERE ready_at IS NOT NULL"))
        self.claims.remove(claim)
        chunk = self.model.chunks.get(claim.chunk.id)
        if chunk is not None and chunk.holder is claim:
            chunk.give_back()
            chunk.paused = after_an_error

    def _write(self, claim: Claim, write: Any) -> bool:
        """Whether the worker still held its chunk. The model must agree."""
        expected = self.model.may_write(claim)
        try:
            with self.engine.begin() as db:
                write(db)
        except LeaseLost:
            assert not expected, f"chunk {claim.chunk.id} was held, and its worker's write was refused"
            self.claims.remove(claim)
            return False
        assert expected, f"chunk {claim.chunk.id} was not held, and a write was accepted"
        return True

    # time and reaper

    @precondition(lambda self: any(c.state == "running" for c in self.model.chunks.values()))
    @rule(which=ANY)
    def a_lease_runs_out(self, which: int) -> None:
        chunk = pick([c for c in self.model.chunks.values() if c.state == "running"], which)
        with self.engine.begin() as db:
            db.execute(text(f"UPDATE chunk SET lease_until = {LONG_AGO} WHERE id = :id"), {"id": chunk.id})
        chunk.expired = True

    @precondition(lambda self: any(c.state == "running" for c in self.model.chunks.values()))
    @rule(which=ANY, replaced=st.booleans(), wakes=st.sampled_from(["commit", "heartbeat", "release", "not yet"]))
    def a_worker_sleeps_past_its_lease(self, which: int, replaced: bool, wakes: str) -> None:
        """It still believes that it holds the chunk, which another worker may hold by now."""
        running = [c for c in self.model.chunks.values() if c.state == "running"]
        chunk = pick(running, which)
        sleeper = chunk.holder
        self.a_lease_runs_out(running.index(chunk))
        self.reap()
        if replaced:
            self._claim(chunk.id)
        if sleeper not in self.claims:
            return
        if wakes == "commit":
            self.commit(self.claims.index(sleeper), 1, 1, None)
        elif wakes == "heartbeat":
            self.heartbeat(self.claims.index(sleeper))
        elif wakes == "release":
            self.release(self.claims.index(sleeper), False)

    @rule()
    def reap(self) -> None:
        with self.engine.begin() as db:
            assert queue.reap(db) == self.model.reap()

    @rule()
    def pauses_end(self) -> None:
        with self.engine.begin() as db:
            db.execute(text(f"UPDATE chunk SET ready_at = {LONG_AGO} WHERE ready_at IS NOT NULL"))
        for chunk in self.model.chunks.values():
            chunk.paused = False

    # operators

    @precondition(lambda self: self.model.jobs)
    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        job = pick(list(self.model.jobs.values()), which)
        with self.engine.begin() as db:
            assert jobs.cancel_job(db, job_id=job.id) == (job.state in ACTIVE)
        job.state = "cancelled" if job.state in ACTIVE else job.state
        self.model.unsend(job)

    @precondition(lambda self: any(job.state == "cancelled" for job in self.model.jobs.values()))
    @rule(which=ANY)
    def resume(self, which: int) -> None:
        job = pick([job for job in self.model.jobs.values() if job.state == "cancelled"], which)
        self._resume(job)

    def _resume(self, job: ModelJob) -> None:
        with self.engine.begin() as db:
            assert jobs.resume_job(db, job_id=job.id)
        job.state = "running" if job.listed else "listing"
        self.model.unsend(job)

    @precondition(lambda self: self.model.jobs)
    @rule(which=ANY, kind=st.sampled_from([None, *KINDS, "crashed_worker"]))
    def retry(self, which: int, kind: str | None) -> None:
        job = pick(list(self.model.jobs.values()), which)
        with self.engine.begin() as db:
            assert jobs.retry_failed(db, job_id=job.id, error_kind=kind) == self.model.retry(job, kind)

    @precondition(lambda self: len(self.model.jobs) > 1)
    @rule(which=ANY, sure=st.integers(0, 3))
    def delete(self, which: int, sure: int) -> None:
        assume(not sure)  # more seldom than the rest
        job = pick(list(self.model.jobs.values()), which)
        if job.state in ACTIVE:
            with pytest.raises(JobRunsError):
                delete_job(self.engine, job.id, store=None)
            self.cancel(list(self.model.jobs.values()).index(job))
        delete_job(self.engine, job.id, store=None)
        self.model.delete(job)

    # what always holds

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        with self.engine.begin() as db:
            outcomes = pairs(db, "SELECT asset_id, error_kind FROM outcome")
            suspects = pairs(db, "SELECT asset_id, deaths_alone FROM suspect")
            chunks = {row.id: row for row in db.execute(text("SELECT id, state, in_flight, lease_until FROM chunk"))}
            states = pairs(db, "SELECT id, state FROM job")
            counts = jobs.count_jobs(db, job_ids=list(states))
            masks = pairs(db, "SELECT asset_id, count(*) FROM mask GROUP BY asset_id")
            labels = {
                job_id: (results.labels_of(db, job_id=job_id), results.masks_per_asset(db, job_id=job_id))
                for job_id in states
            }
        assert masks == {asset: 1 for asset, kind in outcomes.items() if kind is None}
        assert outcomes == self.model.outcomes
        assert suspects == self.model.suspects
        assert {chunk_id: row.state for chunk_id, row in chunks.items()} == {
            chunk.id: chunk.state for chunk in self.model.chunks.values()
        }
        for chunk in self.model.chunks.values():
            assert chunks[chunk.id].in_flight == chunk.in_flight
            assert (chunk.state == "running") == (chunk.holder is not None)
        assert states == {job.id: job.state for job in self.model.jobs.values()}
        for job in self.model.jobs.values():
            found_counts = counts[job.id]
            done = [
                kind
                for chunk in self.model.chunks.values()
                if chunk.job is job
                for asset, kind in self.model.outcomes.items()
                if asset in chunk.assets
            ]
            assert found_counts.listed == found_counts.labeled + found_counts.failed + found_counts.pending
            assert found_counts.listed == len(job.keys)
            assert (found_counts.labeled, found_counts.masks) == (done.count(None), done.count(None))
            assert found_counts.labeled + found_counts.failed == len(done)
            assert found_counts.failed_by_kind == {kind: done.count(kind) for kind in {*done} - {None}}
            assert labels[job.id] == ([], {1: done.count(None)} if None in done else {})
            if job.state == "done":
                assert found_counts.pending == 0
                assert all(c.state == "done" for c in self.model.chunks.values() if c.job is job)

    # the end

    def teardown(self) -> None:
        """Let every job go on, with workers that die no more, until all is done."""
        for job in list(self.model.jobs.values()):
            if job.state == "cancelled":
                self._resume(job)
            if job.state == "listing":
                self._list_the_rest(job)
        self.claims.clear()
        for _ in range(100):
            if all(job.state == "done" for job in self.model.jobs.values()):
                break
            self._let_time_pass()
        note(f"{self.model}")
        assert all(job.state == "done" for job in self.model.jobs.values()), "it does not drain"
        self.the_database_is_as_the_model_says()
        with self.engine.begin() as db:
            assert db.execute(text("SELECT count(*) FROM asset")).scalar_one() == len(self.model.outcomes)
            assert jobs.is_idle(db)

    def _list_the_rest(self, job: ModelJob) -> None:
        with self.engine.begin() as db:
            now = found(jobs.get_job(db, job_id=job.id))
            listing.add_assets(db, job=now, assets=[], cursor=None, skipped={}, complete=True, chunk_size=CHUNK_SIZE)
        job.state, job.listed = "running", True

    def _let_time_pass(self) -> None:
        """All that was lost is noticed; then one window of chunks is labeled."""
        for chunk in self.model.chunks.values():
            chunk.expired = chunk.state == "running"
        with self.engine.begin() as db:
            db.execute(text(f"UPDATE chunk SET lease_until = {LONG_AGO} WHERE state = 'running'"))
        self.reap()
        self.pauses_end()
        self.messages.clear()
        self.send_again_what_was_lost()
        self.dispatch("all")
        while self.messages:
            self._claim(self.messages.pop())
        for claim in list(self.claims):
            while claim.todo:
                self.commit(self.claims.index(claim), 3, 0, None)
            self.finish_a_chunk([c for c in self.claims if not c.todo].index(claim))
            self.claims.remove(claim)


def pick(things: list[Any], which: int) -> Any:
    return things[which % len(things)]


def pairs(db: Connection, statement: str) -> dict[Any, Any]:
    return {row[0]: row[1] for row in db.execute(text(statement))}


def found(job: Job | None) -> Job:
    assert job is not None
    return job


def test_whatever_happens_in_whatever_order_each_asset_gets_one_outcome_and_everything_drains(engine: Engine) -> None:
    run_state_machine_as_test(
        lambda: Protocol(engine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
