from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from db import brake, deletion, jobs, leases, listing, metrics, progress, prompts, queue, results
from db.jobs import Job
from db.leases import LeaseLost, NewOutcome
from db.listing import NewAsset
from db.mask_rows import copy_masks
from db.results import StoredMask
from db.session import open_engine
from db.states import JobState
from orchestrator.jobs.dispatch import tick
from orchestrator.jobs.prepare import match_prompts
from orchestrator.prompts.files import read_prompts
from orchestrator.prompts.key_matching import Matching, Pair
from tests.factories import (
    LEASE_SECONDS,
    chunk_ids,
    claim,
    count,
    expire_lease,
    finish,
    labeled,
    make_job,
    pending,
    reap,
    record,
)
from tests.waiting import wait_for_lock
from workers.models.registry import find_model

pytestmark = pytest.mark.integration


def test_a_chunk_is_claimed_by_one_of_many_workers_at_once(engine: Engine) -> None:
    job = make_job(engine, keys=10)
    [chunk_id] = chunk_ids(engine, job)
    together = threading.Barrier(4)

    def try_to_claim(n: int) -> bool:
        together.wait()
        return claim(engine, chunk_id, worker=f"worker {n}") is not None

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(try_to_claim, range(4))) == 1


def test_an_outcome_is_stored_with_its_masks_exactly_as_given(engine: Engine) -> None:
    job = make_job(engine, keys=["a\tb\\n\n.jpg"])
    chunk = claim(engine, chunk_ids(engine, job)[0])
    [asset] = pending(engine, chunk)
    given = labeled(asset.id, masks=3)

    record(engine, chunk, [given])

    with engine.begin() as db:
        [stored] = results.labeled_assets(db, job_id=job.id)
    assert stored.key == "a\tb\\n\n.jpg"
    assert stored.size_hw == (3, 4)
    assert stored.masks == list(given.masks)


