"""JOB may be the folder that `maskfleet run` wrote: its database runs for as long as a command needs it."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from db import deletion
from db.session import open_engine
from orchestrator.local.folder import folder_database, state_dir_of
from tests.deployment import draw_pictures
from tests.e2e.test_run import MASKFLEET, RUN, environment, run
from tests.narrow_terminal import shown_in_a_terminal
from tests.waiting import wait_for

pytestmark = pytest.mark.integration


def call(*words: str | Path, code: int = 0, both: bool = False, **settings: str) -> str:
    """What a command printed: on stdout, if anything, else on stderr. both: on stdout and then on stderr."""
    done = subprocess.run(
        [*MASKFLEET, *map(str, words)],
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr if both else done.stdout or done.stderr


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over three pictures, one of them a text."""
    folder = tmp_path_factory.mktemp("folder")
    source = draw_pictures(folder / "pictures", 2)
    (source / "half.jpg").write_bytes(b"a text")
    run(source, "--out", folder / "out", "--model", "stub", code=1)
    return folder / "out"


def server_runs(out: Path) -> bool:
    """Whether the folder's server runs. It is root's copy elsewhere, so it is found by its command line."""
    state = str(state_dir_of(out).absolute())
    folders = [state]
    for note in Path("/var/tmp/maskfleet-root").glob("*/belongs-to"):
        with suppress(FileNotFoundError):  # another test's run has just removed it
            folders += [str(note.parent)] if note.read_text() == state else []
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    return any(folder in command and "postgres" in command for folder in folders for command in commands)


def assert_server_ends(out: Path) -> None:
    """pg_ctl returns when the server has removed its pid file, and its process is there a moment longer."""
    wait_for(lambda: not server_runs(out), "the end of the folder's server", seconds=60)


def test_a_finished_run_is_shown_and_exported_by_its_folder(out: Path, tmp_path: Path) -> None:
    shown = json.loads(call("show", out, "--json"))
    call("export", out, "--format", "yolo", "--out", tmp_path / "yolo")

    assert (shown["assets"]["labeled"], shown["assets"]["failed"]) == (2, 1)
    assert sorted(p.suffix for p in (tmp_path / "yolo").rglob("*") if p.is_file() and p.suffix != ".yaml")
    assert_server_ends(out)


def test_the_commands_that_are_named_for_a_folders_job_name_its_folder(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 1), tmp_path / "my out"
    (source / "half.jpg").write_bytes(b"a text")
    run(source, "--out", out, "--model", "stub", code=1)

    shown = call("show", out)
    watched = call("watch", out, code=1, both=True)
    call("retry", out)
    cancelled = call("cancel", out)
    stopped = call("show", out)
    resumed = call("resume", out)

    assert f"maskfleet show '{out}' --failed " in shown
    assert f"maskfleet retry '{out}'    tries the failed assets again, with the same `maskfleet run`" in shown
    assert f"maskfleet gallery '{out}' --out look " in watched
    assert cancelled.strip() == "job 1 is cancelled; the same `maskfleet run` goes on"
    assert "the same `maskfleet run`    goes on where it stopped" in stopped
    assert resumed.strip() == "job 1 goes on with the same `maskfleet run`"


def test_a_long_source_is_shown_whole_in_a_terminal(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / ("long" * 30), 1)
    run(source, "--out", tmp_path / "out", "--model", "stub")

    assert str(source) in shown_in_a_terminal("show", tmp_path / "out", environment=environment())


def test_a_number_without_a_deployment_is_answered_with_how_a_run_is_named() -> None:
    assert "`maskfleet run`, whose jobs are named by their folder, not by a number" in call("show", "1", code=2)


def test_an_empty_job_is_not_this_folder(out: Path) -> None:
    done = subprocess.run(
        [*MASKFLEET, "delete", "", "--yes"], env=environment(), capture_output=True, text=True, cwd=out, check=False
    )

    assert (done.returncode, "JOB is empty" in done.stderr) == (2, True)


def test_a_terminal_without_a_keys_letters_shows_escapes_and_json_stays_json(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "übung", 1)
    run(source, "--out", tmp_path / "out", "--model", "stub")

    page = call("show", tmp_path / "out", PYTHONIOENCODING="ascii")
    document = json.loads(call("show", tmp_path / "out", "--json", PYTHONIOENCODING="ascii"))

    assert "\\xfcbung" in page
    assert document["source"] == str(source)


