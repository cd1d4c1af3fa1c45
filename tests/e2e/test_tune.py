"""`maskfleet tune` as a person uses it: real Postgres, sam_nano, annotations as `review` stores them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Engine

from db.publishing import LsProject
from orchestrator.label_studio.addresses import server_key
from tests.deployment import MASKFLEET
from tests.json_page import documented_keys
from tests.reviewed_job import LABEL, draw_scenes, label_studio_of, plant_review
from tests.waiting import wait_for
from workers.models.files import model_version
from workers.models.registry import find_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROJECT = 7
NANO = find_model("sam_nano")
VERSION = model_version(NANO, {"mode": "automatic"})


@pytest.fixture
def label_studio() -> Iterator[str]:
    with label_studio_of([LABEL], PROJECT) as url:
        yield url


@pytest.fixture
def environment(database_url: str, label_studio: str, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    return {
        **kept,
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": label_studio,
        "MASKFLEET_LABEL_STUDIO_API_KEY": "a" * 40,
        "MASKFLEET_LABEL_STUDIO_PROJECT": str(PROJECT),
        "MASKFLEET_WEIGHTS_DIR": str(tmp_path / "weights"),
    }


def maskfleet(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MASKFLEET, *words], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def begin(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    # A shell lets its background commands, and what they start, ignore Ctrl-C.
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*MASKFLEET, *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listens,
        start_new_session=True,
    )


def interrupt(environment: dict[str, str], out: Path, *words: str) -> str:
    """Start the command, send it Ctrl-C when it encodes turned copies, and return what it said then. Before that, the
    same command is refused.
    """
    encoded = out / ".maskfleet" / "embeddings"
    with begin(environment, *words) as process:
        wait_for(lambda: list(encoded.glob("*-4.safetensors")), "the first turned copy", 240)
        second = maskfleet(environment, *words)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"{out}: another tuning writes there now" in second.stderr
    assert process.returncode == 130, said
    return said


def kill(environment: dict[str, str], out: Path, *words: str) -> None:
    """Start the command, and kill it and its process at the first checkpoint, both at once as a power cut does."""
    with begin(environment, *words) as process:
        wait_for((out / ".maskfleet" / "checkpoint.safetensors").is_file, "the first checkpoint", 240)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_reviewed_job_teaches_a_decoder_that_becomes_a_model_though_it_was_stopped_and_killed(
    engine: Engine, environment: dict[str, str], label_studio: str, tmp_path: Path
) -> None:
    source, out, weights = tmp_path / "scenes", tmp_path / "out", tmp_path / "weights"
    scenes = draw_scenes(source, 10)
    ls_project = LsProject(server_key(label_studio), PROJECT)
    job = plant_review(engine, source, scenes, model="sam_nano", model_version=VERSION, ls_project=ls_project)
    words = ["tune", str(job.id), "--name", "ours", "--out", str(out), "--device", "cpu"]

    stopped = interrupt(environment, out, *words, "--minutes", "60")
    assert "The same command goes on" in stopped
    kill(environment, out, *words, "--minutes", "0.2")
    assert not list(weights.glob("*"))
    done = maskfleet(environment, *words, "--minutes", "0.2", "--keep-anyway", "--json")

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == documented_keys("tune")
    taught = document["taught"]
    assert taught["deleted"] == taught["assets"] == 10 - document["measured"]["box"]["assets"]
    assert 2 <= document["measured"]["box"]["assets"] < 8
    assert document["encoded"] == 0  # the interrupted run had done it
    assert "goes on from step" in done.stderr
    assert document["steps"] > 1
    assert {"box", "click", "corrected", "recall", "f1", "masks_an_object"} == set(document["measured"])
    assert sorted(path.name for path in weights.iterdir()) == ["ours.safetensors", "ours.toml"]
    assert tomllib.loads((weights / "ours.toml").read_text()).get("defaults", {}) == document["defaults"]
    assert json.loads((out / "tune.json").read_text()) == document
    page = (out / "index.html").read_text()
    assert "ours" in page
    assert "data:image/jpeg" in page
    [listed] = [
        one for one in json.loads(maskfleet(environment, "models", "list", "--json").stdout) if one["name"] == "ours"
    ]
    assert listed["present"]
    assert listed["defaults"] == {**NANO.defaults, **document["defaults"]}
    again = maskfleet(environment, *words)
    assert again.returncode == 2
    assert "ours is a model already" in again.stderr


def test_a_tuning_that_was_refused_before_its_first_step_reads_the_annotations_again(
    engine: Engine, environment: dict[str, str], label_studio: str, tmp_path: Path
) -> None:
    out, ls_project = tmp_path / "out", LsProject(server_key(label_studio), PROJECT)

    def tune(source: Path, *, changed: bool) -> subprocess.CompletedProcess[str]:
        scenes = draw_scenes(source, 10)
        job = plant_review(engine, source, scenes, model="sam_nano", model_version=VERSION, ls_project=ls_project)
        if changed:
            (source / "000.png").write_bytes(b"another image")
        words = ["--name", "ours", "--out", str(out), "--device", "cpu", "--minutes", "0.1", "--keep-anyway"]
        return maskfleet(environment, "tune", str(job.id), *words)

    refused = tune(tmp_path / "first", changed=True)
    done = tune(tmp_path / "second", changed=False)

    assert refused.returncode == 2
    assert "9 of 10 annotated assets can be used (000.png: its image was changed" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "tune.json").read_text())["taught"]["assets"] > 0
