"""`--keep-embeddings` as a person uses it: a run, then wanted embeddings made without a broker, then a click."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from db import embeddings
from db.session import open_engine
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import STUB, Deployment
from tests.e2e.test_run import run
from tests.integration.test_kept_embeddings import addresses_of, draw, make_nano_job, rows, want
from tests.waiting import wait_for
from workers.clicks.decoding import Decoding
from workers.clicks.messages import ClickRequest
from workers.embeddings.address import EmbeddingFormat, embedding_of
from workers.embeddings.store import EmbeddingStore
from workers.images.decode import decode
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.storage.objects import open_objects

pytestmark = pytest.mark.integration

FEW_POINTS = ["--model", "sam_nano", "--param", "points_per_side=2", "--devices", "cpu", "--json"]


@contextmanager
def encoding(database_url: str, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The loop that makes wanted embeddings without a broker."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    environment = {**kept, "MASKFLEET_DATABASE_URL": database_url, "MASKFLEET_EMBEDDINGS": str(store)}
    command = [sys.executable, "-P", "-m", "workers.running.encode"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def states(engine: Engine) -> list[str]:
    return [row["state"] for row in rows(engine).values()]


def test_a_run_keeps_embeddings_and_a_click_is_answered_from_them_as_from_the_image(tmp_path: Path) -> None:
    source, out = draw(tmp_path / "pictures", 3), tmp_path / "out"
    first = json.loads(run(source, "--out", out, *FEW_POINTS, "--keep-embeddings", "2").stdout)
    kept = out / ".maskfleet" / "embeddings"
    assert first["assets"] == {"listed": 3, "labeled": 3, "failed": 0}
    assert len([path for path in kept.rglob("*") if path.is_file()]) == 2

    again = json.loads(run(source, "--out", out, *FEW_POINTS, "--keep-embeddings", "all").stdout)

    assert again["answered_from_stored"] == 3
    with EmbeddedPostgres(out / ".maskfleet" / "postgres") as postgres:
        engine = open_engine(postgres.url)
        assert len(rows(engine)) == 3
        with encoding(postgres.url, kept) as process:
            wait_for(lambda: states(engine) == ["stored"] * 3, "the third embedding")
            process.stdin.close()  # type: ignore[union-attr]
            assert process.wait(120) == 0
        assert_click_is_answered(engine, kept, source)
        engine.dispose()


def assert_click_is_answered(engine: Engine, kept: Path, source: Path) -> None:
    prompt = Prompt(points=((64.0, 48.0, 1),), box_xyxy=(20.0, 20.0, 100.0, 80.0))
    decoding, model = Decoding(EmbeddingStore(open_objects(str(kept)))), load_model(find_model("sam_nano"), "cpu")
    with engine.begin() as db:
        ids = list(db.execute(text("SELECT id FROM asset WHERE job_id = 1")).scalars())
        assets = embeddings.embeddable_assets(db, asset_ids=ids)
    for asset in assets.values():
        stamp = embedding_of(asset, EmbeddingFormat.FP16).stamp
        answer = decoding.answer(ClickRequest(n=1, stamp=stamp, size_hw=(96, 128), prompt=prompt))
        image = decode((source / asset.key).read_bytes(), name=asset.key, max_pixels=10**6)
        [[expected]] = model.prompted(image, model.embed([image])[0], [prompt], PromptParams())
        assert answer.mask is not None, answer
        assert answer.mask.area_px == pytest.approx(expected.area_px, rel=0.01, abs=2)


def test_on_a_full_disk_every_asset_is_labeled(tmp_path: Path) -> None:
    """A file stands where the folder would be made, which no user may write to, not even root."""
    source, out = draw(tmp_path / "pictures", 3), tmp_path / "out"
    (tmp_path / "full").write_text("")

    full = str(tmp_path / "full")
    done = run(source, "--out", out, *FEW_POINTS, "--keep-embeddings", "all", MASKFLEET_EMBEDDINGS=full)

    assert json.loads(done.stdout)["assets"] == {"listed": 3, "labeled": 3, "failed": 0}
    assert "cannot be written" in (out / ".maskfleet" / "worker.log").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "sam3", "--text", "bus", "--keep-embeddings", "all"], "sam3 takes no points and no boxes"),
        (["--model", "sam_nano", "--keep-embeddings", "0"], "expected a number from 1 to"),
        (["--model", "sam_nano", "--keep-embeddings", "some"], "expected a number from 1 to"),
    ],
)
def test_what_cannot_be_kept_is_said_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(tmp_path, *words, "--out", tmp_path / "out", code=2)
    assert said in " ".join(done.stderr.split())


def test_a_deployment_without_a_place_for_embeddings_refuses_to_keep_them(
    deployment: Deployment, tmp_path: Path
) -> None:
    words = [str(tmp_path), "--model", "sam_nano", "--keep-embeddings", "5"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.cli", "submit", *words],
        env=deployment.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "MASKFLEET_EMBEDDINGS is not set" in done.stderr


def test_wanted_embeddings_overtake_the_chunks_that_wait(deployment: Deployment, tmp_path: Path, redis: Any) -> None:
    deployment.settings |= {"MASKFLEET_EMBEDDINGS": str(tmp_path / "kept"), "MASKFLEET_CHUNK_SIZE": "1"}
    source = draw(tmp_path / "pictures", 6)
    job = int(deployment.call("submit", str(source), *FEW_POINTS[:4]))
    deployment.start("dispatch")
    wait_for(lambda: redis.llen("maskfleet") == 6, "six chunks in the queue", logs=deployment.logs)
    want(deployment.engine, addresses_of(deployment.engine, deployment.read(job)[0]))
    wait_for(lambda: redis.llen("embed.maskfleet") == 1, "a message for six embeddings", logs=deployment.logs)

    deployment.start("worker", "--devices", "cpu")
    deployment.wait_until_done(job)

    assert states(deployment.engine) == ["stored"] * 6
    with deployment.engine.begin() as db:
        order = "SELECT (SELECT max(stored_at) FROM embedding) < (SELECT min(created_at) FROM outcome)"
        assert db.execute(text(order)).scalar_one()
    assert {path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file()} == {
        row["size_bytes"] for row in rows(deployment.engine).values()
    }


@pytest.mark.faults
def test_an_encoder_killed_between_file_and_row_loses_nothing(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    """The process waits to note that it wrote the file. There it is killed."""
    job = make_nano_job(engine, draw(tmp_path / "pictures", 1))
    [address] = addresses_of(engine, job).values()
    want(engine, addresses_of(engine, job))
    kept = tmp_path / "kept"
    with engine.connect() as holder:
        holder.execute(text(HOLD_THE_NOTES))
        holder.commit()
        with encoding(database_url, kept) as process:
            wait_for((kept / address).exists, "the file")
            process.send_signal(signal.SIGKILL)
            process.wait()
        holder.execute(text("SELECT pg_advisory_unlock(1)"))
        holder.commit()
    assert states(engine) == ["wanted"]
    with engine.begin() as db:
        db.execute(text("UPDATE embedding SET claimed_until = now() - interval '1 s'"))

    with encoding(database_url, kept):
        wait_for(lambda: states(engine) == ["stored"], "the second try")

    assert rows(engine)[address]["attempts"] == 2
    assert [path for path in kept.rglob("*") if path.is_file()] == [kept / address]


# A write that says that an embedding is stored waits here, and nothing else does.
HOLD_THE_NOTES = """
    CREATE FUNCTION wait_to_note() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_lock_shared(1); PERFORM pg_advisory_unlock_shared(1); RETURN new; END $$;
    CREATE TRIGGER wait_to_note BEFORE UPDATE ON embedding FOR EACH ROW
        WHEN (new.state = 'stored') EXECUTE FUNCTION wait_to_note();
    SELECT pg_advisory_lock(1)"""


def test_the_loop_says_what_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "workers.running.encode"],
        env=environment | {"PYTHONPATH": str(STUB)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "MASKFLEET_EMBEDDINGS and MASKFLEET_DATABASE_URL must be set" in done.stderr
