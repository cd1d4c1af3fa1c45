"""`maskfleet run` as a person uses it: one command, real servers inside, files that other tools can read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from pycocotools.coco import COCO

from db import jobs
from db.session import open_engine
from orchestrator.local.folder import folder_database
from tests.deployment import STUB, draw_pictures
from tests.json_page import documented_keys
from tests.waiting import wait_for

pytestmark = pytest.mark.integration

MASKFLEET = [sys.executable, "-P", "-m", "orchestrator.cli"]
RUN = [*MASKFLEET, "run", "--devices", "cpu"]  # a second worker would take longer to start than to label


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    return {**kept, "PYTHONPATH": str(STUB), **settings}


def run(
    *words: str | Path, code: int = 0, cwd: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RUN, *map(str, words)],
        env=environment(**settings),
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def test_a_folder_becomes_coco_label_studio_tasks_a_summary_and_a_gallery(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "my pictures", 5)
    (source / "süb 📷").mkdir()
    Image.new("RGB", (40, 30)).save(source / "süb 📷" / "x+%20y.png")
    (source / "half.jpg").write_bytes(b"a text")
    (source / "notes.txt").write_text("not listed")
    out = tmp_path / "out"

    done = run(source, "--out", "out", "--model", "stub", "--label", "thing", "--json", code=1, cwd=tmp_path)

    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary) == documented_keys("run")
    assert summary["assets"] == {"listed": 7, "labeled": 6, "failed": 1}
    assert summary["masks"] == 12
    [failed] = summary["failed"]
    assert (failed["key"], failed["error_kind"]) == ("half.jpg", "not_image")
    coco = COCO(out / "coco.json")
    assert {image["file_name"] for image in coco.imgs.values()} >= {"0000.png", "süb 📷/x+%20y.png"}
    assert coco.cats[1]["name"] == "thing"
    assert coco.annToMask(coco.anns[1]).shape == (24, 32)
    tasks = json.loads((out / "label-studio.json").read_text())
    assert len(tasks) == 6
    assert tasks[0]["predictions"][0]["model_version"] == summary["model_version"]
    page = (out / "index.html").read_text()
    assert "half.jpg" in page
    assert "<script src" not in page


def test_a_folders_label_studio_tasks_are_shown_once_imported_or_it_is_said(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "my pictures", 1), tmp_path / "out"

    plain = run(source, "--out", out, "--model", "stub")
    summary = json.loads((out / "summary.json").read_text())
    wrong = run(source, "--out", out, "--model", "stub", "--local-files", out, code=2)
    shown = json.loads(run(source, "--out", out, "--model", "stub", "--local-files", tmp_path, "--json").stdout)

    assert "label-studio.json names the images by path" in plain.stderr
    assert any("--local-files ROOT" in note for note in summary["notes"])
    assert "is not below --local-files" in wrong.stderr
    assert shown["answered_from_stored"] == 1
    [task] = json.loads((out / "label-studio.json").read_text())
    assert task["data"]["image"] == "/data/local-files/?d=my%20pictures/0000.png"


def test_the_same_command_again_computes_nothing_and_sees_new_files(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 4), tmp_path / "out"
    first = json.loads(run(source, "--out", out, "--model", "stub", "--json").stdout)
    Image.new("RGB", (16, 16)).save(source / "new.png")

    second = json.loads(run(source, "--out", out, "--model", "stub", "--json").stdout)

    assert first["assets"]["labeled"] == 4
    assert second["assets"]["labeled"] == 5
    assert second["answered_from_stored"] == 4
    assert second["masks"] == 10
    fresh = json.loads(run(source, "--out", out, "--model", "stub", "--fresh", "--json").stdout)
    assert fresh["answered_from_stored"] == 0


def start(source: Path, out: Path, **settings: str) -> subprocess.Popen[bytes]:
    command = [*RUN, str(source), "--out", str(out), "--model", "stub"]

    def hear_ctrl_c() -> None:  # a shell starts what it puts into the background deaf to it, and so its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, env=environment(**settings), start_new_session=True, preexec_fn=hear_ctrl_c)


def labeled_so_far(out: Path) -> int:
    log = out / ".maskfleet" / "worker.log"
    return log.read_text().count("succeeded in") if log.exists() else 0


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 24), tmp_path / "out"
    settings = {"MASKFLEET_CHUNK_SIZE": "4", "MASKFLEET_BATCH_SIZE": "2"}
    process = start(source, out, **settings, MASKFLEET_STUB_SECONDS="1")  # four chunks are left when it is stopped
    wait_for(lambda: labeled_so_far(out) >= 2, "two finished chunks")
    os.kill(process.pid, how)
    assert process.wait(120) == (130 if how is signal.SIGINT else -signal.SIGKILL)

    summary = json.loads(run(source, "--out", out, "--model", "stub", "--json", **settings).stdout)

    assert summary["assets"] == {"listed": 24, "labeled": 24, "failed": 0}
    assert summary["job"] == 1
    assert summary["answered_from_stored"] == 0


@pytest.mark.faults
def test_a_run_of_another_request_leaves_a_stopped_one_alone_and_its_own_command_still_goes_on(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 24), tmp_path / "out"
    settings = {"MASKFLEET_CHUNK_SIZE": "4", "MASKFLEET_BATCH_SIZE": "2"}
    process = start(source, out, **settings, MASKFLEET_STUB_SECONDS="1")
    wait_for(lambda: labeled_so_far(out) >= 1, "a finished chunk")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) == 130

    other = json.loads(run(source, "--out", out, "--model", "stub", "--label", "x", "--json", **settings).stdout)

    assert (other["job"], other["assets"]["labeled"]) == (2, 24)
    with folder_database(out) as url:
        engine = open_engine(url)
        with engine.begin() as db:
            assert jobs.count_job(db, job_id=1).labeled < 24
        engine.dispose()
    own = json.loads(run(source, "--out", out, "--model", "stub", "--json").stdout)
    assert (own["job"], own["assets"]["labeled"]) == (1, 24)


def test_a_run_that_is_cancelled_says_what_is_left_and_is_no_success(tmp_path: Path) -> None:
    source, out, hold = draw_pictures(tmp_path / "pictures", 12), tmp_path / "out", tmp_path / "hold"
    settings = {"MASKFLEET_CHUNK_SIZE": "2", "MASKFLEET_BATCH_SIZE": "2"}
    command, log = [*RUN, source, "--out", out, "--model", "stub"], out / ".maskfleet" / "worker.log"
    hold.touch()
    held = environment(**settings, MASKFLEET_STUB_HOLD=str(hold))
    with subprocess.Popen(command, env=held, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        wait_for(lambda: log.exists() and " received" in log.read_text(), "a chunk at work")
        cancelled = subprocess.run([*MASKFLEET, "cancel", out], env=environment(), check=False)
        hold.unlink()
        printed, said = running.communicate(timeout=300)

    assert cancelled.returncode == 0
    left = json.loads((out / "summary.json").read_text())["pending"]
    assert left > 0
    assert running.returncode == 1
    assert f"0 failed, {left} left, in " in printed
    assert f"the job was cancelled, and {left} assets are left; the same command goes on" in said
    again = json.loads(run(source, "--out", out, "--model", "stub", "--json", **settings).stdout)
    assert (again["job"], again["pending"], again["assets"]["labeled"]) == (1, 0, 12)


def test_two_runs_at_once_do_not_disturb_each_other_and_one_folder_takes_one(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 6)
    outs = [tmp_path / "a", tmp_path / "b"]
    slow = {"MASKFLEET_STUB_SECONDS": "0.5"}
    running = [start(source, out, **slow) for out in outs]
    wait_for(lambda: (outs[0] / ".maskfleet" / "worker.log").exists(), "the first run to hold its folder")
    running[0].send_signal(signal.SIGSTOP)  # it must not be over when the other one asks

    refused = run(source, "--out", outs[0], "--model", "stub", code=2)
    running[0].send_signal(signal.SIGCONT)

    assert "another run is writing" in refused.stderr
    assert [process.wait(180) for process in running] == [0, 0]
    for out in outs:
        assert json.loads((out / "summary.json").read_text())["assets"]["labeled"] == 6


def test_a_run_leaves_no_file_in_the_temporary_folder_and_no_semaphore(tmp_path: Path) -> None:
    temporary, log = tmp_path / "temporary", tmp_path / "out" / ".maskfleet" / "worker.log"
    temporary.mkdir()
    source = draw_pictures(tmp_path / "pictures", 1)
    hold = tmp_path / "hold"
    hold.touch()
    settings = {"TMPDIR": str(temporary), "MASKFLEET_STUB_HOLD": str(hold)}
    command = [*RUN, str(source), "--out", str(tmp_path / "out"), "--model", "stub"]

    with subprocess.Popen(command, env=environment(**settings), stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: log.exists() and "received" in log.read_text(), "a chunk at work")
        children = psutil.Process(process.pid).children(recursive=True)
        semaphores = {inode for child in children for inode in semaphores_of(child.pid)}
        left = semaphores & semaphores_that_are_left()
        hold.unlink()
        assert left

    assert process.returncode == 0
    assert list(temporary.iterdir()) == []
    # billiard's tracker removes them after its last process has ended, and nobody waits for it.
    wait_for(lambda: not semaphores & semaphores_that_are_left(), "the end of the semaphores")


def semaphores_of(pid: int) -> list[int]:
    """The inodes of the semaphores that the process has open."""
    maps = ""
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        maps = Path(f"/proc/{pid}/maps").read_text()
    return [int(inode) for inode in re.findall(r"(\d+) +/dev/shm/sem\.", maps)]


def semaphores_that_are_left() -> set[int]:
    found = set()
    for path in Path("/dev/shm").glob("sem.mp-*"):
        with suppress(FileNotFoundError):  # another test's process has just removed its own
            found.add(path.stat().st_ino)
    return found


def test_a_fast_job_is_encoded_fast_too(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 2)

    asked = ["--model", "stub", "--param", "precision=fast"]
    done = run(source, "--out", tmp_path / "out", *asked, "--json", MASKFLEET_STUB_MASKS="2")

    assert json.loads(done.stdout)["masks"] == 2 * 3


def test_a_folder_whose_name_looks_like_a_users_home_is_that_folder(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "~old", 1)

    dry = run("~old", "--out", "~out", "--model", "stub", "--dry-run", cwd=tmp_path)

    assert dry.stdout.startswith("1 assets")


def test_a_dry_run_says_what_would_be_taken_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 3), tmp_path / "out"
    (source / "notes.txt").touch()

    printed = json.loads(run(source, "--out", out, "--model", "stub", "--dry-run", "--json").stdout)

    assert (printed["assets"], printed["skipped"]) == (3, {"not_image_suffix": 1})
    assert printed["sample"] == ["0000.png", "0001.png", "0002.png"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/does/not/exist"], "/does/not/exist"),
        ([".", "--model", "sam_vit_x"], "known: sam_vit_h"),
        ([".", "--param", "points=3"], "known: points_per_side"),
        ([".", "--param", "points_per_side"], "name=value"),
        (["ftp://somewhere"], "s3://bucket/prefix"),
        ([".", "--label", " "], "--label: it is empty"),
        ([""], "SOURCE is empty"),
    ],
)
def test_wrong_usage_is_said_in_a_line_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(*words, "--out", tmp_path / "out", code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / ".maskfleet" / "postgres").exists()


def test_every_hostile_file_gets_what_it_deserves_and_its_neighbours_are_labeled(
    tmp_path: Path, testdata: Path
) -> None:
    expected: list[dict[str, Any]] = json.loads((testdata / "nasty" / "nasty.json").read_text())["files"]
    out = tmp_path / "out"

    done = run(testdata / "nasty" / "files", "--out", out, "--model", "stub", "--include", "*", "--json", code=1)

    summary = json.loads(done.stdout)
    failed = {f["key"]: f["error_kind"] for f in summary["failed"]}
    sizes = {
        image["file_name"]: [image["width"], image["height"]]
        for image in json.loads((out / "coco.json").read_text())["images"]
    }
    assert summary["assets"]["listed"] == len(expected) == len(failed) + len(sizes)
    for file in expected:
        name = file["file"]
        if file["expect"] == "process":
            assert sizes.get(name) == file["display_size"], f"{name}: {failed.get(name)}"
        elif file["expect"] == "reject":
            assert name in failed, name
    assert not {"internal", "crashed_worker", "gpu_oom"} & set(failed.values())


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    """The start of Celery is broken, as it is where nobody may write to /dev/shm."""
    (tmp_path / "site").mkdir()
    broken = 'import sys\nif "celery" in sys.orig_argv: sys.exit("Permission denied: /dev/shm")\n'
    (tmp_path / "site" / "sitecustomize.py").write_text(broken)
    source = draw_pictures(tmp_path / "pictures", 1)

    done = run(source, "--out", tmp_path / "out", code=2, PYTHONPATH=str(tmp_path / "site"))

    assert "the worker ended with exit code 1" in done.stderr
    assert "Permission denied: /dev/shm" in done.stderr
