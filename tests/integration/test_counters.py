"""Counters are exact whoever writes: workers of this version and of older ones, and before the counters were there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from sqlalchemy import Connection, Engine, event, text

from db import counters, jobs, leases, metrics, progress, prompts, published, publishing, results
from db.jobs import Job
from db.leases import NewOutcome
from db.migrating import migrate, migration_config
from db.publishing import Intent, LsProject
from db.results import StoredMask
from db.session import open_engine
from db.states import MaskCount
from tests.factories import chunk_ids, claim, count, delete, labeled, make_job, pending, record
from tests.waiting import wait_for_lock

pytestmark = pytest.mark.integration


def mask_of(asset_id: int, n: int, *, iou: float, label: str | None = None, phrase: str | None = None) -> StoredMask:
    return StoredMask(
        asset_id=asset_id,
        n=n,
        counts="01",
        bbox_xywh=(0, 0, 1, 1),
        area_px=1,
        predicted_iou=iou,
        stability_score=None,
        label=label,
        prompt=None if phrase is None else {"text": phrase},
    )


def found_of(engine: Engine, job: Job) -> list[object]:
    with engine.begin() as db:
        return [
            results.labels_of(db, job_id=job.id),
            results.masks_per_asset(db, job_id=job.id),
            results.predicted_iou_percents(db, job_id=job.id),
            prompts.classes_of(db, job_id=job.id),
        ]


def test_what_is_counted_is_what_the_masks_say_also_of_answers_and_of_masks_of_an_older_worker(engine: Engine) -> None:
    job = make_job(engine, keys=3)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    first, second, third = (asset.id for asset in pending(engine, chunk))
    masks = [
        mask_of(first, 0, iou=0.9, label="red bus", phrase="bus"),  # 0.9 as a REAL is below 0.9
        mask_of(first, 1, iou=1.25, label="bus " * 5000, phrase="bus"),  # a label that no index takes
        mask_of(first, 2, iou=float("nan"), phrase="car"),
        mask_of(first, 3, iou=-0.5),
    ]
    record(engine, chunk, [NewOutcome(asset_id=first, width=4, height=3, masks=masks)])
    record(engine, chunk, [labeled(second, masks=0), NewOutcome(asset_id=third)])  # the third was not looked at

    with engine.begin() as db:
        counted = counters.read_masks(db, job_id=job.id, kind=MaskCount.IOU_PERCENT)
        totals = progress.totals(db, job_ids=[job.id])[job.id]
    assert counted == {"0": 1, "89": 1, "99": 1, "NaN": 1}
    assert (totals.labeled, totals.failed, totals.masks) == (3, 0, 4)
    expected = [["bus " * 5000, "red bus"], {0: 1, 4: 1}, {0: 1, 89: 1, 99: 1}, {"bus": 2, "car": 1}]
    assert found_of(engine, job) == expected
    answered = make_job(engine, keys=3)
    with engine.begin() as db:
        assert leases.answer_from_stored(db, chunk=claim(engine, chunk_ids(engine, answered)[0])) == 3
    assert found_of(engine, answered) == expected

    with engine.begin() as db:  # a worker of an older version wrote these masks: it does not count them
        db.execute(text("DELETE FROM mask_counter WHERE job_id = :id AND slot % 2 = 0"), {"id": job.id})
        db.execute(text("DELETE FROM mask_counter WHERE job_id = :id"), {"id": answered.id})
    assert found_of(engine, job) == found_of(engine, answered) == expected


def test_masks_that_are_stored_meanwhile_do_not_seem_to_have_no_label(engine: Engine, database_url: str) -> None:
    job = make_job(engine, keys=9)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    left = [
        NewOutcome(asset_id=asset.id, width=4, height=3, masks=[mask_of(asset.id, 0, iou=0.5, label="a")])
        for asset in pending(engine, chunk)
    ]
    record(engine, chunk, [left.pop()])
    looking = open_engine(database_url)

    @event.listens_for(looking, "after_cursor_execute")
    def store(_: object, __: object, statement: str, *___: object) -> None:
        if "mask_counter" in statement:
            record(engine, chunk, [left.pop()])

    with looking.begin() as db:
        assert not results.has_masks_without_label(db, job_id=job.id)
    looking.dispose()
    assert len(left) < 8


def test_masks_are_counted_after_outcomes_by_all_so_that_no_two_wait_for_each_other(engine: Engine) -> None:
    earlier = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, earlier)[0])
    record(engine, chunk, [labeled(chunk.first_asset_id)])
    job = make_job(engine, keys=2, chunk_size=1)
    answered, looked_at = (claim(engine, chunk_id) for chunk_id in chunk_ids(engine, job))
    slot = "SELECT pg_current_xact_id()::text::bigint % 32"

    def answer() -> int:
        with engine.connect() as db:
            while db.execute(text(slot)).scalar_one() != taken:
                db.rollback()
            found = leases.answer_from_stored(db, chunk=answered)
            db.commit()
            return found

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as db:
            taken = db.execute(text(slot)).scalar_one()
            outcome = {"asset_id": looked_at.first_asset_id, "job_id": job.id}
            db.execute(text("INSERT INTO outcome (asset_id, job_id, width) VALUES (:asset_id, :job_id, 4)"), outcome)
            answering = pool.submit(answer)
            wait_for_lock(engine)
            counters.add_masks(db, job_id=job.id, numbers={(MaskCount.MASKS_AN_ASSET, "1"): 1})
        assert answering.result() == 1


def test_a_filled_database_is_brought_to_counters_and_partitions_and_back_without_a_loss(
    engine: Engine, database_url: str
) -> None:
    job = make_job(engine, keys=8, chunk_size=4)
    one, two = (claim(engine, chunk_id) for chunk_id in chunk_ids(engine, job))
    failed, *good = (asset.id for asset in pending(engine, one))
    record(engine, one, [NewOutcome(asset_id=failed, error_kind="truncated"), *(labeled(n, masks=2) for n in good)])
    before, found = count(engine, job), found_of(engine, job)
    engine.dispose()
    config = migration_config(database_url)

    command.downgrade(config, "0007")
    command.upgrade(config, "0010")
    # Written between two migrations, by a worker of the older version.
    with engine.begin() as db:
        db.execute(
            text("INSERT INTO outcome (asset_id, job_id, mask_count, width) VALUES (:id, :job, 0, 4)"),
            {"id": two.first_asset_id, "job": job.id},
        )
    engine.dispose()
    migrate(database_url)

    after = count(engine, job)
    assert (after.labeled, after.failed_by_kind) == (before.labeled + 1, before.failed_by_kind)
    assert (after.masks, after.listed, after.changed) == (before.masks, before.listed, before.changed)
    labels, per_asset, percents, _ = found_of(engine, job)
    assert (labels, percents) == (found[0], found[2])
    assert per_asset == {0: 1, 2: 3}
    record(engine, two, [labeled(asset.id, masks=1) for asset in pending(engine, two)])
    with engine.begin() as db:
        assert jobs.retry_failed(db, job_id=job.id, error_kind=None) == 1
        [*_, newest] = results.labeled_assets(db, job_id=job.id)
    assert len(newest.masks) == 1
    assert (count(engine, job).labeled, count(engine, job).failed) == (7, 0)


AS_STORED = """SELECT server, project_id, state, count(*), sum(mask_count - left_out), sum(left_out),
                      round(sum(iou_sum)::numeric, 3)
               FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id WHERE p.job_id = :job
               GROUP BY server, project_id, state ORDER BY 1, 2, 3"""
AS_COUNTED = """SELECT server, project_id, state, sum(predictions), sum(masks_shown), sum(masks_left_out),
                       round(sum(iou_sum)::numeric, 3)
                FROM prediction_counter WHERE job_id = :job
                GROUP BY server, project_id, state HAVING sum(predictions) <> 0 ORDER BY 1, 2, 3"""


def same_predictions(engine: Engine, job: Job) -> list[object]:
    """What the counter says, which must be what is stored."""
    with engine.begin() as db:
        stored, counted = (db.execute(text(s), {"job": job.id}).all() for s in (AS_STORED, AS_COUNTED))
    assert counted == stored
    return [tuple(row) for row in counted]


def test_what_waits_for_its_publication_has_a_prompt(engine: Engine) -> None:
    """An asset without one is labeled, but no task is made of it."""
    job, project = make_job(engine, keys=4), LsProject("http://ls", 1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    first, second, *others = (asset.id for asset in pending(engine, chunk))
    record(engine, chunk, [labeled(first), labeled(second), *(NewOutcome(asset_id=other) for other in others)])
    intent = Intent(asset_uid="a", uri="a", asset_id=first, mask_count=1, left_out=0, iou_sum=1, iou_min=1, error=None)

    with engine.begin() as db:
        ids = publishing.write_intents(db, ls_project=project, job_id=job.id, model_version="v", intents=[intent])
        publishing.mark_done(db, ls_project=project, model_version="v", task_ids={ids["a"]: 1})
        assert list(metrics.unpublished(db)) == [((str(job.id), "1"), 1)]


def test_predictions_are_counted_whoever_writes_or_deletes_them_and_those_from_before(
    engine: Engine, database_url: str
) -> None:
    job, here, there = make_job(engine, keys=8), LsProject("http://ls", 1), LsProject("http://ls", 2)
    first = pending(engine, claim(engine, chunk_ids(engine, job)[0]))[0].id

    def intend(db: Connection, project: LsProject, **ious: float | None) -> dict[str, int]:
        intents = [
            Intent(
                asset_uid=uid,
                uri=uid,
                asset_id=first,
                mask_count=4,
                left_out=1,
                iou_sum=2.5,
                iou_min=iou,
                error=None if iou is not None else "no",
            )
            for uid, iou in ious.items()
        ]
        return publishing.write_intents(db, ls_project=project, job_id=job.id, model_version="v", intents=intents)

    with engine.begin() as db:
        ids = intend(db, here, a=0.9, b=0.7, c=None, d=0.8)
        other = intend(db, there, a=0.5)
        publishing.mark_done(db, ls_project=here, model_version="v", task_ids={ids["a"]: 1, ids["b"]: 2, ids["d"]: 4})
        publishing.mark_done(db, ls_project=there, model_version="v", task_ids={other["a"]: 1})
    assert len(same_predictions(engine, job)) == 3
    with engine.begin() as db:
        [mine, others] = published.published(db, job_id=job.id)
        assert (mine.assets, mine.refused, mine.masks_shown, mine.masks_left_out) == (3, 1, 9, 3)
        assert (mine.iou_worst, mine.iou_mean) == (pytest.approx(0.7), pytest.approx(7.5 / 9))
        assert (others.assets, others.iou_worst) == (1, pytest.approx(0.5))
        publishing.forget_tasks(db, ls_task_ids=[ids["b"]])  # a task goes with its predictions
        publishing.forget_refused(db, ls_project=here, job_id=job.id)
        intend(db, here, a=0.6)  # sent again
    assert len(same_predictions(engine, job)) == 3
    engine.dispose()

    command.downgrade(migration_config(database_url), "0013")
    with engine.begin() as db:
        db.execute(text("UPDATE ls_prediction SET left_out = 2 WHERE state = 'done'"))
    engine.dispose()
    migrate(database_url)

    assert len(same_predictions(engine, job)) == 3
    with engine.begin() as db:
        db.execute(text("UPDATE ls_prediction SET state = 'done'"))
        db.execute(text("DELETE FROM ls_prediction WHERE ls_task_id = :id"), {"id": other["a"]})
    assert [row[1:4] for row in same_predictions(engine, job)] == [(1, "done", 2)]  # type: ignore[index]
    delete(engine, job)
    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM prediction_counter")).scalar_one() == 0
        assert db.execute(text("SELECT count(*) FROM ls_prediction")).scalar_one() == 2  # published tasks stay
        db.execute(text("DELETE FROM ls_task"))
        assert db.execute(text("SELECT count(*) FROM prediction_counter")).scalar_one() == 0
