"""A command as a person sees it in a narrow terminal: a pipe would not show what is cut there."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

_COLUMNS = "80"


def shown_in_a_terminal(*words: str | Path, environment: dict[str, str]) -> str:
    """What a command prints in a terminal of 80 columns, without colours and without the breaks and spaces in it."""
    ours, its = pty.openpty()
    command = [sys.executable, "-P", "-m", "orchestrator.cli", *map(str, words)]
    with subprocess.Popen(
        command,
        env={**environment, "TERM": "xterm", "COLUMNS": _COLUMNS},
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=subprocess.DEVNULL,
    ):
        os.close(its)
        printed = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m|\s", "", printed.decode())


def _read(terminal: int) -> bytes:
    """Some bytes. None at the end, which a terminal of Linux tells by an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""
