"""Whether a worker's Celery main process still turns its event loop, seen from its supervisor.

The main process touches a file from its event loop. One that is frozen, or whose loop is stuck, touches none. Neither
does one that waits for a broker that is away, but that one is well: so the broker is asked before the process counts
as stuck.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import bootsteps

from workers.running.app import BrokerAway, check_broker
from workers.running.run_dir import pulse_file, run_dir

STUCK_SECONDS = 180.0
_BEAT_SECONDS = 1.0
_ASK_SECONDS = 10.0


class PulseStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery's classes carry no types
    """In Celery's main process: touch the file as long as the event loop turns."""

    requires = ("celery.worker.components:Timer",)

    def start(self, worker: Any) -> None:
        worker.timer.call_repeatedly(_BEAT_SECONDS, _beat)


def _beat() -> None:
    with suppress(OSError):  # the folder's owner may have ended and removed it
        pulse_file(run_dir()).touch()


class Watch:
    """In the supervisor: looks at one worker's file.

    It adds up the time between its own looks instead of reading a clock. So a supervisor that was frozen together with
    its worker (a paused container, a machine that slept) draws no conclusion.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = pulse_file(run_dir)
        self._last: int | None = None
        self._silent_seconds = 0.0
        self._asking: threading.Thread | None = None

    def begin(self) -> None:
        """A process has just been started."""
        self._file.unlink(missing_ok=True)
        self._last, self._silent_seconds = None, 0.0

    def is_stuck(self, seconds: float) -> bool:
        """Whether nothing touched the file for STUCK_SECONDS while the broker answers. seconds: since the last call."""
        beat = self._read()
        if beat != self._last:
            self._last, self._silent_seconds = beat, 0.0
            return False
        asked_before = self._silent_seconds // _ASK_SECONDS
        self._silent_seconds += seconds
        # Asked for a while, because Celery returns half a minute later than the broker.
        if self._silent_seconds > STUCK_SECONDS / 2 and self._silent_seconds // _ASK_SECONDS > asked_before:
            self._ask_broker()
        return self._silent_seconds > STUCK_SECONDS

    def _read(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return None

    def _ask_broker(self) -> None:
        """In a thread, because a frozen broker blocks the call for half a minute."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._excuse_if_away, name="broker", daemon=True)
            self._asking.start()

    def _excuse_if_away(self) -> None:
        try:
            check_broker()
        except BrokerAway:
            self._silent_seconds = 0.0
