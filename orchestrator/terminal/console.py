"""The console for progress and messages, and text made safe to print."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console

from workers.errors import printable

__all__ = ["Console", "is_terminal", "printable", "stderr_console", "stdout_console"]

_PIPE_COLUMNS = 1000  # in a pipe nothing is cut or wrapped


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits there. Python has no stream at all where the shell has closed it (`2>&-`)."""
    return stream is not None and stream.isatty()


def stderr_console() -> Console:
    """Where progress and logs go: stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not is_terminal(sys.stderr))


def stdout_console() -> Console:
    """Where results go. A table in a pipe has the width that it needs."""
    return Console(width=None if is_terminal(sys.stdout) else _PIPE_COLUMNS)
