"""The command line answers at once, because it imports only what a command needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator.cli.root import COMMANDS, imported_command

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
