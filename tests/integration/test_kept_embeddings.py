"""Kept embeddings with a real Postgres and a real S3 server: wanted, claimed, made, kept by a job, swept."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from PIL import Image
from sqlalchemy import Engine, text

from db import embeddings, jobs, listing
from db.embedding_sweep import sweep_lock
from db.jobs import Job
from db.listing import NewAsset
from db.settings import Settings, settings
from db.states import EmbeddingState
from orchestrator.assist.health import kept_embeddings
from tests.factories import chunk_ids, count, delete, make_job
from tests.s3_server import serve_s3
from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, embedding_of
from workers.embeddings.codec import decode
from workers.embeddings.store import EmbeddingStore
from workers.embeddings.sweep import Swept, sweep
from workers.models.files import model_version
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.running.chunk import run_chunk
from workers.running.embedding import embed_wanted
from workers.running.worker import Worker
from workers.storage.objects import open_objects
from workers.storage.source import open_source
from workers.training.scenes import draw_scene

pytestmark = pytest.mark.integration

WANTED, STORED, FAILED = EmbeddingState.WANTED, EmbeddingState.STORED, EmbeddingState.FAILED
NANO = find_model("sam_nano")


def address(n: int) -> str:
    return f"d10efaca/fp16/{n:032x}"


def asset_ids(engine: Engine, job: Job) -> list[int]:
    with engine.begin() as db:
        found = db.execute(text("SELECT id FROM asset WHERE job_id = :id ORDER BY id"), {"id": job.id})
        return list(found.scalars())


def want(engine: Engine, addresses: dict[int, str]) -> dict[str, EmbeddingState]:
    with engine.begin() as db:
        return embeddings.want(db, addresses=addresses)


def rows(engine: Engine) -> dict[str, Any]:
    with engine.begin() as db:
        found = db.execute(text("SELECT * FROM embedding ORDER BY id")).mappings()
        return {row["address"]: row for row in found}


def states(engine: Engine) -> list[str]:
    return [row["state"] for row in rows(engine).values()]


def age(engine: Engine, column: str, where: str, seconds: float) -> None:
    with engine.begin() as db:
        db.execute(text(f"UPDATE embedding SET {column} = now() - make_interval(secs => {seconds}) WHERE {where}"))


# Rows


def test_wanted_embeddings_are_claimed_in_the_order_in_which_they_were_wanted_first(engine: Engine) -> None:
    one, two, three = asset_ids(engine, make_job(engine, keys=3))
    assert want(engine, {three: address(3), one: address(1)}) == {address(3): WANTED, address(1): WANTED}
    want(engine, {two: address(2), three: address(3)})

    claimed = []
    for _ in range(4):
        with engine.begin() as db:
            claimed.append(embeddings.claim(db, seconds=60))

    assert [found and found.address for found in claimed] == [address(3), address(1), address(2), None]
    assert claimed[0] is not None
    assert claimed[0].asset is not None
    assert (claimed[0].asset.asset_id, claimed[0].asset.key) == (three, "0002.jpg")


def test_a_claim_runs_out_and_after_three_deaths_the_embedding_fails(engine: Engine) -> None:
    [one] = asset_ids(engine, make_job(engine, keys=1))
    want(engine, {one: address(1)})

    for attempt in range(3):
        with engine.begin() as db:
            assert embeddings.claim(db, seconds=60) is not None, attempt
            assert embeddings.claim(db, seconds=60) is None
            assert embeddings.fail_abandoned(db) == 0
        age(engine, "claimed_until", "true", 1)

    with engine.begin() as db:
        assert embeddings.claim(db, seconds=60) is None
        assert embeddings.fail_abandoned(db) == 1
    assert rows(engine)[address(1)]["error"] == "the process that made it died"
    assert want(engine, {one: address(1)}) == {address(1): FAILED}


def test_messages_are_sent_once_and_again_only_after_they_were_lost(engine: Engine) -> None:
    ids = asset_ids(engine, make_job(engine, keys=5))
    want(engine, {asset_id: address(n) for n, asset_id in enumerate(ids)})

    def take(*, most: int = 3, may_resend: bool = True) -> list[int]:
        with engine.begin() as db:
            return embeddings.take_unsent(db, most=most, resend_seconds=60, may_resend=may_resend)

    assert take() == [1, 2, 3]
    assert take() == []
    assert take(most=9) == [4, 5]
    age(engine, "sent_at", "id < 3", 61)
    assert take(most=9, may_resend=False) == []
    with engine.begin() as db:
        assert embeddings.claim(db, seconds=60, ids=[1]) is not None
    assert take(most=9) == [2]


def test_stored_embeddings_are_counted_and_wanted_again_when_their_bytes_are_gone(engine: Engine) -> None:
    one, two = asset_ids(engine, make_job(engine, keys=2))
    want(engine, {one: address(1), two: address(2)})
    with engine.begin() as db:
        embeddings.record_stored(db, sizes={address(1): 100})
        found = embeddings.totals(db)
    assert (found.stored, found.size_bytes, found.wanted, found.failed) == (1, 100, 1, 0)
    assert found.oldest is not None
    assert want(engine, {one: address(1)}) == {address(1): STORED}

    with engine.begin() as db:
        embeddings.want_again(db, address=address(1))
        embeddings.want_again(db, address=address(2))
    assert states(engine) == [WANTED, WANTED]


def test_no_more_assets_of_a_job_are_reserved_than_it_keeps_however_many_workers_ask(engine: Engine) -> None:
    job = make_job(engine, keys=12)
    ids = asset_ids(engine, job)
    allowed: list[set[str]] = []

    def reserve(some: Sequence[int]) -> None:
        with engine.begin() as db:
            addresses = {asset_id: address(asset_id) for asset_id in some}
            allowed.append(
                embeddings.reserve(db, job_id=job.id, addresses=addresses, most=5, budget_bytes=10**9, seconds=60)
            )

    threads = [threading.Thread(target=reserve, args=(ids[k : k + 3],)) for k in range(0, 12, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(map(len, allowed)) == [0, 0, 2, 3]
    assert len(rows(engine)) == 5
    with engine.begin() as db:
        embeddings.record_stored(db, sizes=dict.fromkeys(rows(engine), 1000))
        full = embeddings.reserve(
            db, job_id=job.id, addresses={ids[0]: address(99)}, most=None, budget_bytes=5000, seconds=60
        )
    assert full == set()


# The bucket


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with serve_s3() as address:
        yield address


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MASKFLEET_S3_ENDPOINT", s3_server)
    settings.cache_clear()
    client = boto3.session.Session().client("s3", endpoint_url=s3_server, region_name="us-east-1")
    client.create_bucket(Bucket="kept")
    client.put_object(Bucket="kept", Key="other/x", Body=b"not ours")
    yield "s3://kept/clicks"
    for entry in client.list_objects_v2(Bucket="kept")["Contents"]:
        client.delete_object(Bucket="kept", Key=entry["Key"])
    client.delete_bucket(Bucket="kept")
    settings.cache_clear()


def test_a_bucket_keeps_reads_lists_and_deletes_below_its_prefix(bucket: str) -> None:
    store = EmbeddingStore(open_objects(bucket))
    store.write(address(1), b"first")
    store.write(address(1), b"second")
    store.write(address(2), b"x")

    assert store.read(address(1)) == b"second"
    assert {(found.name, found.size_bytes) for found in store.stored()} == {(address(1), 6), (address(2), 1)}
    assert all(abs(found.changed_at - time.time()) < 60 for found in store.stored())
    store.delete(address(1))
    store.delete(address(1))
    with pytest.raises(EmbeddingError) as absent:
        store.read(address(1))
    assert absent.value.fault is EmbeddingFault.ABSENT


def test_a_bucket_that_is_not_there_is_away(bucket: str) -> None:
    store = EmbeddingStore(open_objects("s3://nobody/has/it"))
    for call in (lambda: store.write(address(1), b"x"), lambda: list(store.stored()), lambda: store.delete(address(1))):
        with pytest.raises(EmbeddingError) as away:
            call()
        assert away.value.fault is EmbeddingFault.AWAY


# Made on demand, and kept by a job


def draw(folder: Path, count_: int) -> Path:
    folder.mkdir()
    for n in range(count_):
        Image.fromarray(draw_scene(92_000_000_000_000 + n, (96, 128)).image).save(folder / f"{n}.png")
    return folder


def make_nano_job(engine: Engine, source: Path, **changes: Any) -> Job:
    """A listed job on a folder, with sam_nano and few points."""
    asked = {"params": {"points_per_side": 2}, **changes}
    [page] = open_source(str(source)).list()
    with engine.begin() as db:
        job = jobs.insert_job(
            db,
            name="kept",
            source=str(source),
            model="sam_nano",
            model_version=model_version(NANO, {"params": asked["params"]}),
            asked=asked,
            fresh=False,
        )
        assets = [NewAsset(key=one.key, size_bytes=one.size_bytes, etag=one.etag) for one in page.objects]
        listed = listing.add_assets(
            db, job=job, assets=assets, cursor=page.cursor, skipped={}, complete=True, chunk_size=64
        )
    assert listed is not None
    return listed


@pytest.fixture
def make_worker(engine: Engine, tmp_path: Path) -> Callable[..., Worker]:
    def make(**changes: Any) -> Worker:
        known = {"embeddings": str(tmp_path / "kept"), "batch_size": 2, **changes}
        return Worker(
            name="one",
            engine=engine,
            settings=Settings(**known),
            load_model=lambda name: load_model(find_model(name), "cpu"),
            load_detector=lambda asked: pytest.fail("no detector was asked"),
            draining=lambda: False,
            on_hang=lambda: pytest.fail("it hangs"),
        )

    return make


def store_of(worker: Worker) -> EmbeddingStore:
    assert worker.settings.embeddings is not None
    return EmbeddingStore(open_objects(worker.settings.embeddings))


def addresses_of(engine: Engine, job: Job, kind: EmbeddingFormat = EmbeddingFormat.FP16) -> dict[int, str]:
    with engine.begin() as db:
        assets = embeddings.embeddable_assets(db, asset_ids=asset_ids(engine, job))
    return {asset_id: embedding_of(assets[asset_id], kind).address for asset_id in sorted(assets)}


@pytest.mark.parametrize("kind", list(EmbeddingFormat))
def test_wanted_embeddings_are_made_as_the_model_makes_them(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path, kind: EmbeddingFormat
) -> None:
    source = draw(tmp_path / "source", 2)
    (source / "broken.png").write_bytes(b"no picture")
    job = make_nano_job(engine, source)
    addresses = addresses_of(engine, job, kind)
    want(engine, addresses)
    worker = make_worker()

    assert embed_wanted(worker, store_of(worker)) == 2
    assert embed_wanted(worker, store_of(worker)) == 0

    found = rows(engine)
    assert [found[name]["state"] for name in addresses.values()] == [STORED, STORED, FAILED]
    assert "not an image" in found[list(addresses.values())[2]]["error"]
    with engine.begin() as db:
        assets = embeddings.embeddable_assets(db, asset_ids=list(addresses))
    model: Model = worker.load_model("sam_nano")
    for number, (asset_id, name) in enumerate(list(addresses.items())[:2]):
        content = store_of(worker).read(name)
        assert len(content) == found[name]["size_bytes"]
        kept = decode(content, embedding_of(assets[asset_id], kind).stamp)
        [expected] = model.embed([draw_scene(92_000_000_000_000 + number, (96, 128)).image])
        assert (kept - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_embedding_is_tried_three_times_where_the_store_is_away_and_not_again_where_its_job_was_deleted(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    job, gone = make_nano_job(engine, draw(tmp_path / "source", 1)), make_job(engine, keys=1)
    want(engine, addresses_of(engine, job))
    [gone_id] = asset_ids(engine, gone)
    delete(engine, gone)
    want(engine, {gone_id: address(7)})  # somebody had read the job before
    (tmp_path / "kept").write_text("a file where a folder should be")
    worker = make_worker()

    for _ in range(3):
        assert embed_wanted(worker, store_of(worker)) == 0
        age(engine, "claimed_until", "state = 'wanted'", 1)

    failed = list(rows(engine).values())
    assert [row["state"] for row in failed] == [FAILED, FAILED]
    assert [row["attempts"] for row in failed] == [3, 1]
    assert "cannot be written" in failed[0]["error"]
    assert failed[1]["error"] == "its job was deleted"


def test_a_draining_worker_hands_back_what_it_has_not_made(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    job = make_nano_job(engine, draw(tmp_path / "source", 3))
    want(engine, addresses_of(engine, job))
    with engine.begin() as db:
        ids = embeddings.take_unsent(db, most=9, resend_seconds=60, may_resend=False)
    worker = make_worker()
    made = store_of(worker)
    draining = replace(worker, draining=lambda: STORED in states(engine))

    assert embed_wanted(draining, made, ids) == 1

    with engine.begin() as db:
        assert embeddings.take_unsent(db, most=9, resend_seconds=60, may_resend=False) == ids[1:]


@pytest.mark.parametrize(("asked", "kept"), [("all", 5), (3, 3)])
def test_a_job_keeps_as_many_embeddings_as_it_was_asked_to(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path, asked: str | int, kept: int
) -> None:
    source = draw(tmp_path / "source", 5)
    (source / "broken.png").write_bytes(b"no picture")
    job = make_nano_job(engine, source, keep_embeddings=asked)
    worker = make_worker()

    report = run_chunk(worker, chunk_ids(engine, job)[0])

    assert report is not None
    assert (report.labeled, report.failed) == (5, 1)
    found = rows(engine)
    assert [row["state"] for row in found.values()] == [STORED] * kept
    assert set(found) <= set(addresses_of(engine, job).values())
    assert {one.name for one in store_of(worker).stored()} == set(found)


def test_a_job_by_prompts_keeps_those_that_it_encoded_and_another_job_keeps_none(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    source = draw(tmp_path / "source", 2)
    text_job = {"params": {}, "text": [{"box_xyxy": [5, 5, 60, 60]}]}
    kept, plain = make_nano_job(engine, source, **text_job, keep_embeddings="all"), make_nano_job(engine, source)
    worker = make_worker()

    run_chunk(worker, chunk_ids(engine, plain)[0])
    assert rows(engine) == {}
    run_chunk(worker, chunk_ids(engine, kept)[0])
    assert states(engine) == [STORED, STORED]


def test_answered_assets_of_a_job_are_wanted(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    source = draw(tmp_path / "source", 3)
    worker = make_worker()
    run_chunk(worker, chunk_ids(engine, make_nano_job(engine, source))[0])
    job = make_nano_job(engine, source, keep_embeddings=2)

    report = run_chunk(worker, chunk_ids(engine, job)[0])

    assert report is not None
    assert report.answered == 3
    assert states(engine) == [WANTED, WANTED]
    assert embed_wanted(worker, store_of(worker)) == 2


def test_an_answered_asset_that_several_runs_want_was_not_tried_yet(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path
) -> None:
    source = draw(tmp_path / "source", 2)
    worker = make_worker()
    run_chunk(worker, chunk_ids(engine, make_nano_job(engine, source))[0])
    for _ in range(4):
        run_chunk(worker, chunk_ids(engine, make_nano_job(engine, source, keep_embeddings="all"))[0])

    with engine.begin() as db:
        assert embeddings.fail_abandoned(db) == 0
        assert embeddings.claim(db, seconds=60) is not None
    run_chunk(worker, chunk_ids(engine, make_nano_job(engine, source, keep_embeddings="all"))[0])

    with engine.begin() as db:  # what one worker makes, another one does not claim
        other = embeddings.claim(db, seconds=60)
        assert other is not None
        assert embeddings.claim(db, seconds=60) is None
    assert states(engine) == [WANTED, WANTED]


def test_a_store_that_refuses_writes_fails_no_asset(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_nano_job(engine, draw(tmp_path / "source", 6), keep_embeddings="all")
    (tmp_path / "kept").write_text("a file where a folder should be")

    run_chunk(make_worker(), chunk_ids(engine, job)[0])

    assert count(engine, job).labeled == 6
    found = rows(engine).values()
    assert {row["state"] for row in found} == {FAILED}
    assert all("cannot be written" in row["error"] for row in found)
    assert "is not kept" in caplog.text
    assert "no more embeddings are kept after 3 failures" in caplog.text


def test_a_job_where_no_store_is_set_says_so_and_labels(
    engine: Engine, make_worker: Callable[..., Worker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_nano_job(engine, draw(tmp_path / "source", 1), keep_embeddings="all")
    run_chunk(make_worker(embeddings=None), chunk_ids(engine, job)[0])
    assert count(engine, job).labeled == 1
    assert "MASKFLEET_EMBEDDINGS is not set here" in caplog.text


# The sweep


def fill(engine: Engine, store: EmbeddingStore, number: int) -> list[str]:
    """Stored embeddings of 100 bytes; the first one was used last the longest ago."""
    ids = asset_ids(engine, make_job(engine, keys=number))
    names = [address(n) for n in range(number)]
    want(engine, dict(zip(ids, names, strict=True)))
    for n, name in enumerate(names):
        store.write(name, bytes(100))
        with engine.begin() as db:
            embeddings.record_stored(db, sizes={name: 100})
        age(engine, "used_at", f"address = '{name}'", 1000 - n)
    return names


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(open_objects(str(tmp_path / "swept")))


def kept_names(store: EmbeddingStore) -> list[str]:
    return sorted(found.name for found in store.stored())


def test_a_budget_of_three_keeps_the_three_of_five_that_were_used_last(engine: Engine, store: EmbeddingStore) -> None:
    names = fill(engine, store, 5)
    with engine.begin() as db:
        embeddings.touch(db, addresses=[names[0]])

    swept = sweep(engine, store, Settings(embeddings_bytes=399))

    assert swept == Swept(over_budget=2)
    assert kept_names(store) == sorted(rows(engine)) == [names[0], names[3], names[4]]
    assert sweep(engine, store, Settings(embeddings_bytes=399)) == Swept()


def test_of_what_was_wanted_together_the_most_urgent_stays(engine: Engine, store: EmbeddingStore) -> None:
    names = fill(engine, store, 4)
    assets = {row["address"]: row["asset_id"] for row in rows(engine).values()}
    want(engine, {assets[name]: name for name in (names[2], names[0], names[3], names[1])})

    sweep(engine, store, Settings(embeddings_bytes=250))

    assert kept_names(store) == [names[0], names[2]]


def test_what_was_not_used_for_days_goes_and_what_failed_may_be_wanted_again_an_hour_later(
    engine: Engine, store: EmbeddingStore
) -> None:
    names = fill(engine, store, 4)
    age(engine, "used_at", f"address = '{names[1]}'", 15 * 86_400)
    age(engine, "wanted_at", "true", 3700)
    with engine.begin() as db:
        db.execute(text("UPDATE embedding SET state = 'failed' WHERE address = :a"), {"a": names[2]})
    age(engine, "used_at", f"address = '{names[2]}'", 0)

    assert sweep(engine, store, Settings()) == Swept(expired=1)

    assert sorted(rows(engine)) == [names[0], names[3]]


def test_embeddings_of_annotated_tasks_go_unless_another_task_or_a_reviewer_needs_them(
    engine: Engine, store: EmbeddingStore
) -> None:
    names = fill(engine, store, 5)
    assets = {row["address"]: row["asset_id"] for row in rows(engine).values()}
    # two projects; the third asset is annotated in one of them only, the fifth has no task
    publish(engine, project=1, annotated=[assets[names[0]], assets[names[1]], assets[names[2]]])
    publish(engine, project=2, annotated=[assets[names[0]]], open_=[assets[names[2]], assets[names[3]]])
    age(engine, "used_at", "true", 3600)
    age(engine, "used_at", f"address = '{names[1]}'", 60)

    assert sweep(engine, store, Settings()) == Swept(annotated=1)

    assert kept_names(store) == names[1:]


def publish(engine: Engine, *, project: int, annotated: Sequence[int], open_: Sequence[int] = ()) -> None:
    """Tasks with a prediction of each asset, and an annotation on some."""
    with engine.begin() as db:
        for asset_id in (*annotated, *open_):
            task = db.execute(
                text(
                    """INSERT INTO ls_task (server, project_id, asset_uid, uri, task_id)
                       VALUES ('ls', :project, CAST(:asset AS text), 'x', :asset) RETURNING id"""
                ),
                {"project": project, "asset": asset_id},
            ).scalar_one()
            db.execute(
                text(
                    """INSERT INTO ls_prediction (ls_task_id, model_version, asset_id, job_id, state)
                       VALUES (:task, 'v', :asset, 1, 'done')"""
                ),
                {"task": task, "asset": asset_id},
            )
            if asset_id in annotated:
                db.execute(
                    text(
                        """INSERT INTO ls_annotation (ls_task_id, annotation_id, standing, ground_truth, updated_at)
                           VALUES (:task, 1, 'chosen', false, now())"""
                    ),
                    {"task": task},
                )


def test_files_without_a_row_go_after_an_hour_and_rows_without_a_file_at_once(
    engine: Engine, store: EmbeddingStore, tmp_path: Path
) -> None:
    names = fill(engine, store, 2)
    folder = tmp_path / "swept"
    (folder / names[0]).unlink()
    store.write(address(88), b"a writer was killed before its row")
    (folder / names[1]).with_name(".half.tmp").write_bytes(b"a writer was killed in the middle")

    assert sweep(engine, store, Settings()) == Swept(without_file=1)
    assert len(kept_names(store)) == 3
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3700,) * 2)
    assert sweep(engine, store, Settings(), compare=False) == Swept()
    assert sweep(engine, store, Settings()) == Swept(without_row=2)

    assert kept_names(store) == list(rows(engine)) == [names[1]]


def test_files_that_are_no_embeddings_are_left_alone_however_old(
    engine: Engine, store: EmbeddingStore, tmp_path: Path
) -> None:
    names = fill(engine, store, 1)
    others = ["photos/1.jpg", "1.jpg", f"{names[0]}.bak", ".trash.tmp"]
    for other in others:
        (tmp_path / "swept" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "swept" / other).write_bytes(b"a person's own")
        os.utime(tmp_path / "swept" / other, (1, 1))

    assert sweep(engine, store, Settings()) == Swept()

    assert kept_names(store) == sorted([*names, *others])


def test_doctors_line_has_the_time_of_utc_wherever_postgres_stands(
    engine: Engine, store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(engine, store, 1)
    with engine.begin() as db:
        db.execute(text("UPDATE embedding SET used_at = '2026-11-25 23:30:00+00'"))
    engine.dispose()
    monkeypatch.setenv("PGTZ", "Asia/Tokyo")

    assert kept_embeddings(engine) == "1 embeddings, 0 MB, the oldest used 2026-11-25 23:30 UTC"
    engine.dispose()


def test_one_process_sweeps_at_a_time(engine: Engine, store: EmbeddingStore) -> None:
    with sweep_lock(engine) as held:
        assert held is not None
        assert sweep(engine, store, Settings()) is None
    assert sweep(engine, store, Settings()) == Swept()


def test_the_sweep_of_a_bucket_is_that_of_a_folder(engine: Engine, bucket: str) -> None:
    store = EmbeddingStore(open_objects(bucket))
    names = fill(engine, store, 3)
    store.delete(names[2])

    swept = sweep(engine, store, Settings(embeddings_bytes=250))

    assert swept == Swept(over_budget=1, without_file=1)
    assert kept_names(store) == list(rows(engine)) == [names[1]]
