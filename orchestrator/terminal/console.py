"""The console for progress and messages, and text made safe to print."""

from __future__ import annotations

import sys

from rich.console import Console

from workers.errors import printable

__all__ = ["Console", "printable", "stderr_console", "stdout_console"]

_PIPE_COLUMNS = 1000  # in a pipe nothing is cut or wrapped


def stderr_console() -> Console:
    """Where progress and logs go: stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def stdout_console() -> Console:
    """Where results go. A table in a pipe has the width that it needs."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
