"""`config`: the settings of this environment."""

from __future__ import annotations

import os

from pydantic import SecretStr
from rich.table import Table

from db.settings import settings
from orchestrator.cli.app import app
from orchestrator.terminal.console import printable, stdout_console
from workers.errors import redact

_HIDDEN = "(hidden)"


@app.command(epilog="Example: `maskfleet config`")
def config() -> None:
    """Show every setting with its value here and where it came from. Secrets are hidden."""
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "value", "from", "meaning"):
        # In a narrow terminal a cell would be cut, and these are copied from here.
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    found = settings()
    for name, field in type(found).model_fields.items():
        variable, value = f"MASKFLEET_{name.upper()}", getattr(found, name)
        shown = _HIDDEN if isinstance(value, SecretStr) else "" if value is None else redact(str(value))
        table.add_row(variable, printable(shown), printable(_source(variable)), field.description or "")
    stdout_console().print(table, markup=False)


def _source(variable: str) -> str:
    if any(value and name.upper() == variable for name, value in os.environ.items()):  # in any case, as pydantic reads
        return "environment"
    return os.environ.get(f"{variable}_FILE") or "default"
