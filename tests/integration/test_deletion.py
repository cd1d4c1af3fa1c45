"""`delete`: what goes, what stays, and that it goes on after it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from db import deletion, embeddings, jobs, leases, listing, prompts, results
from db.jobs import Job
from db.listing import NewAsset
from db.partitions import PARTITION_ASSETS, partitions
from orchestrator.jobs.delete import JobRunsError, delete_job
from tests.factories import chunk_ids, claim, count, delete, finish, labeled, make_job, pending, record
from workers.embeddings.store import EmbeddingStore
from workers.storage.objects import open_objects

pytestmark = pytest.mark.integration

_OF_JOBS = ("asset", "chunk", "outcome", "mask", "outcome_counter", "mask_counter", "worker_time", "prompt", "suspect")


def rows(engine: Engine) -> dict[str, int]:
    """How many rows each table of jobs has."""
    with engine.begin() as db:
        return {
            table: db.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in (*_OF_JOBS, "embedding")
        }


def labeled_job(engine: Engine, keys: int = 4) -> Job:
    job = make_job(engine, keys=keys, chunk_size=2, fresh=True)
    with engine.begin() as db:
        prompts.store_prompts(db, job_id=job.id, rows=[("0001.jpg", "[1]")])
    for chunk_id in chunk_ids(engine, job):
        chunk = claim(engine, chunk_id)
        record(engine, chunk, [labeled(asset.id, masks=3) for asset in pending(engine, chunk)])
        finish(engine, chunk)
    return job


def test_a_deleted_job_leaves_nothing_and_takes_nothing_of_others(engine: Engine) -> None:
    kept = labeled_job(engine)
    before = rows(engine)
    job = labeled_job(engine)

    delete(engine, job)

    assert rows(engine) == before
    with engine.begin() as db:
        assert [found.id for found in jobs.list_jobs(db, limit=9)] == [kept.id]
        assert len(list(results.labeled_assets(db, job_id=kept.id))) == 4


def test_a_job_at_work_is_not_deleted_and_a_cancelled_one_takes_no_late_outcome(engine: Engine) -> None:
    job = make_job(engine, keys=2)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    with pytest.raises(JobRunsError, match="maskfleet cancel"):
        delete_job(engine, job.id, store=None)

    delete(engine, job)

    with pytest.raises(leases.LeaseLost):
        record(engine, chunk, [labeled(chunk.first_asset_id)])
    assert not any(rows(engine).values())


def test_a_deletion_that_was_interrupted_is_found_by_no_command_and_goes_on(engine: Engine) -> None:
    job, later = labeled_job(engine), make_job(engine, keys=4)
    with engine.begin() as db:
        assert deletion.begin_deletion(db, job_id=job.id)
        assert deletion.delete_chunks(db, job_id=job.id, most=1).masks == 6

    with engine.begin() as db:
        assert jobs.get_job(db, job_id=job.id) is None
        assert not jobs.resume_job(db, job_id=job.id)
        assert deletion.begun_deletions(db) == [job.id]
        # Half of its assets are still there with their masks, and answer nobody.
        assert leases.answer_from_stored(db, chunk=claim(engine, chunk_ids(engine, later)[0])) == 0
    delete_job(engine, job.id, store=None)

    found = rows(engine)
    assert (found["asset"], found["mask"], found["outcome"]) == (4, 0, 0)
    assert count(engine, later).pending == 4
    with engine.begin() as db:
        assert deletion.begun_deletions(db) == []


def test_an_export_that_reads_a_job_while_it_is_deleted_ends_with_an_error(engine: Engine) -> None:
    job = labeled_job(engine)
    with engine.connect() as db:
        exported = results.labeled_assets(db, job_id=job.id, page=2)
        assert len(next(exported).masks) == 3
        with engine.begin() as other:
            deletion.begin_deletion(other, job_id=job.id)
            deletion.delete_chunks(other, job_id=job.id, most=1)

        with pytest.raises(LookupError, match="was deleted while its masks were read"):
            list(exported)


def test_partitions_that_are_the_jobs_alone_are_emptied_at_once(engine: Engine) -> None:
    jump = "SELECT setval('asset_id_seq', :id)"
    with engine.begin() as db:
        first = partitions(db)[0].bound
        db.execute(text(jump), {"id": first - 4})
    shared = labeled_job(engine, keys=2)
    job = labeled_job(engine, keys=4)  # begins in the partition of the other job, and fills the next one
    with engine.begin() as db:
        db.execute(text(jump), {"id": first + PARTITION_ASSETS + 5})
        assert [p.first for p in deletion.whole_partitions(db, job_id=job.id)] == [first]
        assert deletion.whole_partitions(db, job_id=shared.id) == []

    delete(engine, job)

    found = rows(engine)
    assert (found["asset"], found["mask"]) == (2, 6)
    assert count(engine, shared).masks == 6


def test_a_partition_in_which_a_listing_has_assets_that_are_not_committed_is_not_emptied(engine: Engine) -> None:
    jump = "SELECT setval('asset_id_seq', :id)"
    with engine.begin() as db:
        first = partitions(db)[0].bound
        db.execute(text(jump), {"id": first})
    job = labeled_job(engine)
    with engine.begin() as db:
        db.execute(text(jump), {"id": first + PARTITION_ASSETS - 4})
        later = jobs.insert_job(
            db, name="", source="s3://later", model="stub", model_version="stub@5+5", asked={}, fresh=True
        )
    with engine.begin() as lister:
        page = [NewAsset(key=str(n), size_bytes=1, etag="") for n in range(6)]
        listing.add_assets(lister, job=later, assets=page, cursor="5", skipped={}, complete=True, chunk_size=6)
        with engine.begin() as db:
            deletion.begin_deletion(db, job_id=job.id)
            [whole] = deletion.whole_partitions(db, job_id=job.id)
    chunk = claim(engine, chunk_ids(engine, later)[0])
    record(engine, chunk, [labeled(asset.id) for asset in pending(engine, chunk)])

    with pytest.raises(deletion.SharedPartition), engine.begin() as db:
        deletion.empty_partition(db, job_id=job.id, partition=whole)
    delete_job(engine, job.id, store=None)

    assert rows(engine)["mask"] == count(engine, later).masks == 6


def test_partitions_are_made_before_assets_need_them(engine: Engine) -> None:
    with engine.begin() as db:
        bound = partitions(db)[-1].bound
        db.execute(text("SELECT setval('asset_id_seq', :id)"), {"id": bound - 2})

    labeled_job(engine, keys=6)

    with engine.begin() as db:
        assert partitions(db)[-1].bound >= bound + PARTITION_ASSETS
        assert db.execute(text(f"SELECT count(*) FROM mask_part_{bound}")).scalar_one() > 0


def test_kept_embeddings_go_with_their_job_rows_before_bytes(engine: Engine, tmp_path: Path) -> None:
    job, other = labeled_job(engine, keys=1), labeled_job(engine, keys=1)
    store = EmbeddingStore(open_objects(str(tmp_path)))
    addresses = [f"d10efaca/fp16/{n:032x}" for n in range(2)]
    for one, address in zip((job, other), addresses, strict=True):
        store.write(address, b"bytes")
        with engine.begin() as db:
            asset_id = db.execute(text("SELECT id FROM asset WHERE job_id = :id"), {"id": one.id}).scalar_one()
            embeddings.want(db, addresses={asset_id: address})
            embeddings.record_stored(db, sizes={address: 5})

    delete_job(engine, job.id, store=store)

    assert rows(engine)["embedding"] == 1
    assert [found.name for found in store.stored()] == [addresses[1]]
