"""The folder that a worker shares with its supervisor: whether it is to stop, what it loaded, whether it moves, why it
fails.

`maskfleet worker` makes the folder and names it in the environment of the Celery processes that it starts.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from workers.errors import printable, redact
from workers.logs import log_to_stderr

RUN_DIR_VARIABLE = "MASKFLEET_WORKER_RUN_DIR"
_MOST_OF_AN_ERROR = 500

log = logging.getLogger(__name__)


def run_dir() -> Path:
    return Path(os.environ.get(RUN_DIR_VARIABLE, "/nonexistent"))


def stop_file(folder: Path) -> Path:
    """There when the worker is to drain."""
    return folder / "stop"


def faults_file(folder: Path) -> Path:
    """As long as the number of processes that ended unfit, in a row."""
    return folder / "faults"


def model_file(folder: Path) -> Path:
    """The name of the model that was loaded last."""
    return folder / "model"


def error_file(folder: Path) -> Path:
    """The last error, one line."""
    return folder / "error"


def child_file(folder: Path) -> Path:
    """The process id of the pool's child that started last."""
    return folder / "child"


def pulse_file(folder: Path) -> Path:
    """Touched by Celery's main process as long as its event loop turns."""
    return folder / "pulse"


def keep_error(error: object) -> None:
    """Note an error for the supervisor, which tells people why a worker does not come up."""
    with suppress(OSError):  # the folder's owner may have ended and removed it
        error_file(run_dir()).write_text(printable(redact(str(error)))[:_MOST_OF_AN_ERROR], encoding="utf-8")


def log_from_the_start() -> None:
    """In a worker's process: log as the settings say before Celery is up, and note the exception that ends it."""
    if RUN_DIR_VARIABLE in os.environ:
        log_to_stderr()
        sys.excepthook = _note_and_log


def _note_and_log(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    keep_error(f"{kind.__name__}: {error}")
    log.critical("this process ends", exc_info=(kind, error, trace))
