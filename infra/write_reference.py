"""Writes docs/commands.md and docs/settings.md from the code (`make reference`).

A test compares both pages with what this would write, so they are always those of the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from db.settings import Settings
from orchestrator.cli.root import COMMANDS, imported_command

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Made from the code by `make reference`. Change the code. -->"
COMMANDS_HEAD = f"""# Commands
{MADE}

`maskfleet COMMAND --help` says the same. Commands with `--json` print one document on stdout: [its fields](json.md).
JOB is a job's number, or the folder that `maskfleet run` wrote: its database runs as long as the command needs it.

The exit code is 0 when all went well, 1 when some assets failed, when `maskfleet cancel` stopped a `run`, or when there
was nothing to do, 2 for wrong usage or a missing part of the environment, 130 after Ctrl-C.

"""
SETTINGS_HEAD = f"""# Settings
{MADE}

Settings come from the environment. What a job was asked stands on its row instead; the two never mix.
`maskfleet config` prints each with its value and where it came from.

A setting marked "secret" (an address with a password, a token, a password) may stand in a file: the variable with
`_FILE` at its end names it.

| variable | default | meaning |
|---|---|---|
"""


def main() -> None:
    """Write both pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Both pages, by name of the file."""
    return {"commands.md": _commands_page(), "settings.md": _settings_page()}


def commands() -> Iterator[tuple[str, Any]]:
    """Each command that does something, by its full name, in the order of `--help`."""
    for name in COMMANDS:
        command = imported_command(name)
        if hasattr(command, "commands"):
            yield from ((f"{name} {sub}", below) for sub, below in command.commands.items())
        else:
            yield name, command


def _commands_page() -> str:
    found = list(commands())
    overview = [f"| [`maskfleet {name}`](#{_anchor(name)}) | {_sentence(command)} |" for name, command in found]
    head = "\n".join([COMMANDS_HEAD + "| command | what it does |", "|---|---|", *overview, ""])
    return "\n".join([head, *(_section(name, command) for name, command in found)])


def _section(name: str, command: Any) -> str:
    lines = [f"## maskfleet {name}", "", (command.help or "").strip(), ""]
    rows = [_row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    return "\n".join([*lines, command.epilog or "", ""])


def _row(parameter: Any) -> str:
    """A line of the table."""
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        value = "" if getattr(parameter, "is_flag", False) else f" {_metavar(parameter)}"
        name = f"`{' / '.join([*parameter.opts, *parameter.secondary_opts])}{value}`"
    default = "required" if parameter.required else _default(parameter.default)
    return f"| {_cell(name)} | {_cell(default)} | {_cell(parameter.help or '')} |"


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, EnumType):
        return "\\|".join(str(choice.value) for choice in kind)
    return "N" if kind in (int, float) else str(parameter.opts[0].removeprefix("--").upper().replace("-", "_"))


def _default(value: Any) -> str:
    if value is None or value is False or value in ("", (), []) or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def _sentence(command: Any) -> str:
    return _cell((command.help or "").strip().split("\n\n")[0])


def _cell(text: str) -> str:
    """Text on one line, that does not end a cell. `\\|` inside code is what GitHub and MkDocs read as `|`."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _anchor(name: str) -> str:
    return f"maskfleet-{name.replace(' ', '-')}"


def _settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        secret = " (secret)" if SecretStr.__name__ in str(field.annotation) else ""
        rows.append(f"| `MASKFLEET_{name.upper()}` | {default} | {_cell(field.description or '')}{secret} |")
    return SETTINGS_HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
