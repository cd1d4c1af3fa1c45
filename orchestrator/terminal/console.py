"""The console for progress and messages, and text made safe to print."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["Console", "printable", "stderr_console"]


def printable(text: str) -> str:
    """A key or message without control sequences that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def stderr_console() -> Console:
    """Where progress and logs go: stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
