"""Who may write to a chunk: only the worker that holds it, and only while it holds it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from db import jobs, leases, listing, queue
from db.leases import LeaseLost, NewOutcome
from db.listing import NewAsset
from db.session import DBAPIError, is_passing
from db.states import JobState
from tests.factories import chunk_ids, claim, count, expire_lease, finish, labeled, make_job, pending, reap, record
from tests.waiting import wait_for_lock

pytestmark = pytest.mark.integration


def test_a_finished_chunk_takes_no_more_writes_from_the_worker_that_finished_it(engine: Engine) -> None:
    job = make_job(engine, keys=2, chunk_size=1)  # the second chunk stays open, so the job stays running
    chunk = claim(engine, chunk_ids(engine, job)[0])
    [asset] = pending(engine, chunk)
    finish(engine, chunk)

    with pytest.raises(LeaseLost):
        record(engine, chunk, [labeled(asset.id)])
    with pytest.raises(LeaseLost), engine.begin() as db:
        leases.extend_lease(db, chunk=chunk, lease_seconds=60)

    assert count(engine, job).labeled == 0


def test_a_worker_that_lost_its_chunk_does_not_release_it_for_its_heir(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    [chunk_id] = chunk_ids(engine, job)
    zombie = claim(engine, chunk_id, worker="zombie")
    expire_lease(engine, zombie)
    reap(engine)
    heir = claim(engine, chunk_id, worker="heir")

    with engine.begin() as db:
        leases.release_chunk(db, chunk=zombie)

    record(engine, heir, [labeled(asset.id) for asset in pending(engine, heir)])
    assert count(engine, job).labeled == 1


def test_each_claim_and_each_end_of_a_lease_has_a_token_of_its_own(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    [chunk_id] = chunk_ids(engine, job)
    tokens = [0]

    def token() -> int:
        with engine.begin() as db:
            return int(db.execute(text("SELECT token FROM chunk")).scalar_one())

    for end in ("reap", "release"):
        chunk = claim(engine, chunk_id)
        tokens.append(token())
        assert chunk.token == tokens[-1]
        if end == "reap":
            expire_lease(engine, chunk)
            reap(engine)
        else:
            with engine.begin() as db:
                leases.release_chunk(db, chunk=chunk)
        tokens.append(token())

    assert tokens == sorted(set(tokens))


def test_an_asset_whose_etag_changed_is_not_answered_from_stored(engine: Engine) -> None:
    first = make_job(engine, keys=["a.jpg", "b.jpg"])
    chunk = claim(engine, chunk_ids(engine, first)[0])
    record(engine, chunk, [labeled(asset.id) for asset in pending(engine, chunk)])
    with engine.begin() as db:
        again = jobs.insert_job(
            db,
            name="again",
            source=first.source,
            model=first.model,
            model_version=first.model_version,
            asked={},
            fresh=False,
        )
        assets = [
            NewAsset(key="a.jpg", size_bytes=10, etag="etag-a.jpg"),
            NewAsset(key="b.jpg", size_bytes=10, etag="other bytes of the same number"),
        ]
        listing.add_assets(db, job=again, assets=assets, cursor=None, skipped={}, complete=True, chunk_size=9)
    chunk = claim(engine, chunk_ids(engine, again)[0])

    with engine.begin() as db:
        assert leases.answer_from_stored(db, chunk=chunk) == 1

    assert [asset.key for asset in pending(engine, chunk)] == ["b.jpg"]


def test_a_chunk_that_another_dispatcher_is_sending_is_left_to_it(engine: Engine) -> None:
    make_job(engine, keys=5, chunk_size=1)
    with engine.begin() as first:
        taken = queue.take_window(first, window=3).all
        with engine.begin() as second:
            second.execute(text("SET lock_timeout = '5s'"))  # it must not wait for the first either
            others = queue.take_window(second, window=5).all

    assert len(taken) == 3
    assert not set(taken) & set(others)


def test_retry_keeps_what_is_labeled(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    gone, fine = (asset.id for asset in pending(engine, chunk))
    record(engine, chunk, [NewOutcome(asset_id=gone, error_kind="not_found"), labeled(fine, masks=2)])
    finish(engine, chunk)

    with engine.begin() as db:
        assert jobs.retry_failed(db, job_id=job.id, error_kind=None) == 1

    assert (count(engine, job).labeled, count(engine, job).masks) == (1, 2)


def test_what_is_retried_while_its_chunk_runs_is_not_left_behind(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    gone, waiting = (asset.id for asset in pending(engine, chunk))
    record(engine, chunk, [NewOutcome(asset_id=gone, error_kind="not_found")])

    with engine.begin() as db:
        jobs.retry_failed(db, job_id=job.id, error_kind=None)

    with pytest.raises(LeaseLost):  # it would finish the chunk without the retried asset
        finish(engine, chunk)
    assert [asset.id for asset in pending(engine, claim(engine, chunk_id))] == [gone, waiting]


def test_a_job_whose_retry_commits_while_it_is_finished_stays_at_work(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    record(engine, chunk, [NewOutcome(asset_id=chunk.first_asset_id, error_kind="not_found")])
    with engine.begin() as db:
        leases.finish_chunk(db, chunk=chunk)

    def finish_jobs() -> list[int]:
        with engine.begin() as db:
            return jobs.finish_jobs(db)

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as db:
            assert jobs.retry_failed(db, job_id=job.id, error_kind=None) == 1
            finishing = pool.submit(finish_jobs)  # it sees the job before the retry, and waits for its row
            wait_for_lock(engine)
        assert finishing.result() == []

    with engine.begin() as db:
        assert jobs.get_job(db, job_id=job.id).state is JobState.RUNNING
        assert queue.take_window(db, window=1).all == [chunk.id]


def test_a_cancel_and_a_retry_at_once_do_not_wait_for_each_other(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    record(engine, chunk, [NewOutcome(asset_id=chunk.first_asset_id, error_kind="not_found")])
    with engine.begin() as db:
        leases.release_chunk(db, chunk=chunk)
        assert queue.take_window(db, window=1).all == [chunk.id]

    def retry() -> int:
        with engine.begin() as db:
            return jobs.retry_failed(db, job_id=job.id, error_kind=None)

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as db:
            db.execute(text("UPDATE job SET name = name WHERE id = :id"), {"id": job.id})  # as the cancel begins
            retrying = pool.submit(retry)  # it locks the chunk, and waits for the job
            wait_for_lock(engine)
            assert jobs.cancel_job(db, job_id=job.id)
        assert retrying.result() == 1


def test_a_disk_that_fills_up_in_a_copy_is_an_error_of_the_database_that_passes(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    with engine.begin() as db:
        db.execute(
            text(
                """CREATE FUNCTION fill_up() RETURNS trigger LANGUAGE plpgsql AS
                   $$ BEGIN RAISE 'no space left on device' USING ERRCODE = 'disk_full'; END $$"""
            )
        )
        for table in ("mask", "asset"):
            db.execute(
                text(f"CREATE TRIGGER disk_is_full BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION fill_up()")
            )

    with pytest.raises(DBAPIError, match="no space left") as of_masks:
        record(engine, chunk, [labeled(chunk.first_asset_id)])
    with pytest.raises(DBAPIError, match="no space left") as of_assets:
        make_job(engine)

    assert is_passing(of_masks.value)
    assert is_passing(of_assets.value)