def test_an_export_into_a_pipe_is_refused_in_a_line(out: Path) -> None:
    said = call("export", out, "--format", "coco", "--out", "/dev/stdout", code=2)

    assert said.strip() == "maskfleet: /dev/stdout: expected the name of a file"


def test_a_home_that_no_shell_put_in_is_meant_everywhere(out: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("gone.jpg")
    home = {"HOME": str(tmp_path)}

    run(out.parent / "pictures", "--out=~/again", "--model", "stub", code=1, cwd=tmp_path, **home)
    call("export", "~/again", "--format", "coco", "--out=~/coco.json", "--keys=~/keys.txt", **home)
    call("gallery", out, "--out=~/look", **home)

    assert {path.name for path in tmp_path.iterdir()} == {"keys.txt", "again", "coco.json", "look"}
    assert (tmp_path / "again" / "coco.json").is_file()


def test_a_gallery_of_a_folder_shows_its_pictures_and_what_failed(out: Path, tmp_path: Path) -> None:
    told = call("gallery", out, "--out", tmp_path / "look", "--sample", "1")
    typo = call("gallery", out, "--out", tmp_path / "typo", "--label", "dgo", code=2)

    page = tmp_path / "look" / "index.html"
    assert told.strip() == f"gallery: {page}"
    assert page.read_text().count("data:image/jpeg;base64,") == 1
    assert "not_image · 1" in page.read_text()
    assert "1 of 2 assets" in page.read_text()
    assert "has object" in typo


def test_a_gallery_where_a_file_lies_is_refused_in_a_line(out: Path, tmp_path: Path) -> None:
    (tmp_path / "look").touch()

    said = call("gallery", out, "--out", tmp_path / "look", code=2)

    assert said.strip() == f"maskfleet: {tmp_path / 'look'}: File exists"


def test_a_complete_export_is_not_written_again(out: Path, tmp_path: Path) -> None:
    words = ("export", out, "--format", "parquet", "--out", tmp_path / "parquet")

    assert "wrote" in call(*words)
    assert "was complete already; nothing was written" in (again := call(*words))
    assert "wrote" not in again


def test_the_options_of_export_choose_what_is_written(out: Path, tmp_path: Path) -> None:
    key = min((out.parent / "pictures").glob("*.png")).name
    (tmp_path / "keys.txt").write_text(f"gone.jpg\n{key}\nhalf.jpg\n")
    options = ("--keys", tmp_path / "keys.txt", "--label", "object", "--min-area", "1", "--shard-assets", "1")

    told = call("export", out, "--format", "parquet", "--out", tmp_path / "parquet", *options)
    typo = call("export", out, "--format", "parquet", "--out", tmp_path / "typo", "--label", "dgo", code=2)
    (tmp_path / "keys.gz").write_bytes(gzip.compress(b"half.jpg", mtime=0))
    packed = call(
        "export", out, "--format", "coco", "--out", tmp_path / "coco.json", "--keys", tmp_path / "keys.gz", code=2
    )

    assert "2 keys are no labeled asset" in told
    assert "has object" in typo
    assert "keys.gz: no line of it is a key" in packed
    masks = pq.read_table(tmp_path / "parquet" / "masks").to_pylist()
    assert {mask["key"] for mask in masks} == {key}
    assets = pq.read_table(tmp_path / "parquet" / "assets").to_pylist()
    assert {asset["key"]: asset["error_kind"] for asset in assets} == {key: None, "half.jpg": "not_image"}


def test_failed_assets_of_a_folder_run_again_with_the_next_run(tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 1)
    (source / "half.png").write_bytes(b"a text")
    run(source, "--out", tmp_path / "out", "--model", "stub", code=1)
    draw_pictures(tmp_path / "other", 1)
    (source / "half.png").write_bytes((tmp_path / "other" / "0000.png").read_bytes())

    assert "1 assets of job 1 run again with the same `maskfleet run`" in call("retry", tmp_path / "out")
    run(source, "--out", tmp_path / "out", "--model", "stub")


def test_a_job_is_deleted_by_its_folder_after_it_was_asked_for(tmp_path: Path) -> None:
    run(draw_pictures(tmp_path / "pictures", 2), "--out", tmp_path / "out", "--model", "stub")
    assert "say --yes" in call("delete", tmp_path / "out", code=2)

    assert "job 1 is deleted: 2 assets" in call("delete", tmp_path / "out", "--yes")

    assert "the job was deleted" in call("show", tmp_path / "out", code=2)
    assert (tmp_path / "out" / "coco.json").exists()
    run(tmp_path / "pictures", "--out", tmp_path / "out", "--model", "stub")  # it begins anew


def test_a_deletion_in_a_folder_that_was_interrupted_goes_on_and_spares_the_job_before(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 2), tmp_path / "out"
    run(source, "--out", out, "--model", "stub")
    run(source, "--out", out, "--model", "stub")
    with folder_database(out) as url:
        engine = open_engine(url)
        with engine.begin() as db:
            assert deletion.begin_deletion(db, job_id=2)
        engine.dispose()

    assert "job 2 is deleted" in call("delete", out, "--yes")

    shown = json.loads(call("show", out, "--json"))
    assert (shown["job"], shown["assets"]["labeled"]) == (1, 2)


def test_several_commands_share_one_server_and_the_last_stops_it(out: Path) -> None:
    with folder_database(out) as url:
        assert json.loads(call("show", out, "--json"))["assets"]["labeled"] == 2
        engine = open_engine(url)
        with engine.begin() as db:  # the command that ended has not stopped our server
            assert db.exec_driver_sql("SELECT count(*) FROM outcome").scalar_one() == 3
        engine.dispose()
        assert server_runs(out)
    assert_server_ends(out)


def test_a_command_that_was_killed_leaves_the_folder_usable_and_the_next_removes_its_sockets(out: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from orchestrator.local.folder import folder_database\n"
        "with folder_database(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        sockets = Path((state_dir_of(out) / "address").read_text().partition("?host=")[2])
        os.kill(holder.pid, signal.SIGKILL)
    assert sockets.is_dir()

    assert json.loads(call("show", out, "--json"))["assets"]["labeled"] == 2
    assert_server_ends(out)
    assert not sockets.exists()


@pytest.mark.faults
def test_a_second_ctrl_c_hurries_and_still_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = draw_pictures(tmp_path / "pictures", 6), tmp_path / "out"
    log = tmp_path / "run.log"
    endless = {"MASKFLEET_STUB_SECONDS": "600", "MASKFLEET_DRAIN_SECONDS": "600"}
    command = [*RUN, str(source), "--out", str(out), "--model", "stub"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env=environment(**endless),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    worker_log = out / ".maskfleet" / "worker.log"
    wait_for(
        lambda: worker_log.exists() and "received" in worker_log.read_text(), "a chunk at work", logs=log.read_text
    )
    started = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}

    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in log.read_text(), "the first to be heard", logs=log.read_text)
    os.kill(process.pid, signal.SIGINT)

    assert process.wait(120) == 130
    assert "Traceback" not in log.read_text()
    assert "the same command goes on" in log.read_text()
    wait_for(lambda: not any(map(psutil.pid_exists, started)), "the end of its processes")
    assert "leaked" not in worker_log.read_text()
    assert_server_ends(out)
    summary = json.loads(run(source, "--out", out, "--model", "stub", "--json").stdout)
    assert (summary["job"], summary["assets"]["labeled"]) == (1, 6)


def test_another_folder_and_a_typing_error_are_named(tmp_path: Path) -> None:
    said = call("show", tmp_path, code=2)
    assert "no folder that `maskfleet run` wrote" in said
    assert str(tmp_path) in said


def test_a_typing_error_in_an_address_is_asked_about(tmp_path: Path) -> None:
    assert "did you mean s3://bucket/photos?" in run("s3:/bucket/photos", "--out", tmp_path / "out", code=2).stderr


def test_the_version_is_printed() -> None:
    assert call("--version").strip() == version("maskfleet")


RESULTS = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
SNIPPETS = dict(re.findall(r"^### (.+?)\n.*?^```python\n(.*?)^```", RESULTS, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def results(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as docs/results.md has it: photos, out, parquet."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "photos").symlink_to(out.parent / "pictures")
    (folder / "out").symlink_to(out)
    call("export", out, "--format", "parquet", "--out", folder / "parquet")
    return folder


@pytest.mark.parametrize("tool", sorted(SNIPPETS))
def test_the_results_load_in_other_tools_as_the_docs_say(tool: str, results: Path) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", SNIPPETS[tool], re.MULTILINE):
        pytest.importorskip(module, reason=f"{module} is not among the packages of development")
    done = subprocess.run([sys.executable, "-c", SNIPPETS[tool]], cwd=results, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
