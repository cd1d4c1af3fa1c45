"""Large sources: a bucket in ranges of keys, and lists of keys, through the dispatcher's own round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from sqlalchemy import Engine, text

from db import jobs, list_shards
from db.jobs import Job
from db.list_shards import ListShard
from db.settings import settings
from db.states import JobState
from orchestrator.jobs.dispatch import tick
from orchestrator.jobs.key_lists import KeyList
from orchestrator.jobs.listing import Walks
from orchestrator.jobs.prepare import list_for_a_while
from orchestrator.jobs.shards import find_cut
from tests.factories import chunk_ids, count, delete
from tests.s3_server import serve_s3
from tests.waiting import wait_for_lock
from workers.errors import SourceError
from workers.storage.asset import PAGE_SIZE
from workers.storage.bucket import Bucket
from workers.storage.source import open_source

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve_s3() as address:
        yield address


@pytest.fixture(autouse=True)
def deployment_settings(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Iterator[None]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "MASKFLEET_S3_ENDPOINT": endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    yield
    settings.cache_clear()


def fill(name: str, keys: Sequence[str]) -> None:
    """Put objects into moto's memory: a request for each would take minutes."""
    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket(name, "us-east-1")
    for key in keys:
        backend.put_object(name, key, b"x")


def submit(engine: Engine, source: str, **asked: object) -> Job:
    with engine.begin() as db:
        return jobs.insert_job(
            db, name="", source=source, model="stub", model_version="v", asked={"include": ["*"], **asked}, fresh=False
        )


def listed_keys(engine: Engine, job: Job) -> list[str]:
    with engine.begin() as db:
        return list(db.execute(text("SELECT key FROM asset WHERE job_id = :id ORDER BY id"), {"id": job.id}).scalars())


def now(engine: Engine, job: Job) -> Job:
    with engine.begin() as db:
        found = jobs.get_job(db, job_id=job.id)
    assert found is not None
    return found


def list_all(engine: Engine, job: Job, *, seconds: float = 600.0) -> None:
    while now(engine, job).state is JobState.LISTING:
        assert now(engine, job).error is None
        list_for_a_while(engine, now(engine, job), Walks(), seconds=seconds)


def shards(engine: Engine, job: Job) -> int:
    with engine.begin() as db:
        return int(db.execute(text("SELECT count(*) FROM list_shard WHERE job_id = :id"), {"id": job.id}).scalar_one())


def assert_exact(engine: Engine, job: Job, keys: Sequence[str]) -> None:
    found = listed_keys(engine, job)
    assert sorted(found) == sorted(keys)
    assert count(engine, job).listed == len(keys)
    with engine.begin() as db:
        chunks = db.execute(
            text("SELECT first_asset_id, last_asset_id FROM chunk WHERE job_id = :id ORDER BY id"), {"id": job.id}
        ).all()
        ids = list(db.execute(text("SELECT id FROM asset WHERE job_id = :id ORDER BY id"), {"id": job.id}).scalars())
        keys_of = dict(db.execute(text("SELECT id, key FROM asset WHERE job_id = :id"), {"id": job.id}).all())
    assert [n for chunk in chunks for n in range(chunk.first_asset_id, chunk.last_asset_id + 1) if n in keys_of] == ids
    for chunk in chunks:  # a chunk is a part of one page, and a page is in order
        part = [keys_of[n] for n in range(chunk.first_asset_id, chunk.last_asset_id + 1)]
        assert part == sorted(part)


