"""The order of a chunk's run: what is committed before an asset is read, and what ends the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import Engine, text

from db.jobs import Job
from db.leases import MAX_TRANSIENT_FAILURES
from db.settings import Settings
from tests.deployment import draw_pictures
from tests.factories import chunk_ids, count, make_job
from tests.waiting import wait_for
from workers.errors import TransientError
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.running import chunk
from workers.running.chunk import run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

pytestmark = pytest.mark.integration


class FindsNothing:
    """A model without masks. Each image passes `at_image` first."""

    def __init__(self) -> None:
        self.images = 0

    def embed(self, images: Sequence[RgbImage], *, fast: bool = False) -> list[Any]:
        return [None] * len(images)

    def automatic(self, image: RgbImage, embedding: Any, params: Any) -> list[Mask]:
        self.images += 1
        self.at_image()
        return []

    def at_image(self) -> None:
        """Nothing, here."""


def a_job(engine: Engine, source: str, keys: Sequence[str]) -> Job:
    job = make_job(engine, keys=keys, source=source)
    with engine.begin() as db:
        db.execute(text("UPDATE job SET model = 'sam_nano'"))  # the registry knows it; its weights are not loaded
    return job


def a_worker(engine: Engine, model: FindsNothing, *, on_hang: Any = lambda: None, **settings: Any) -> Worker:
    return Worker(
        name="one",
        engine=engine,
        settings=Settings(**settings),
        load_model=lambda name: model,
        load_detector=lambda asked: pytest.fail("no job here has a detector"),
        draining=lambda: False,
        on_hang=on_hang,
    )


@contextmanager
def s3_of_one_picture(asked: threading.Event) -> Iterator[str]:
    """An S3 endpoint that serves the same picture under every key, and says that it was asked."""
    picture = BytesIO()
    Image.new("RGB", (8, 6)).save(picture, "png")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture.getvalue())))
            self.end_headers()
            self.wfile.write(picture.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_no_asset_is_read_before_it_is_marked_as_in_flight(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    job = a_job(engine, "s3://bucket", ["a.png", "b.png"])
    [chunk_id] = chunk_ids(engine, job)
    asked, at_first_image = threading.Event(), threading.Event()

    class SaysWhen(FindsNothing):
        def at_image(self) -> None:
            at_first_image.set()

    with s3_of_one_picture(asked) as endpoint, ThreadPoolExecutor(1) as pool, engine.connect() as holder:
        worker = a_worker(engine, SaysWhen(), s3_endpoint=endpoint, hang_seconds=600)
        holder.execute(text(HOLD_THE_MARKS))
        holder.commit()
        running = pool.submit(run_chunk, worker, chunk_id)
        wait_for(lambda: is_waiting_to_mark(engine), "the worker to mark its first batch")
        was_read = asked.wait(1)
        holder.execute(text("SELECT pg_advisory_unlock(1)"))
        holder.commit()
        running.result(300)

    assert not was_read
    assert at_first_image.is_set()
    assert count(engine, job).labeled == 2


# A write that marks assets as in flight waits here, and nothing else does.
HOLD_THE_MARKS = """
    CREATE FUNCTION wait_to_mark() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_lock_shared(1); PERFORM pg_advisory_unlock_shared(1); RETURN new; END $$;
    CREATE TRIGGER wait_to_mark BEFORE UPDATE ON chunk FOR EACH ROW
        WHEN (new.in_flight <> '{}') EXECUTE FUNCTION wait_to_mark();
    SELECT pg_advisory_lock(1)"""


def is_waiting_to_mark(engine: Engine) -> bool:
    with engine.begin() as db:
        waiting = """SELECT EXISTS (SELECT 1 FROM pg_locks JOIN pg_database d ON d.oid = database
                     WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted)"""
        return bool(db.execute(text(waiting)).scalar_one())


def test_a_worker_that_lost_its_lease_starts_no_further_asset(engine: Engine, tmp_path: Path) -> None:
    draw_pictures(tmp_path, 4)
    job = a_job(engine, str(tmp_path), sorted(path.name for path in tmp_path.iterdir()))
    [chunk_id] = chunk_ids(engine, job)

    class LosesItsLease(FindsNothing):
        def at_image(self) -> None:
            with engine.begin() as db:
                db.execute(text("UPDATE chunk SET token = token + 1, state = 'new', lease_until = NULL"))
            wait_for(lambda: not heartbeats(), "the heartbeat to end")

    model = LosesItsLease()

    run_chunk(a_worker(engine, model, lease_seconds=0.8, batch_size=4), chunk_id)

    assert model.images == 1
    assert count(engine, job).labeled == 0


def heartbeats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat-")]


def test_a_worker_in_which_no_asset_finishes_gives_itself_up(engine: Engine, tmp_path: Path) -> None:
    draw_pictures(tmp_path, 1)
    job = a_job(engine, str(tmp_path), ["0000.png"])
    [chunk_id] = chunk_ids(engine, job)
    given_up = threading.Event()

    class Hangs(FindsNothing):
        def at_image(self) -> None:
            self.was_given_up = given_up.wait(120)

    model = Hangs()
    worker = a_worker(engine, model, on_hang=given_up.set, lease_seconds=0.8, hang_seconds=0.3)

    run_chunk(worker, chunk_id)

    assert model.was_given_up


def test_what_nobody_foresaw_is_said_on_the_job_and_the_chunk_waits_for_a_worker_that_can(
    engine: Engine, tmp_path: Path
) -> None:
    draw_pictures(tmp_path, 1)
    job = a_job(engine, str(tmp_path), [path.name for path in tmp_path.iterdir()])
    [chunk_id] = chunk_ids(engine, job)
    with engine.begin() as db:
        db.execute(text("""UPDATE job SET asked = asked || '{"params": {"of_a_newer_version": 1}}'"""))

    report = run_chunk(a_worker(engine, FindsNothing()), chunk_id)

    assert report is not None
    assert (report.labeled, report.failed, report.left) == (0, 0, 1)
    with engine.begin() as db:
        state, waits = db.execute(text("SELECT state, ready_at > now() FROM chunk")).one()
        [error] = db.execute(text("SELECT error FROM job")).scalars()
    assert (state, waits) == ("new", True)
    assert error.startswith("one: ")
    assert "of_a_newer_version" in error


def test_a_place_of_weights_that_is_away_for_hours_uses_up_no_tries_of_the_assets(
    engine: Engine, tmp_path: Path
) -> None:
    draw_pictures(tmp_path, 1)
    job = a_job(engine, str(tmp_path), [path.name for path in tmp_path.iterdir()])
    [chunk_id] = chunk_ids(engine, job)

    def away(_: str) -> Any:
        raise TransientError("s3://weights: does not answer")

    worker = replace(a_worker(engine, FindsNothing()), load_model=away)
    for _ in range(2 * MAX_TRANSIENT_FAILURES):
        assert run_chunk(worker, chunk_id) is not None

    with engine.begin() as db:
        failures, waits = db.execute(text("SELECT transient_failures, ready_at > now() FROM chunk")).one()
    assert 0 < failures <= MAX_TRANSIENT_FAILURES / 2
    assert waits
    assert count(engine, job).failed == 0


def test_a_device_that_is_lost_outside_of_an_assets_look_ends_the_process_too(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    draw_pictures(tmp_path, 1)
    job = a_job(engine, str(tmp_path), [path.name for path in tmp_path.iterdir()])
    [chunk_id] = chunk_ids(engine, job)
    monkeypatch.setattr(chunk, "from_store", lost)

    with pytest.raises(ProcessUnfit, match="illegal memory access"):
        run_chunk(a_worker(engine, FindsNothing()), chunk_id)