def test_a_mask_that_cannot_be_a_row_is_named_as_such_and_nothing_is_stored(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    [asset] = pending(engine, chunk)
    given = labeled(asset.id, masks=200)  # so that some are on their way before the row of the last is made
    too_large = replace(given.masks[-1], area_px=2**31)

    with pytest.raises(struct.error, match="2147483647"):  # not an error of Postgres, which would be tried again
        record(engine, chunk, [replace(given, masks=[*given.masks[:-1], too_large])])

    assert count(engine, job).labeled == 0
    record(engine, chunk, [given])
    assert count(engine, job).masks == 200


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_masks_are_on_their_way_is_no_error_of_postgres(
    engine: Engine, kind: type[BaseException]
) -> None:
    """That would be tried again, and the interrupt would be lost."""
    job = make_job(engine, keys=1)
    [asset] = pending(engine, claim(engine, chunk_ids(engine, job)[0]))

    def interrupted() -> Iterator[StoredMask]:
        yield from labeled(asset.id, masks=100).masks
        raise kind

    with pytest.raises(kind), engine.begin() as db:
        copy_masks(db, masks=interrupted())

    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM mask")).scalar_one() == 0


def test_recording_the_same_outcome_twice_keeps_the_first(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    [asset] = pending(engine, chunk)

    record(engine, chunk, [labeled(asset.id, masks=2)])
    record(engine, chunk, [labeled(asset.id, masks=5)])

    counts = count(engine, job)
    assert (counts.labeled, counts.masks) == (1, 2)


def test_a_worker_that_woke_after_its_lease_expired_writes_nothing(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    [chunk_id] = chunk_ids(engine, job)
    zombie = claim(engine, chunk_id, worker="zombie")
    asset_id = pending(engine, zombie)[0].id
    expire_lease(engine, zombie)
    assert reap(engine) == 1
    heir = claim(engine, chunk_id, worker="heir")

    with pytest.raises(LeaseLost):
        record(engine, zombie, [labeled(asset_id)])

    assert count(engine, job).labeled == 0
    record(engine, heir, [labeled(asset_id)])
    assert count(engine, job).labeled == 1


def test_an_expired_chunk_cannot_be_claimed_before_the_reaper_has_judged_what_was_in_flight(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    [chunk_id] = chunk_ids(engine, job)
    expire_lease(engine, claim(engine, chunk_id))

    assert claim(engine, chunk_id) is None
    reap(engine)
    assert claim(engine, chunk_id) is not None


def test_assets_in_flight_together_become_suspects_and_come_last(engine: Engine) -> None:
    job = make_job(engine, keys=5)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    ids = [asset.id for asset in pending(engine, chunk)]
    record(engine, chunk, in_flight=ids[:2])
    expire_lease(engine, chunk)
    reap(engine)

    again = pending(engine, claim(engine, chunk_id))

    assert [asset.id for asset in again] == ids[2:] + ids[:2]
    assert [asset.deaths_alone for asset in again] == [None, None, None, 0, 0]


def test_an_asset_that_dies_alone_three_times_is_failed_and_its_neighbours_are_not(engine: Engine) -> None:
    job = make_job(engine, keys=3)
    [chunk_id] = chunk_ids(engine, job)
    for _ in range(3):
        chunk = claim(engine, chunk_id)
        poison = pending(engine, chunk)[-1].id
        record(engine, chunk, in_flight=[poison])
        expire_lease(engine, chunk)
        assert count(engine, job).failed == 0
        reap(engine)

    assert count(engine, job).failed_by_kind == {"crashed_worker": 1}
    chunk = claim(engine, chunk_id)
    assert poison not in [asset.id for asset in pending(engine, chunk)]


def test_a_death_of_an_asset_that_has_its_outcome_does_not_count(engine: Engine) -> None:
    job = make_job(engine, keys=1)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    [asset] = pending(engine, chunk)
    record(engine, chunk, [labeled(asset.id)], in_flight=[asset.id])
    expire_lease(engine, chunk)
    reap(engine)

    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM suspect")).scalar_one() == 0


def test_two_dispatchers_at_once_send_no_chunk_twice_and_keep_to_the_window(engine: Engine) -> None:
    make_job(engine, keys=100, chunk_size=1)
    together = threading.Barrier(2)

    def take(_: int) -> list[int]:
        together.wait()
        with engine.begin() as db:
            return queue.take_window(db, window=30).all

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(take, range(2))
    assert not set(first) & set(second)
    with engine.begin() as db:
        # Two that count at the same time may both fill the room that they see. It is never more than that.
        assert 30 <= db.execute(text("SELECT count(*) FROM chunk WHERE state = 'sent'")).scalar_one() <= 60
        assert queue.take_window(db, window=30).all == []


def test_the_window_is_shared_in_turn_by_all_jobs(engine: Engine) -> None:
    large = make_job(engine, keys=50, chunk_size=1)
    small = make_job(engine, keys=3, chunk_size=1)

    with engine.begin() as db:
        taken = queue.take_window(db, window=6).all

    assert set(chunk_ids(engine, small)) <= set(taken)
    assert len(set(chunk_ids(engine, large)) & set(taken)) == 3


def test_a_chunk_whose_message_was_lost_is_sent_again(engine: Engine) -> None:
    make_job(engine, keys=1)
    with engine.begin() as db:
        sent = queue.take_window(db, window=5).all
        assert queue.resend_stale(db, resend_seconds=300, queue_is_empty=True) == 0
        db.execute(text("UPDATE chunk SET sent_at = now() - interval '301 s'"))
        assert queue.has_stale_sent(db, resend_seconds=300)
        assert queue.resend_stale(db, resend_seconds=300, queue_is_empty=True) == 1
        assert queue.take_window(db, window=5).all == sent


def test_the_share_of_time_with_the_model_at_work_is_counted_worker_by_worker_from_the_first_stored_batch(
    engine: Engine,
) -> None:
    job, quick = make_job(engine, keys=6), make_job(engine, keys=1)
    assets = [asset.id for one in (job, quick) for asset in pending(engine, claim(engine, chunk_ids(engine, one)[0]))]
    # (worker, second at which it stored a batch, milliseconds of the model's work on it)
    stored = [
        ("a", 0, 9000),
        ("a", 1, 900),
        ("a", 2, 700),
        ("b", 10, 9000),
        ("b", 14, 2000),
        ("c", 3, 50),
        ("c", 3, 50),
    ]
    with engine.begin() as db:
        for asset_id, (worker, second, ms) in zip(assets, stored, strict=True):
            db.execute(
                text(
                    """INSERT INTO outcome (asset_id, job_id, worker, segment_ms, created_at)
                       SELECT id, job_id, :worker, :ms, timestamptz '2026-01-01' + :second * interval '1 second'
                       FROM asset WHERE id = :id"""
                ),
                {"id": asset_id, "worker": worker, "second": second, "ms": ms},
            )

        assert jobs.model_busy_fraction(db, job_id=job.id) == pytest.approx((0.9 + 0.7 + 2.0) / (2 + 4))
        assert jobs.model_busy_fraction(db, job_id=quick.id) is None


def test_a_cancelled_job_takes_no_more_outcomes_and_goes_on_when_resumed(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    asset_id = pending(engine, chunk)[0].id
    with engine.begin() as db:
        assert jobs.cancel_job(db, job_id=job.id)

    with pytest.raises(LeaseLost):
        record(engine, chunk, [labeled(asset_id)])
    with engine.begin() as db:
        leases.release_chunk(db, chunk=chunk)
        assert queue.take_window(db, window=5).all == []
        assert jobs.resume_job(db, job_id=job.id)
        assert queue.take_window(db, window=5).returned == [chunk_id]


def test_a_job_is_done_when_it_is_listed_and_no_chunk_is_open(engine: Engine) -> None:
    job = make_job(engine, keys=3, chunk_size=2)
    for chunk_id in chunk_ids(engine, job):
        with engine.begin() as db:
            assert jobs.finish_jobs(db) == []
        chunk = claim(engine, chunk_id)
        record(engine, chunk, [labeled(asset.id) for asset in pending(engine, chunk)])
        finish(engine, chunk)

    with engine.begin() as db:
        assert jobs.get_job(db, job_id=job.id).state is JobState.DONE
        assert jobs.is_idle(db)
    counts = count(engine, job)
    assert counts.listed == counts.labeled + counts.failed + counts.pending == 3


def test_an_empty_listing_is_a_job_that_is_done(engine: Engine) -> None:
    job = make_job(engine, keys=0)
    with engine.begin() as db:
        assert jobs.finish_jobs(db) == [job.id]


def test_retry_runs_again_what_failed_for_that_reason_and_nothing_else(engine: Engine) -> None:
    job = make_job(engine, keys=3)
    [chunk_id] = chunk_ids(engine, job)
    chunk = claim(engine, chunk_id)
    gone, broken, fine = (asset.id for asset in pending(engine, chunk))
    failed = [NewOutcome(asset_id=gone, error_kind="not_found"), NewOutcome(asset_id=broken, error_kind="truncated")]
    record(engine, chunk, [*failed, labeled(fine)])
    finish(engine, chunk)

    with engine.begin() as db:
        assert jobs.retry_failed(db, job_id=job.id, error_kind="not_found") == 1
        assert jobs.get_job(db, job_id=job.id).state is JobState.RUNNING

    assert [asset.id for asset in pending(engine, claim(engine, chunk_id))] == [gone]


def test_an_asset_with_the_same_bytes_and_model_version_is_answered_from_what_is_stored(engine: Engine) -> None:
    first = make_job(engine, keys=3)
    chunk = claim(engine, chunk_ids(engine, first)[0])
    a, b, _ = pending(engine, chunk)
    record(engine, chunk, [labeled(a.id, masks=4), NewOutcome(asset_id=b.id, error_kind="truncated")])

    second = make_job(engine, keys=3)
    other_version = make_job(engine, keys=3, model_version="stub@55555555+11111111")
    for job, answered in ((second, 1), (other_version, 0)):
        chunk = claim(engine, chunk_ids(engine, job)[0])
        with engine.begin() as db:
            assert leases.answer_from_stored(db, chunk=chunk) == answered
        assert len(pending(engine, chunk)) == 3 - answered
    counts = count(engine, second)
    assert (counts.labeled, counts.masks, counts.reused) == (1, 4, 1)


def test_a_page_is_stored_once_however_many_listers_come_with_it(engine: Engine) -> None:
    with engine.begin() as db:
        job = jobs.insert_job(db, name="n", source="s3://b", model="stub", model_version="v", asked={}, fresh=False)
    page = {"assets": [NewAsset(key="a.jpg", size_bytes=1, etag="e")], "cursor": "a.jpg", "skipped": {"excluded": 2}}
    with engine.begin() as db:
        after = listing.add_assets(db, job=job, **page, complete=False, chunk_size=64)
        assert after.list_cursor == "a.jpg"
    with engine.begin() as db:
        assert listing.add_assets(db, job=job, **page, complete=False, chunk_size=64) is None
    with engine.begin() as db:
        done = listing.add_assets(
            db, job=after, assets=[], cursor=None, skipped={"excluded": 1}, complete=True, chunk_size=64
        )
    assert (done.asset_count, done.list_cursor, done.skipped) == (1, "a.jpg", {"excluded": 3})
    assert done.state is JobState.RUNNING


def test_a_running_chunk_cannot_be_without_a_lease(engine: Engine) -> None:
    from sqlalchemy.exc import IntegrityError

    make_job(engine, keys=1)
    with pytest.raises(IntegrityError, match="chunk_running_has_lease"), engine.begin() as db:
        db.execute(text("UPDATE chunk SET state = 'running'"))


def test_reports_about_bad_prompts_are_stored_whatever_the_file_and_its_ids_are_called(
    engine: Engine, tmp_path: Path
) -> None:
    category = {"id": "x\0", "name": "a"}
    annotations = [{"image_id": 1, "bbox": [1, 2, 3, 4], **also} for also in ({}, {"category_id": "x\0"})]
    document = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [category, {**category, "name": "b"}]}
    path = os.path.join(os.fsencode(tmp_path), b"not UTF-8 \xff.json")  # noqa: PTH118  pathlib knows only str
    Path(os.fsdecode(path)).write_text(json.dumps({**document, "annotations": annotations}))
    found = read_prompts(os.fsdecode(path), source="/photos", spec=find_model("sam_nano"), s3_endpoint=None)

    job = make_job(engine, keys=["a.jpg"], asked={"prompts": found.as_json()})
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=found.rows())
    found.stored.close()

    match_prompts(engine, job)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    with engine.begin() as db:
        [usable, bad] = prompts.prompts_of(db, asset_id=pending(engine, chunk)[0].id)
    assert usable == {"box_xyxy": [1, 2, 4, 6]}
    assert r"not UTF-8 \udcff.json, annotation 2: category_id x\x00 has two names" in bad["error"]


def test_prompts_of_one_key_are_joined_in_their_order_and_wait_to_be_matched(engine: Engine) -> None:
    job = make_job(engine, keys=["a/007.jpg", "b.jpg", "c.jpg"], asked={"prompts": {"format": "json-lines"}})
    rows = [
        ("a/007.jpg", '[{"n": 1}, {"n": 2}]'),
        ("c.jpg", "[]"),
        ("a/007.jpg", '[{"n": 3}]'),
        ("./b.jpg", '[{"n": 5}]'),
        ("7", '[{"n": 0}]'),
        ("gone\t\\.jpg", "[1]"),
    ]
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=rows)
    [chunk_id] = chunk_ids(engine, job)
    assert claim(engine, chunk_id) is None
    with engine.begin() as db:
        assert queue.take_window(db, window=5).all == []
        assert jobs.finish_jobs(db) == []
        assert [found.id for found in jobs.jobs_to_match(db)] == [job.id]

    match_prompts(engine, job)
    match_prompts(engine, job)  # a second dispatcher

    chunk = claim(engine, chunk_id)
    assert chunk is not None
    first, second, third = (asset.id for asset in pending(engine, chunk))
    with engine.begin() as db:
        assert jobs.jobs_to_match(db) == []
        assert prompts.prompted_assets(db, chunk=chunk) == {first, second}
        assert [prompt["n"] for prompt in prompts.prompts_of(db, asset_id=first)] == [0, 1, 2, 3]
        assert [prompt["n"] for prompt in prompts.prompts_of(db, asset_id=second)] == [5]
        assert prompts.prompts_of(db, asset_id=third) == []
        matched = jobs.get_job(db, job_id=job.id).matched  # type: ignore[union-attr]
    assert matched is not None
    assert matched["by_rule"] == {"key": 2, "other spelling": 1, "number": 1}
    assert (matched["unmatched"], matched["unmatched_first"]) == (1, ["gone\t\\.jpg"])
    assert (matched["several"], matched["assets_matched"]) == (0, 3)


def test_cancelling_a_job_frees_the_window_for_others_and_a_resumed_one_is_sent_again_at_once(engine: Engine) -> None:
    first, second = (make_job(engine, keys=4, chunk_size=1) for _ in range(2))
    with engine.begin() as db:
        assert len(queue.take_window(db, window=4).all) == 4
        assert queue.take_window(db, window=4).all == []

    with engine.begin() as db:
        jobs.cancel_job(db, job_id=first.id)
    with engine.begin() as db:
        sent = queue.take_window(db, window=4).all
    assert set(sent) <= set(chunk_ids(engine, second))
    assert sent

    with engine.begin() as db:
        jobs.cancel_job(db, job_id=second.id)
        jobs.resume_job(db, job_id=first.id)
        assert queue.take_window(db, window=4).all == chunk_ids(engine, first)


def test_a_returned_chunk_is_sent_before_others_and_though_the_window_is_full(engine: Engine) -> None:
    job = make_job(engine, keys=6, chunk_size=1)
    with engine.begin() as db:
        [first, *_] = queue.take_window(db, window=3).new
    assert claim(engine, first) is not None
    with engine.begin() as db:
        assert queue.take_window(db, window=2).all == []
        db.execute(text("UPDATE chunk SET lease_until = now() - interval '1 second' WHERE id = :id"), {"id": first})
        queue.reap(db)

        sent = queue.take_window(db, window=2)

    assert (sent.returned, sent.new) == ([first], [])
    assert chunk_ids(engine, job)[0] == first


def test_a_lost_message_is_noticed_though_the_queue_is_never_empty(engine: Engine) -> None:
    make_job(engine, keys=4, chunk_size=1)
    with engine.begin() as db:
        lost, waiting, overtaking, _ = queue.take_window(db, window=4).new
        age = "UPDATE chunk SET sent_at = now() - make_interval(secs => :secs) WHERE id = :id"
        for chunk_id, secs in ((lost, 500), (overtaking, 450), (waiting, 400)):
            db.execute(text(age), {"id": chunk_id, "secs": secs})
    with engine.begin() as db:
        assert queue.resend_stale(db, resend_seconds=300, queue_is_empty=False) == 0  # all may still wait

    claim(engine, overtaking)

    with engine.begin() as db:
        assert queue.resend_stale(db, resend_seconds=300, queue_is_empty=False) == 1
        assert queue.take_window(db, window=4).new == [lost]


def test_pairs_that_take_long_to_sort_hold_no_transaction_that_postgres_ends(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(engine, keys=["a.jpg", "b.jpg"], asked={"prompts": {"format": "json-lines"}})
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=[("a", '[{"n": 1}]'), ("b", '[{"n": 2}]')])
    usual = Matching.pairs

    def slow(matching: Matching, *, exact: bool = True) -> Iterator[Pair]:
        time.sleep(6)
        yield from usual(matching, exact=exact)

    monkeypatch.setattr(Matching, "pairs", slow)
    # No shorter: on a busy machine a small statement may take a second.
    hasty = open_engine(database_url, statement_timeout_seconds=5)

    match_prompts(hasty, job)
    hasty.dispose()

    with engine.begin() as db:
        assert jobs.jobs_to_match(db) == []
        assert db.execute(text("SELECT count(*) FROM prompt_match")).scalar_one() == 2


def test_a_job_that_is_deleted_while_its_prompts_are_matched_stops_no_dispatcher(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(engine, keys=["a.jpg", "b.jpg"], asked={"prompts": {"format": "json-lines"}})
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=[("a", '[{"n": 1}]'), ("b", '[{"n": 2}]')])
    usual = Matching.pairs

    def beside_a_deletion(matching: Matching, *, exact: bool = True) -> Iterator[Pair]:
        with engine.begin() as db:
            assert jobs.cancel_job(db, job_id=job.id)
            assert deletion.begin_deletion(db, job_id=job.id)
            assert deletion.delete_chunks(db, job_id=job.id, most=1) is not None
        yield from usual(matching, exact=exact)

    monkeypatch.setattr(Matching, "pairs", beside_a_deletion)

    match_prompts(engine, job)

    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM prompt_match")).scalar_one() == 0


def test_a_job_whose_prompts_mean_other_assets_is_not_answered_from_stored(engine: Engine) -> None:
    asked = {"prompts": {"format": "json-lines"}}
    made = []
    for keys in (["sub/a.jpg"], ["sub/a.jpg", "z/a.jpg"]):
        job = make_job(engine, keys=keys, asked=asked)
        with engine.begin() as db:
            prompts.store_prompts(db, job_id=job.id, rows=[("old/a.jpg", '[{"n": 1}]')])
        match_prompts(engine, job)
        chunk = claim(engine, chunk_ids(engine, job)[0])
        assert chunk is not None
        made.append(chunk)
        with engine.begin() as db:
            assert leases.answer_from_stored(db, chunk=chunk) == 0
            prompted = prompts.prompted_assets(db, chunk=chunk)
        if len(made) == 1:
            assert len(prompted) == 1
            record(engine, chunk, [labeled(next(iter(prompted)))])
    assert prompted == set()


def test_a_late_report_of_a_dead_process_ends_no_lease_of_its_successor(engine: Engine) -> None:
    [chunk_id] = chunk_ids(engine, make_job(engine, keys=1))
    with engine.begin() as db:
        leases.claim_chunk(db, chunk_id=chunk_id, worker="cpu0@host", lease_seconds=-1, pid=100)
    reap(engine)
    with engine.begin() as db:  # the message came twice: the worker's next process takes the chunk
        successor = leases.claim_chunk(db, chunk_id=chunk_id, worker="cpu0@host", lease_seconds=60, pid=200)
    assert successor is not None

    with engine.begin() as db:
        queue.expire_lease(db, chunk_id=chunk_id, worker="cpu0@host", pid=100)
    assert reap(engine) == 0

    with engine.begin() as db:
        queue.expire_lease(db, chunk_id=chunk_id, worker="cpu0@host", pid=200)
    assert reap(engine) == 1


def test_bytes_that_had_changed_answer_later_jobs_under_their_own_etag(engine: Engine) -> None:
    first = make_job(engine, keys=["a.jpg", "b.jpg"])
    chunk = claim(engine, chunk_ids(engine, first)[0])
    a, b = pending(engine, chunk)
    record(engine, chunk, [replace(labeled(a.id), etag="etag-of-new-bytes"), labeled(b.id)])

    old_again = claim(engine, chunk_ids(engine, make_job(engine, keys=["a.jpg", "b.jpg"]))[0])
    with engine.begin() as db:
        assert leases.answer_from_stored(db, chunk=old_again) == 1  # b.jpg; nobody computed a.jpg's listed bytes
    new = make_job(engine, keys=["a.jpg"])
    with engine.begin() as db:
        db.execute(
            text("UPDATE asset SET etag = 'etag-of-new-bytes', size_bytes = 11 WHERE job_id = :id"), {"id": new.id}
        )
        assert leases.answer_from_stored(db, chunk=claim(engine, chunk_ids(engine, new)[0])) == 1
    assert count(engine, first).changed == 1


def test_a_listing_that_fails_for_a_passing_reason_is_tried_for_an_hour_with_growing_pauses(engine: Engine) -> None:
    with engine.begin() as db:
        job = jobs.insert_job(db, name="", source="s3://b/p", model="stub", model_version="v", asked={}, fresh=False)

    def fail() -> tuple[Job, float]:
        with engine.begin() as db:
            jobs.record_list_failure(db, job=job, error="the store is busy", lasting=False)
            pause = db.execute(text("SELECT extract(epoch FROM list_retry_at - now()) FROM job")).scalar_one()
            return jobs.get_job(db, job_id=job.id), float(pause)

    tries = [fail() for _ in range(20)]
    assert [round(pause) for _, pause in tries[:4]] == [1, 2, 4, 8]
    assert round(tries[-1][1]) == 300
    assert tries[-1][0].state == "listing"
    assert "the store is busy (try 20; the next is in 300 s)" in str(tries[-1][0].error)
    with engine.begin() as db:
        assert jobs.jobs_to_list(db) == []
        db.execute(text("UPDATE job SET list_retry_at = now()"))
        assert [found.id for found in jobs.jobs_to_list(db)] == [job.id]
        db.execute(text("UPDATE job SET list_failing_since = now() - interval '61 minutes'"))
    assert fail()[0].state == "failed"
    with engine.begin() as db:
        jobs.resume_job(db, job_id=job.id)
        assert [found.id for found in jobs.jobs_to_list(db)] == [job.id]


def test_an_hour_without_a_dispatcher_does_not_count_as_an_hour_of_tries(engine: Engine) -> None:
    with engine.begin() as db:
        job = jobs.insert_job(db, name="", source="s3://b/p", model="stub", model_version="v", asked={}, fresh=False)
        jobs.record_list_failure(db, job=job, error="the store is busy", lasting=False)
        night = "list_failing_since = now() - interval '8 hours', list_retry_at = now() - interval '8 hours'"
        db.execute(text(f"UPDATE job SET {night}"))

        jobs.record_list_failure(db, job=job, error="the store is busy", lasting=False)

        assert jobs.get_job(db, job_id=job.id).state == "listing"
        db.execute(text("UPDATE job SET list_failing_since = now() - interval '61 minutes'"))
        jobs.record_list_failure(db, job=job, error="the store is busy", lasting=False)
        assert jobs.get_job(db, job_id=job.id).state == "failed"


def test_a_job_of_which_too_many_assets_fail_is_paused_with_the_reasons_and_goes_on_when_resumed(
    engine: Engine,
) -> None:
    job = make_job(engine, keys=4000, chunk_size=500)
    todo = chunk_ids(engine, job)

    def work(failed: int) -> list[brake.Paused]:
        """One chunk with so many failures, and what the brake does then."""
        chunk = claim(engine, todo.pop(0))
        assets = pending(engine, chunk)
        verdicts = ["forbidden"] * (failed - 1) + ["not_image"] * min(failed, 1)
        outcomes = [
            NewOutcome(asset_id=asset.id, error_kind=kind, error=f"{asset.key} is {kind}")
            for asset, kind in zip(assets, verdicts, strict=False)
        ]
        record(engine, chunk, [*outcomes, *(labeled(asset.id, masks=0) for asset in assets[failed:])])
        finish(engine, chunk)
        with engine.begin() as db:
            return brake.pause_failing_jobs(db)

    assert work(failed=500) == []  # only 500 are judged
    [paused] = work(failed=250)

    assert "750 of 1,000 assets failed, more than --max-failed-fraction 0.5" in paused.reason
    assert "748 forbidden, such as" in paused.reason
    with engine.begin() as db:
        assert jobs.get_job(db, job_id=job.id).state == "paused"
        assert queue.take_window(db, window=10).all == []
        assert jobs.resume_job(db, job_id=job.id)
        assert brake.pause_failing_jobs(db) == []
    assert [work(failed) for failed in (500, 0)] == [[], []]  # half of what came after the pause
    assert len(work(failed=500)) == 1


def test_a_brake_that_meets_a_retry_needs_no_example(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(engine, keys=1000, chunk_size=500)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    record(engine, chunk, [NewOutcome(asset_id=asset.id, error_kind="forbidden") for asset in pending(engine, chunk)])
    monkeypatch.setattr(brake, "MIN_JUDGED_ASSETS", 500)
    last_errors = progress.last_errors

    def retried(db: Connection, *, job_id: int) -> list[progress.LastError]:
        with engine.begin() as other:
            assert jobs.retry_failed(other, job_id=job_id, error_kind=None) == 500
        return last_errors(db, job_id=job_id)

    monkeypatch.setattr(progress, "last_errors", retried)

    with engine.begin() as db:
        [paused] = brake.pause_failing_jobs(db)

    assert "500 forbidden" in paused.reason


def test_a_retry_of_one_kind_of_failures_has_the_others_not_judged_again(engine: Engine) -> None:
    job = make_job(engine, keys=2000, chunk_size=1000)
    first, second = chunk_ids(engine, job)

    def work(chunk_id: int, *, failed: int) -> list[brake.Paused]:
        chunk = claim(engine, chunk_id)
        assets = pending(engine, chunk)
        failures = [
            NewOutcome(asset_id=asset.id, error_kind="forbidden" if n else "not_found")
            for n, asset in enumerate(assets[:failed])
        ]
        record(engine, chunk, [*failures, *(labeled(asset.id, masks=0) for asset in assets[failed:])])
        finish(engine, chunk)
        with engine.begin() as db:
            return brake.pause_failing_jobs(db)

    assert len(work(first, failed=1000)) == 1
    with engine.begin() as db:
        assert jobs.resume_job(db, job_id=job.id)
        assert jobs.retry_failed(db, job_id=job.id, error_kind="not_found") == 1

    assert work(first, failed=0) == []
    with engine.begin() as db:
        assert jobs.retry_failed(db, job_id=job.id, error_kind=None) == 999
    assert work(second, failed=0) == []
    assert work(first, failed=999) == []  # of 2,000 that came after the pause


def test_a_job_may_ask_for_its_own_brake(engine: Engine) -> None:
    for fraction in (0.0, 1.0):
        job = make_job(engine, keys=1100, chunk_size=1000, asked={"max_failed_fraction": fraction})
        chunk = claim(engine, chunk_ids(engine, job)[0])
        assets = pending(engine, chunk)
        kind = {"error_kind": "not_image", "error": "no"}
        failed = [NewOutcome(asset_id=asset.id, **kind) for asset in assets[: 1 if fraction == 0 else 1000]]
        record(engine, chunk, [*failed, *(labeled(asset.id, masks=0) for asset in assets[len(failed) :])])
        finish(engine, chunk)
        with engine.begin() as db:
            assert [paused.job_id for paused in brake.pause_failing_jobs(db)] == ([job.id] if fraction == 0 else [])


def test_a_retry_may_take_longer_than_other_statements(engine: Engine, database_url: str) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    record(engine, chunk, [NewOutcome(asset_id=asset.id, error_kind="forbidden") for asset in pending(engine, chunk)])
    hasty = open_engine(database_url, statement_timeout_seconds=3)  # no shorter: see above

    def retry() -> int:
        with hasty.begin() as db:
            return jobs.retry_failed(db, job_id=job.id, error_kind=None)

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as db:
            leases.extend_lease(db, chunk=chunk, lease_seconds=LEASE_SECONDS)  # its row stays locked
            retrying = pool.submit(retry)
            wait_for_lock(engine)
            time.sleep(3.5)
        assert retrying.result() == 1
    hasty.dispose()


def test_a_chunk_that_died_with_a_cancelled_job_is_not_overdue(engine: Engine) -> None:
    job = make_job(engine)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    with engine.begin() as db:
        assert jobs.cancel_job(db, job_id=job.id)
    expire_lease(engine, chunk)
    assert not tick(engine)  # nothing is at work, so nothing is taken back

    with engine.begin() as db:
        assert list(metrics.lease_overdue(db)) == []
        assert dict(metrics.oldest_chunks(db)) == {("sent",): 0, ("running",): 0}
        assert jobs.resume_job(db, job_id=job.id)
        assert next(iter(metrics.lease_overdue(db)))[1] > 0


def test_the_rate_of_a_job_leaves_out_the_batch_whose_time_nobody_knows(engine: Engine) -> None:
    job = make_job(engine, keys=6)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    ids = [asset.id for asset in pending(engine, chunk)]

    def rate() -> float | None:
        with engine.begin() as db:
            return progress.assets_per_second(db, job_id=job.id)

    record(engine, chunk, [labeled(asset_id) for asset_id in ids[:2]])
    with engine.begin() as db:
        db.execute(text("UPDATE chunk SET sent_at = now() - interval '1 minute'"))
        db.execute(text("UPDATE outcome SET created_at = now() - interval '5 minutes'"))
    assert rate() is None

    record(engine, chunk, [labeled(asset_id) for asset_id in ids[2:]])
    assert rate() == pytest.approx(4 / 300, rel=0.2)