KEYS = {
    "numbers": [f"photos/img_{n:07}.jpg" for n in range(1500)],
    "folders": [f"photos/{n % 5}/{n // 5:05}.jpg" for n in range(1500)],
    "one crowded folder": [
        *(f"photos/a{n}.jpg" for n in range(30)),
        *(f"photos/zz/é/{n:05}" for n in range(5000)),  # so many, because to find them takes time too
        "photos/图/1",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("spread", KEYS)
def test_a_bucket_is_listed_in_ranges_that_are_split_where_its_keys_are(
    engine: Engine, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("workers.storage.bucket", "orchestrator.jobs.shards"):
        monkeypatch.setattr(f"{module}.PAGE_SIZE", 50)
    bucket = f"bucket-{spread.replace(' ', '-')}"
    fill(bucket, [*KEYS[spread], "photos2/not-this.jpg", "photos"])
    job = submit(engine, f"s3://{bucket}/photos", list_shards=4)

    list_all(engine, job)

    assert_exact(engine, job, [key.removeprefix("photos/") for key in KEYS[spread]])
    assert shards(engine, job) >= 2  # how often depends on how fast the pages come
    assert len(chunk_ids(engine, job)) <= len(KEYS[spread]) / 25


@pytest.mark.slow
def test_a_listing_in_ranges_that_is_interrupted_after_each_page_or_doubled_stays_exact(engine: Engine) -> None:
    fill("interrupted", KEYS["numbers"])
    job = submit(engine, "s3://interrupted/photos", list_shards=3)
    draw = Random(1)
    for _ in range(200):
        if now(engine, job).state is not JobState.LISTING:
            break
        with ThreadPoolExecutor(2) as pool:  # two dispatchers
            for _ in range(2):
                pool.submit(list_for_a_while, engine, now(engine, job), Walks(), seconds=draw.choice([0, 0.2, 0.5]))

    assert now(engine, job).state is JobState.RUNNING
    assert_exact(engine, job, [key.removeprefix("photos/") for key in KEYS["numbers"]])


def test_a_dispatcher_that_cuts_a_range_and_one_that_stores_its_page_do_not_wait_for_each_other(engine: Engine) -> None:
    job = submit(engine, "s3://cut/photos", list_shards=2)
    with engine.begin() as db:
        [shard] = list_shards.open_shards(db, job_id=job.id)

    def cut() -> object:
        with engine.begin() as db:
            shorter = list_shards.shorten_shard(db, job=job, shard=shard, upto="m")
            return list_shards.split_shard(db, job=job, shard=shorter or shard, at="f")

    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as db:
            db.execute(text("SELECT id FROM job WHERE id = :id FOR UPDATE"), {"id": job.id})  # as a page begins
            cutting = pool.submit(cut)
            wait_for_lock(engine)
            page = {"assets": [], "skipped": {}, "is_done": False, "chunk_size": 64}
            assert list_shards.add_shard_page(db, job=job, shard=shard, cursor="b", **page) is not None
        assert cutting.result() is None  # the range has changed: it is cut at another place


def test_a_range_that_was_listed_past_the_place_of_its_cut_does_not_grow_into_the_next_one(engine: Engine) -> None:
    fill("passed", ["photos/2022/02/B93.jpg", "photos/2022/02/B94.jpg", "photos/2022/05/A01.jpg"])
    bucket = Bucket("passed/photos", endpoint=settings().s3_endpoint)
    shard = ListShard(n=0, cursor="2022/02/B93.jpg", upto="2022/03")

    cut = find_cut(bucket, shard, "2021/C")  # that was the place when the range was behind it

    assert cut.upto is None or cut.upto <= "2022/03"
    job = submit(engine, "s3://passed/photos", list_shards=2)
    with engine.begin() as db:
        [whole] = list_shards.open_shards(db, job_id=job.id)
        shorter = list_shards.shorten_shard(db, job=job, shard=whole, upto="2022/03")
        assert shorter is not None
        assert list_shards.shorten_shard(db, job=job, shard=shorter, upto="2022W") is None


def test_a_job_that_was_deleted_before_its_turn_came_stops_no_dispatcher(engine: Engine) -> None:
    fill("deleted", ["photos/a.jpg"])
    job = submit(engine, "s3://deleted/photos", list_shards=2)
    delete(engine, job)

    list_for_a_while(engine, job, Walks(), seconds=10)  # as the dispatcher read it before


def test_a_store_that_lists_a_key_twice_fails_its_job_and_stops_no_other(engine: Engine, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{name}.jpg").touch()
    twice, other = (submit(engine, str(tmp_path / "photos")) for _ in range(2))
    with engine.begin() as db:  # as after a page of a store that does not heed where the next one begins
        db.execute(
            text("INSERT INTO asset (job_id, key, size_bytes, etag) VALUES (:job, 'b.jpg', 0, 'x')"),
            {"job": twice.id},
        )

    tick(engine)

    failed = now(engine, twice)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert "its listing cannot be stored" in failed.error
    assert "b.jpg) already exists" in failed.error
    assert listed_keys(engine, other) == ["a.jpg", "b.jpg"]


def test_a_small_prefix_needs_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fill("small", ["photos/a.jpg", "photos/b.jpg"])
    requests = []
    request = Bucket._request
    monkeypatch.setattr(Bucket, "_request", lambda self, *a, **k: requests.append(k) or request(self, *a, **k))
    job = submit(engine, "s3://small/photos", list_shards=8)

    list_all(engine, job)

    assert listed_keys(engine, job) == ["a.jpg", "b.jpg"]
    assert len(requests) == 1


def test_a_list_of_keys_goes_on_after_each_page_and_takes_each_key_once(engine: Engine, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [f"{n:04}.jpg" for n in range(PAGE_SIZE + 200)]
    for name in names:
        (photos / name).touch()
    (tmp_path / "keys").write_text("\n".join([*names, *names[:300], "gone.jpg", names[0]]))
    job = submit(engine, str(photos), keys=str(tmp_path / "keys"))

    list_all(engine, job, seconds=0)

    assert listed_keys(engine, job) == names
    assert now(engine, job).skipped == {"duplicate_key": 301, "not_found": 1}


def test_a_limit_counts_each_key_of_a_list_once(engine: Engine, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").touch()
    (tmp_path / "keys").write_text("a.jpg\na.jpg\nb.jpg\nc.jpg\n")
    job = submit(engine, str(tmp_path), keys=str(tmp_path / "keys"), limit=2)

    list_all(engine, job, seconds=0)

    assert listed_keys(engine, job) == ["a.jpg", "b.jpg"]
    assert now(engine, job).skipped == {"duplicate_key": 1}


def test_a_limit_counts_each_key_of_a_list_once_also_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    fill("twice", [])
    keys = [f"{n:04}.jpg" for n in range(PAGE_SIZE + 300)]
    (tmp_path / "keys").write_text("\n".join([*keys[:PAGE_SIZE], *keys]))
    job = submit(engine, "s3://twice/photos", keys=str(tmp_path / "keys"), limit=PAGE_SIZE + 200)

    list_all(engine, job, seconds=0)  # a page in each round, with nothing kept

    assert listed_keys(engine, job) == keys[: PAGE_SIZE + 200]


def test_a_list_of_keys_in_a_bucket_names_objects_of_another_one(engine: Engine) -> None:
    fill("photos-bucket", ["street/a.jpg"])
    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket("lists", "us-east-1")
    backend.put_object("lists", "my keys.txt", b"a.jpg\ns3://photos-bucket/street/b c.jpg\n")
    job = submit(engine, "s3://photos-bucket/street", keys="s3://lists/my keys.txt")

    list_all(engine, job)

    assert listed_keys(engine, job) == ["a.jpg", "b c.jpg"]


def test_a_list_that_its_bucket_does_not_have_is_refused_by_its_address(engine: Engine) -> None:
    fill("has-no-list", ["a.jpg"])

    with pytest.raises(SourceError, match=r"s3://has-no-list/keys\.txt: this list of keys cannot be read"):
        KeyList(open_source("s3://has-no-list"), "s3://has-no-list/keys.txt").check()

    job = submit(engine, "s3://has-no-list", keys="s3://has-no-list/keys.txt")
    tick(engine)
    assert now(engine, job).state is JobState.FAILED
    assert "s3://has-no-list/keys.txt: this list of keys" in (now(engine, job).error or "")


def test_a_list_that_is_gone_fails_the_job_by_name_and_it_can_be_resumed(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    job = submit(engine, str(tmp_path), keys=str(tmp_path / "keys"))

    tick(engine)

    failed = now(engine, job)
    assert failed.state is JobState.FAILED
    assert f"{tmp_path / 'keys'}: cannot be read here" in (failed.error or "")
    (tmp_path / "keys").write_text("a.jpg\n")
    with engine.begin() as db:
        assert jobs.resume_job(db, job_id=job.id)
    list_all(engine, job)
    assert listed_keys(engine, job) == ["a.jpg"]
