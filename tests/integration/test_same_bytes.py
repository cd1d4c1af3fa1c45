"""`--dedupe content`: the same bytes get one look, books stay exact, and deleting a job takes nothing from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine, text

from db import listing, results, same_bytes
from db.jobs import Job
from db.leases import LeaseLost
from db.listing import NewAsset
from db.same_bytes import ReadBytes
from db.settings import Settings
from tests.factories import chunk_ids, claim, count, delete, expire_lease, make_job, reap
from tests.statement_costs import PAGE, measured
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.running.chunk import ChunkReport, run_chunk
from workers.running.worker import Worker

pytestmark = pytest.mark.integration

VERSION = "stub@55555555+00000000"
BROKEN = 13  # the red of an image that the model does not bear


class FindsOne:
    """A model that finds one mask in each image. It counts its looks."""

    def __init__(self) -> None:
        self.looks = 0

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Any]:
        return [None] * len(images)

    def automatic(self, image: RgbImage, embedding: Any, params: Any) -> list[Mask]:
        self.looks += 1
        if image[0, 0, 0] == BROKEN:
            raise ValueError("a red image")
        return [Mask(counts="01", size_hw=(6, 8), bbox_xywh=(0, 0, 1, 1), area_px=1, predicted_iou=0.5, label="a")]


@pytest.fixture
def model() -> FindsOne:
    return FindsOne()


def draw(folder: Path, **reds: int) -> Path:
    """A PNG a name. The same red gives the same bytes."""
    folder.mkdir(exist_ok=True)
    for name, red in reds.items():
        Image.new("RGB", (8, 6), (red, 0, 0)).save(folder / f"{name}.png")
    return folder


def a_job(engine: Engine, folder: Path | str, *, dedupe: bool = True, **given: Any) -> Job:
    keys = sorted(path.name for path in Path(folder).iterdir())
    job = make_job(engine, keys=keys, source=str(folder), asked={"dedupe": "content"} if dedupe else {}, **given)
    with engine.begin() as db:
        db.execute(text("UPDATE job SET model = 'sam_nano'"))
    return job


def run(engine: Engine, job: Job, model: FindsOne) -> ChunkReport:
    worker = Worker(
        name="one",
        engine=engine,
        settings=Settings(batch_size=2),
        load_model=lambda name: model,  # type: ignore[arg-type, return-value]
        load_detector=lambda asked: pytest.fail("no job here has a detector"),
        draining=lambda: False,
        on_hang=lambda: None,
    )
    reports = [run_chunk(worker, chunk_id) for chunk_id in chunk_ids(engine, job)]
    assert len(reports) == 1
    assert reports[0] is not None
    return reports[0]


def masks_by_key(engine: Engine, job: Job) -> dict[str, int]:
    with engine.begin() as db:
        return {asset.key: len(asset.masks) for asset in results.labeled_assets(db, job_id=job.id)}


def same(engine: Engine, job: Job) -> int:
    with engine.begin() as db:
        return same_bytes.count_same_bytes(db, job_id=job.id)


def test_the_same_bytes_under_other_keys_are_looked_at_once_in_a_job(
    engine: Engine, tmp_path: Path, model: FindsOne
) -> None:
    job = a_job(engine, draw(tmp_path, a=1, b=1, c=2, d=1, e=2, f=3, g=3))

    report = run(engine, job, model)

    assert model.looks == 3
    assert masks_by_key(engine, job) == dict.fromkeys([f"{name}.png" for name in "abcdefg"], 1)
    counts = count(engine, job)
    assert (counts.listed, counts.labeled, counts.failed, counts.pending) == (7, 7, 0, 0)
    assert (counts.masks, counts.reused, same(engine, job)) == (7, 4, 4)
    assert report.left == 0
    with engine.begin() as db:
        assert results.masks_per_asset(db, job_id=job.id) == {1: 7}
        assert results.labels_of(db, job_id=job.id) == ["a"]


def test_another_job_over_another_source_gets_copies_that_outlive_the_first(
    engine: Engine, tmp_path: Path, model: FindsOne
) -> None:
    first = a_job(engine, draw(tmp_path / "one", a=1, b=2))
    run(engine, first, model)
    second = a_job(engine, draw(tmp_path / "two", x=2, y=1, z=9))

    report = run(engine, second, model)

    assert model.looks == 3  # z alone
    assert (report.answered, report.labeled, report.left) == (2, 1, 0)
    assert (count(engine, second).labeled, same(engine, second)) == (3, 2)
    delete(engine, first)
    assert masks_by_key(engine, second) == {"x.png": 1, "y.png": 1, "z.png": 1}
    third = a_job(engine, draw(tmp_path / "three", u=1, v=2, w=9))
    run(engine, third, model)
    assert model.looks == 3
    assert masks_by_key(engine, third) == {"u.png": 1, "v.png": 1, "w.png": 1}
    with engine.begin() as db:
        db.execute(text("DELETE FROM job WHERE id = :id"), {"id": second.id})  # without its rows of bytes
    run(engine, a_job(engine, draw(tmp_path / "four", q=9)), model)
    assert model.looks == 3


def test_other_parameters_and_jobs_that_did_not_ask_share_nothing(
    engine: Engine, tmp_path: Path, model: FindsOne
) -> None:
    run(engine, a_job(engine, draw(tmp_path / "one", a=1)), model)
    run(engine, a_job(engine, draw(tmp_path / "two", b=1), model_version="stub@55555555+11111111"), model)
    assert model.looks == 2
    run(engine, a_job(engine, draw(tmp_path / "three", c=1, d=1), dedupe=False), model)
    assert model.looks == 4
    fresh = a_job(engine, draw(tmp_path / "four", e=1, f=1), fresh=True)
    run(engine, fresh, model)
    assert (model.looks, same(engine, fresh)) == (5, 1)


def test_an_object_whose_etag_is_the_md5_of_known_bytes_is_not_even_read(
    engine: Engine, tmp_path: Path, model: FindsOne
) -> None:
    folder = draw(tmp_path / "one", a=1)
    run(engine, a_job(engine, folder), model)
    content = (folder / "a.png").read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    job = make_job(engine, keys=0, source="s3://nowhere", asked={"dedupe": "content"})
    with engine.begin() as db:
        db.execute(text("UPDATE job SET state = 'listing', model = 'sam_nano' WHERE id = :id"), {"id": job.id})
        assets = [
            NewAsset(key="x.png", size_bytes=len(content), etag=md5),
            NewAsset(key="y.png", size_bytes=len(content), etag=md5),
        ]
        listing.add_assets(db, job=job, assets=assets, cursor="y", skipped={}, complete=True, chunk_size=64)

    report = run(engine, job, model)

    assert (report.answered, report.left, model.looks) == (2, 0, 1)
    assert masks_by_key(engine, job) == {"x.png": 1, "y.png": 1}


def test_an_asset_whose_twin_failed_fails_alike_and_the_books_stay_exact(
    engine: Engine, tmp_path: Path, model: FindsOne
) -> None:
    job = a_job(engine, draw(tmp_path, a=BROKEN, b=BROKEN, c=1, d=BROKEN))

    run(engine, job, model)

    counts = count(engine, job)
    assert (counts.listed, counts.labeled, counts.failed, counts.pending) == (4, 1, 3, 0)
    assert model.looks == 2
    with engine.begin() as db:
        errors = [asset.error for asset in results.failed_assets(db, job_id=job.id)]
    assert "a red image" in errors[0]
    assert errors[1] == errors[2] == f"its bytes are those of another asset: {errors[0]}"


def test_a_worker_that_lost_its_chunk_copies_nothing(engine: Engine, tmp_path: Path, model: FindsOne) -> None:
    folder = draw(tmp_path / "one", a=1)
    run(engine, a_job(engine, folder), model)
    job = a_job(engine, draw(tmp_path / "two", b=1))
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    expire_lease(engine, chunk)
    reap(engine)
    keys = same_bytes.keys_of((folder / "a.png").read_bytes(), model_version=VERSION)

    with pytest.raises(LeaseLost), engine.begin() as db:
        same_bytes.answer_same_bytes(
            db, chunk=chunk, read={chunk.first_asset_id: ReadBytes(keys=keys)}, lease_seconds=60
        )
    assert count(engine, job).labeled == 0


def test_a_fresh_job_does_not_look_through_the_same_bytes_of_other_jobs(engine: Engine) -> None:
    other, job = make_job(engine, keys=0), make_job(engine, keys=0, fresh=True)
    with engine.begin() as db:
        db.execute(text("SET LOCAL session_replication_role = replica"))
        for first, of_job, key in ((1, other, "'blank'"), (20_001, job, "md5(n::text)")):
            ids = f"generate_series({first}, {first + 19_999}) n"
            db.execute(
                text(f"INSERT INTO outcome (asset_id, job_id, width, height) SELECT n, :job, 1, 1 FROM {ids}"),
                {"job": of_job.id},
            )
            db.execute(text(f"INSERT INTO same_bytes (key, asset_id) SELECT {key}, n FROM {ids}"))
        db.execute(
            text("INSERT INTO chunk (job_id, first_asset_id, last_asset_id) VALUES (:job, 20001, 40004)"),
            {"job": job.id},
        )
        db.execute(text("UPDATE job SET state = 'running'"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        db.execute(text("ANALYZE"))
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    read = {asset_id: ReadBytes(keys=["blank"]) for asset_id in range(40_001, 40_005)}

    with measured(engine) as costs, engine.begin() as db:
        assert same_bytes.answer_same_bytes(db, chunk=chunk, read=read, lease_seconds=60) == set()

    assert max(cost.pages for cost in costs) < PAGE["same_bytes.answer_same_bytes"]


def test_only_an_etag_of_one_part_names_bytes() -> None:
    known = same_bytes.keys_of(b"bytes", model_version=VERSION)
    md5 = hashlib.md5(b"bytes", usedforsecurity=False).hexdigest()
    assert same_bytes.key_of_etag(md5, 5, model_version=VERSION) == known[1]
    assert same_bytes.key_of_etag(md5, 6, model_version=VERSION) != known[1]
    assert same_bytes.key_of_etag(md5, 5, model_version="other") != known[1]
    for etag in (f"{md5}-2", "5-1732000000000000000", "", md5.upper()):
        assert same_bytes.key_of_etag(etag, 5, model_version=VERSION) is None
