"""The console for progress and messages, and text made safe to print."""

from __future__ import annotations

import sys

from rich.console import Console

from workers.logs import printable

__all__ = ["Console", "printable", "stderr_console"]


def stderr_console() -> Console:
    """Where progress and logs go: stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
