"""Jobs with models of one's own, on machines that have them, lack them, or have another one of that name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch
from sqlalchemy import Engine

from db import jobs, listing
from db.jobs import Job
from db.listing import NewAsset
from db.settings import Settings, settings
from orchestrator.jobs.request import Request, submit_job
from tests.deployment import draw_pictures
from tests.e2e.test_run import environment, run
from tests.factories import chunk_ids
from tests.s3_server import serve_s3
from workers.models.adding import add
from workers.models.loading import load_model
from workers.models.nano import load_sam_nano
from workers.models.own import toml_path
from workers.models.pulling import push
from workers.models.registry import find_model
from workers.models.weights import verify
from workers.running.chunk import run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

pytestmark = pytest.mark.integration

FEW_POINTS = {"points_per_side": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of sam_nano, as training scripts leave them."""
    state = load_sam_nano("cpu").state_dict()
    files = [tmp_path_factory.mktemp("checkpoints") / name for name in ("first.pth", "second.pth")]
    for number, file in enumerate(files):
        torch.save({"model": {f"module.{name}": value + 1e-6 * number for name, value in state.items()}}, file)
    return files


@pytest.fixture(scope="module")
def bucket(worker_id: str) -> Iterator[str]:
    """The address of an S3 server with a bucket `weights`."""
    keys = {"aws_access_key_id": "AKIATESTTESTTESTTEST", "aws_secret_access_key": "secret-of-the-test"}
    with serve_s3() as endpoint:
        boto3.session.Session(**keys, region_name="us-east-1").client("s3", endpoint_url=endpoint).create_bucket(
            Bucket="weights"
        )
        yield endpoint


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes this process a machine with its own weights folder, this mirror and this S3 endpoint."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def make(name: str, mirror: Path | str = "", endpoint: str = "") -> Path:
        monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / name))
        monkeypatch.setenv("MASKFLEET_WEIGHTS_MIRROR", str(mirror))
        monkeypatch.setenv("MASKFLEET_S3_ENDPOINT", endpoint)
        settings.cache_clear()
        return tmp_path / name

    yield make
    settings.cache_clear()


def submit(engine: Engine, source: Path) -> Job:
    """A listed job with the model `mine` over one picture."""
    draw_pictures(source, 1)
    [picture] = source.iterdir()
    with engine.begin() as db:
        job = submit_job(db, Request(source=str(source), model="mine", params=FEW_POINTS))
        asset = NewAsset(key=picture.name, size_bytes=1, etag="one")
        listing.add_assets(db, job=job, assets=[asset], cursor=None, skipped={}, complete=True, chunk_size=9)
    return job


def work(engine: Engine, job: Job, *, draining: bool = False) -> None:
    worker = Worker(
        name="one",
        engine=engine,
        settings=Settings(),
        load_model=lambda name: load_model(find_model(name), "cpu"),
        load_detector=lambda asked: pytest.fail("no detector was asked for"),
        draining=lambda: draining,
        on_hang=lambda: None,
    )
    [chunk_id] = chunk_ids(engine, job)
    run_chunk(worker, chunk_id)


def error_of(engine: Engine, job: Job) -> str:
    with engine.begin() as db:
        found = jobs.get_job(db, job_id=job.id)
        assert found is not None
        assert jobs.count_job(db, job_id=job.id).pending == 1
    return found.error or ""


def labeled(engine: Engine, job: Job) -> int:
    with engine.begin() as db:
        return jobs.count_job(db, job_id=job.id).labeled


def test_a_worker_takes_the_model_of_a_job_from_a_bucket_and_labels(
    node: Callable[..., Path], engine: Engine, checkpoints: list[Path], bucket: str, tmp_path: Path
) -> None:
    node("office", "s3://weights/models", bucket)
    add("mine", checkpoints[0], "sam_nano", origin="a test", licence="MIT")
    spec = find_model("mine")
    sent = push(spec, None)
    job = submit(engine, tmp_path / "pictures")

    assert sent == ["s3://weights/models/mine.safetensors", "s3://weights/models/mine.toml"]
    assert job.model_version.startswith(f"mine@{spec.sha256[:8]}+")
    assert job.asked["own_model"] == {"architecture": "sam_nano", "sha256": spec.sha256}

    there = node("machine", "s3://weights/models", bucket)
    work(engine, job)

    assert labeled(engine, job) == 1
    assert sorted(path.name for path in there.iterdir()) == ["mine.safetensors", "mine.toml"]
    assert verify(find_model("mine")).ok


def test_a_worker_with_another_model_of_that_name_refuses_with_a_reason_on_the_job(
    node: Callable[..., Path], engine: Engine, checkpoints: list[Path], tmp_path: Path
) -> None:
    mirror = tmp_path / "mirror"
    node("office")
    add("mine", checkpoints[0], "sam_nano", origin="a test", licence="MIT")
    job, meant = submit(engine, tmp_path / "pictures"), find_model("mine").sha256
    node("machine")
    add("mine", checkpoints[1], "sam_nano", origin="a test", licence="MIT")
    push(find_model("mine"), str(mirror))
    said = f"mine: architecture sam_nano, sha256 {find_model('mine').sha256}, but the job was submitted with"

    with pytest.raises(ProcessUnfit):
        work(engine, job)
    assert f"{said} architecture sam_nano, sha256 {meant}" in error_of(engine, job)

    third = node("third", mirror)
    with pytest.raises(ProcessUnfit):
        work(engine, job)
    assert f"{said} architecture sam_nano, sha256 {meant}" in error_of(engine, job)
    assert not third.exists()


