"""The command line answers at once, because it imports only what a command needs."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.errors import as_message
from orchestrator.cli.root import COMMANDS, imported_command
from workers.errors import SourceError

HEAVY = ("sqlalchemy", "pydantic", "alembic", "cv2", "numpy", "boto3", "httpx", "celery", "structlog")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_sentence_in_the_root_is_that_of_its_file(name: str) -> None:
    said = (imported_command(name).help or "").split("\n\n")[0]

    assert COMMANDS[name][1] == " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ("--help", ()),
        ("--version", ()),
        ("jbos", ("pydantic",)),  # by typer itself
        ("jobs --help", ("sqlalchemy", "pydantic")),
        ("show --help", ("sqlalchemy", "pydantic")),
        ("submit --help", ("sqlalchemy", "pydantic")),
    ],
)
def test_only_what_the_command_needs_is_imported(arguments: str, allowed: tuple[str, ...]) -> None:
    program = (
        "import sys; from orchestrator.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('imported:', *sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-P", "-c", program, *arguments.split()]

    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    imported = set(said.partition("imported:")[2].split())
    assert [name for name in HEAVY if name in imported and name not in allowed] == []


def test_what_a_worker_is_made_of_loads_no_model_store_or_client_that_its_job_may_not_need() -> None:
    program = "import sys; from orchestrator.cli import operate; from workers.running import devices, tasks"
    command = [sys.executable, "-P", "-c", f"{program}\nprint(*sys.modules)"]

    imported = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert {"torch", "boto3", "httpx", "alembic", "transformers"} & set(imported) == set()


def test_a_misspelt_command_is_guessed() -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "jbos"]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert "Did you mean 'jobs'" in ended.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "/nowhere/[/x]"],
        ["models", "push", "[/x]"],
        ["run", "orchestrator/scenes", "--out", "o", "--dry-run", "--detector", "[/x]"],
        ["run", "orchestrator/scenes", "--out", "o", "--dry-run", "--prompts", "[/x]"],
        ["run", "orchestrator/scenes", "--out", "o", "--dry-run", "--classify", "a", "--classifier", "[/x]"],
    ],
)
def test_square_brackets_in_a_name_are_shown_as_they_are(words: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.cli", *words], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2
    assert "[/x]" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("option", ["--name", "--label", "--include", "--out"])
def test_a_word_that_is_not_utf8_is_refused_before_anything_begins(option: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "run", ".", option, "o\udcff"]

    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert "expected UTF-8" in ended.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["jobs"], "--limit"),
        (["export", "1", "--format", "parquet", "--out", "o"], "--shard-assets"),
    ],
)
def test_a_number_that_no_table_can_hold_is_refused_with_its_option(words: list[str], option: str) -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *words, option, "99999999999999999999"]

    ended = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert option in ended.stderr


def test_a_score_that_is_no_number_is_refused() -> None:
    words = ["export", "1", "--format", "parquet", "--out", "o", "--min-score", "nan"]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator.cli", *words], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2
    assert "--min-score nan: expected a score" in ended.stderr


def test_a_file_that_cannot_be_used_is_said_in_a_line_and_an_error_of_ours_keeps_its_trace() -> None:
    assert as_message(FileExistsError(errno.EEXIST, "File exists", "out/index.html")) == "out/index.html: File exists"
    assert as_message(FileExistsError("out: expected the name of a file")) == "out: expected the name of a file"
    assert as_message(OSError(errno.ENOSPC, "No space left on device")) == "[Errno 28] No space left on device"
    assert as_message(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None
    assert as_message(KeyError("ours")) is None


def test_no_terminal_obeys_what_a_foreign_key_says_in_a_message() -> None:
    error = SourceError("a\x1b]0;owned\x07.png: gone\n\tlook again")

    assert as_message(error) == r"a\x1b]0;owned\x07.png: gone" + "\n    look again"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_command_whose_shell_has_closed_a_stream_does_its_work(closed: str) -> None:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "models", "list"]

    done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "bash", *command], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert ("sam_nano" in done.stdout) is (closed != ">&-")
