"""Writes .env beside docker-compose.yml: infra/env.example with a fresh secret for each empty value.

An existing .env is not changed, because the databases' volumes have its passwords. Needs only Python.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent / "env.example"
TARGET = Path(__file__).parent.parent / ".env"


def fill_in(example: str) -> str:
    """The text with 160 random bits, as 40 hexadecimal digits, after each `NAME=` that has no value."""
    return re.sub(r"(?m)^([A-Z][A-Z0-9_]*)=$", lambda line: f"{line[1]}={secrets.token_hex(20)}", example)


def main() -> int:
    """Write the file, readable only by its owner. Returns 2 when it already exists."""
    try:
        file = os.open(TARGET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(f"{TARGET} exists and is not changed: its passwords are in the volumes", file=sys.stderr)  # noqa: T201
        return 2
    with os.fdopen(file, "w") as env:
        env.write(fill_in(EXAMPLE.read_text()))
    print(f"wrote {TARGET}", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
