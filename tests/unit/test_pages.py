"""The README is held to the code: commands, options, settings, error kinds, output files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from db.settings import Settings
from orchestrator.cli.root import COMMANDS, imported_command
from workers.errors import ErrorKind
from workers.models.registry import MODELS

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for name in COMMANDS:
        command = imported_command(name)
        if hasattr(command, "commands"):
            yield from ((f"{name} {sub}", below) for sub, below in command.commands.items())
        else:
            yield name, command


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_is_in_the_readme_and_has_an_example_and_a_sentence(
    name: str, command: typer.core.TyperCommand
) -> None:
    assert f"`maskfleet {name}" in README
    assert command.help
    assert f"maskfleet {name}" in (command.epilog or "")


def test_every_option_of_a_job_is_in_the_readme() -> None:
    options = {option for name, c in commands() if name in ("run", "submit") for p in c.params for option in p.opts}
    missing = {o for o in options if o.startswith("--") and f"`{o}" not in README} - {"--out", "--devices", "--json"}
    assert not missing


def test_every_command_that_the_readme_names_exists() -> None:
    known = {name for name, _ in commands()}
    for words in re.findall(r"maskfleet ((?:models |label-studio )?[a-z][a-z-]+)", README):
        assert words in known or words.split()[0] in known, words


def test_every_setting_is_in_the_readme_with_its_default_and_meaning() -> None:
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        assert f"| `MASKFLEET_{name.upper()}` | {default} | {field.description} |" in README
    for name in re.findall(r"MASKFLEET_([A-Z_0-9]+)", README):
        assert name.lower() in Settings.model_fields, name


def test_every_error_kind_and_model_is_in_the_readme() -> None:
    assert [kind for kind in ErrorKind if f"| `{kind}` |" not in README] == []
    assert [name for name in MODELS if f"`{name}`" not in README] == []


def test_commands_that_messages_advise_exist_with_their_options() -> None:
    """What stands between backticks in our own strings, from `maskfleet` on."""
    known = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands()}
    root = Path(__file__).parents[2]
    advised = [
        words
        for folder in ("orchestrator", "workers", "db")
        for file in (root / folder).rglob("*.py")
        for words in _advice(file)
    ]
    assert len(advised) > 20
    for words in advised:
        name = max((name for name in known if f"{words} ".startswith(f"{name} ")), key=len, default=None)
        assert name is not None, words
        assert set(re.findall(r"--[a-z-]+", words)) <= known[name], words


def _advice(file: Path) -> list[str]:
    """Each `maskfleet COMMAND ...` in the file's strings, which may be written in pieces."""
    texts = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return [words.strip() for text in texts for words in re.findall(r"`maskfleet ([^`]*)`", text)]
