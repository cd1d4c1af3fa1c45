"""The command line.

Results go to stdout, progress and logs to stderr. Exit 0: done. 1: some assets failed. 2: usage or environment.
130: interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from db.texts import is_storable
from orchestrator.cli.root import app, opened
from orchestrator.local.interrupts import INTERRUPTED, heard_interrupts
from workers.errors import printable

__all__ = ["app", "main"]


def main() -> None:
    # pydantic would read the entry points of every installed package at its first model, for plugins. We have none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # A key may have any letter. Where the terminal's encoding has none for it, an escape is better than a traceback.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for word in sys.argv:
        if not is_storable(word):
            _leave(f"{printable(word)}: expected UTF-8; rename it")
    try:
        with heard_interrupts(), opened:
            app()
    except BrokenPipeError:
        os._exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Imported only here: the errors of all parts stand in as many files.
        from orchestrator.cli.errors import as_message

        message = as_message(error)
        if message is None:
            raise
        _leave(message)


def _leave(message: str) -> NoReturn:
    from orchestrator.cli.app import USAGE, err  # here, because it loads SQLAlchemy

    err.print(f"maskfleet: {message}", style="red", markup=False)
    sys.exit(USAGE)