def test_a_worker_that_lacks_the_model_says_so_on_the_job(
    node: Callable[..., Path], engine: Engine, checkpoints: list[Path], tmp_path: Path
) -> None:
    node("office")
    add("mine", checkpoints[0], "sam_nano", origin="a test", licence="MIT")
    job = submit(engine, tmp_path / "pictures")

    node("machine")
    with pytest.raises(ProcessUnfit):
        work(engine, job)
    assert "one: mine cannot be loaded: unknown model 'mine'; known: sam_vit_h" in error_of(engine, job)

    node("machine", tmp_path / "empty")
    with pytest.raises(ProcessUnfit):
        work(engine, job)
    assert f"neither here nor in the mirror (mine: nothing at {tmp_path}/empty/mine.toml)" in error_of(engine, job)


def test_a_worker_that_stops_waits_for_no_download(
    node: Callable[..., Path], engine: Engine, checkpoints: list[Path], tmp_path: Path
) -> None:
    node("office")
    add("mine", checkpoints[0], "sam_nano", origin="a test", licence="MIT")
    push(find_model("mine"), str(tmp_path / "mirror"))
    job = submit(engine, tmp_path / "pictures")

    node("machine", tmp_path / "mirror")
    work(engine, job, draining=True)
    assert error_of(engine, job) == ""
    assert not toml_path("mine").exists()

    work(engine, job)
    assert labeled(engine, job) == 1


def test_wrong_bytes_in_a_bucket_are_said_on_the_job_and_not_kept(
    node: Callable[..., Path], engine: Engine, checkpoints: list[Path], bucket: str, tmp_path: Path
) -> None:
    office = node("office", "s3://weights/wrong", bucket)
    add("mine", checkpoints[0], "sam_nano", origin="a test", licence="MIT")
    push(find_model("mine"), None)
    job = submit(engine, tmp_path / "pictures")
    whole = (office / "mine.safetensors").read_bytes()
    client = boto3.session.Session(region_name="us-east-1").client("s3", endpoint_url=bucket)

    there = node("machine", "s3://weights/wrong", bucket)
    for content, said in (
        (whole[:-1] + b"x", "wrong/mine.safetensors has another file, with sha256"),
        (whole + bytes(9_000_000), f"bytes; at most {len(whole):,} are read"),
        (b"", "has another file, with sha256 e3b0c442"),
    ):
        client.put_object(Bucket="weights", Key="wrong/mine.safetensors", Body=content)
        with pytest.raises(ProcessUnfit):
            work(engine, job)
        assert said in error_of(engine, job)
        assert [path.stat().st_size for path in there.iterdir()] == [0]


@pytest.mark.slow
def test_a_checkpoint_becomes_a_model_of_the_commands_and_goes_again(checkpoints: list[Path], tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", 1)
    place = {"MASKFLEET_WEIGHTS_DIR": str(tmp_path / "weights")}

    def maskfleet(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "orchestrator.cli", *map(str, words)]
        done = subprocess.run(command, env=environment(**place), capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    added = maskfleet("models", "add", "mine", checkpoints[0], "--architecture", "sam_nano", "--licence", "MIT")
    assert added.stdout == f"{tmp_path}/weights/mine.safetensors\n"
    refused = maskfleet("models", "add", "other", checkpoints[0], "--architecture", "sam_vit_b", code=2)
    assert "it fits --architecture sam_nano" in refused.stderr
    unsigned = maskfleet("models", "add", "other", "https://x.invalid/y.pth", "--architecture", "sam_nano", code=2)
    assert "an address needs --sha256" in unsigned.stderr

    words = ["--out", tmp_path / "out", "--model", "mine", "--param", "points_per_side=2", "--devices", "cpu", "--json"]
    summary = json.loads(run(tmp_path / "pictures", *words, **place).stdout)
    assert summary["model_version"].startswith("mine@")
    assert summary["assets"]["labeled"] == 1
    entry = next(model for model in json.loads(maskfleet("models", "list", "--json").stdout) if model["name"] == "mine")
    assert (entry["architecture"], entry["licence"], entry["present"]) == ("sam_nano", "MIT", True)

    maskfleet("models", "remove", "sam_nano", "--yes", code=2)
    maskfleet("models", "remove", "mine", "--yes")
    assert list((tmp_path / "weights").iterdir()) == []
    assert "unknown model 'mine'" in maskfleet("models", "verify", "mine", code=2).stderr


@pytest.mark.slow
def test_a_checkpoint_of_a_bucket_becomes_a_model_when_its_sha256_is_right(
    node: Callable[..., Path], checkpoints: list[Path], bucket: str
) -> None:
    node("machine", endpoint=bucket)  # its variables reach the command too
    content = checkpoints[0].read_bytes()
    client = boto3.session.Session(region_name="us-east-1").client("s3", endpoint_url=bucket)
    client.put_object(Bucket="weights", Key="trained/first.pth", Body=content)
    command = [
        sys.executable,
        "-P",
        "-m",
        "orchestrator.cli",
        "models",
        "add",
        "mine",
        "s3://weights/trained/first.pth",
    ]
    command += ["--architecture", "sam_nano", "--sha256"]

    def add_with(sha256: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, sha256], capture_output=True, text=True, check=False)

    wrong = add_with("0" * 64)
    right = add_with(hashlib.sha256(content).hexdigest())

    assert (wrong.returncode, right.returncode) == (2, 0), wrong.stderr + right.stderr
    assert "sha256" in wrong.stderr
    assert find_model("mine").architecture == "sam_nano"
