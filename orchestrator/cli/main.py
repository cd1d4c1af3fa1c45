"""The command line.

Results go to stdout, progress and logs to stderr. Exit 0: done. 1: some assets failed. 2: usage or environment.
130: interrupted.
"""

from __future__ import annotations

import os
import sys

from orchestrator.cli.root import app, opened
from orchestrator.local.interrupts import INTERRUPTED, heard_interrupts

__all__ = ["app", "main"]


def main() -> None:
    # pydantic would read the entry points of every installed package at its first model, for plugins. We have none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        with heard_interrupts(), opened:
            app()
    except BrokenPipeError:
        os._exit(0)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        # Imported only here: the errors of all parts stand in as many files.
        from orchestrator.cli.app import USAGE, err
        from orchestrator.cli.errors import as_message

        message = as_message(error)
        if message is None:
            raise
        err.print(f"maskfleet: {message}", style="red", markup=False)
        sys.exit(USAGE)
