"""The README and the pages of docs/ are held to the code: commands, options, settings, error kinds, models."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer

from db.settings import Settings
from infra.write_reference import commands, pages
from orchestrator.cli.root import COMMANDS
from workers.errors import ErrorKind
from workers.models.registry import MODELS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
KNOWN = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands()}


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_has_a_sentence_and_an_example(name: str, command: typer.core.TyperCommand) -> None:
    assert command.help
    assert f"maskfleet {name}" in (command.epilog or "")


@pytest.mark.parametrize(("name", "text"), pages().items())
def test_the_reference_pages_are_those_of_the_code(name: str, text: str) -> None:
    assert (DOCS / name).read_text() == text, "commands or settings have changed: run `make reference`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_option_and_setting_that_a_page_names_exists(page: Path) -> None:
    """A command stands behind a prompt, or between backticks."""
    text = page.read_text()
    for words in re.findall(r"(?:^\$ |`)(?:[^\s`]+/)?maskfleet ([a-z][^`\n]*)", text, re.MULTILINE):
        _require_command(words.split(" #")[0])
    named = set(re.findall(r"\bMASKFLEET_(?!TEST_)([A-Z][A-Z_0-9]*[A-Z0-9])", text))
    assert {name.removesuffix("_FILE").lower() for name in named} <= set(Settings.model_fields)


def test_every_error_kind_and_model_is_on_its_page() -> None:
    failures, models = (DOCS / "failures.md").read_text(), (DOCS / "models.md").read_text()
    assert [kind for kind in ErrorKind if f"| `{kind}` |" not in failures] == []
    assert [name for name in MODELS if f"`{name}`" not in models] == []


def test_commands_that_messages_advise_exist_with_their_options() -> None:
    """What stands between backticks in our own strings, from `maskfleet` on."""
    files = [file for folder in ("orchestrator", "workers", "db") for file in (ROOT / folder).rglob("*.py")]
    advised = [words for file in files for words in _advice(file)]
    assert len(advised) > 20
    for words in advised:
        _require_command(words)


def _require_command(words: str) -> None:
    name = max((name for name in KNOWN if f"{words} ".startswith(f"{name} ")), key=len, default=None)
    if name is None:
        assert words.split()[0] in COMMANDS, words
    else:
        assert set(re.findall(r"(?<!\S)--[a-z-]+", words)) <= KNOWN[name] | {"--help"}, words


def _advice(file: Path) -> list[str]:
    """Each `maskfleet COMMAND ...` in the file's strings, which may be written in pieces."""
    texts = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return [words.strip() for text in texts for words in re.findall(r"`maskfleet ([^`]*)`", text)]
