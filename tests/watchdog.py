"""Ends the processes that a killed test process or benchmark leaves running: servers, workers and their children.

After SIGKILL no fixture can clean up. So each test process (pytest itself, and each of pytest-xdist's workers) starts a
watchdog: a process in its own session that reads a pipe. The kernel closes the pipe when the test process ends, in any
way. The watchdog then ends every process that has the test process's mark.

The mark is a limit that nothing here uses: the bytes of POSIX message queues. Each test process sets it to its own
number. All descendants of a process inherit its limits. A new session, another user, another parent and a clean
environment do not change them. Our PostgreSQL has all of these.
"""

from __future__ import annotations

import atexit
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_LIMIT = "Max msgqueue size"
_PATIENCE_SECONDS = 3  # after each signal


def guard() -> None:
    """From now on, all processes that this process starts end with it.

    Does nothing where the kernel shows no such limit: only Linux does.
    """
    if not (PROC / "self" / "limits").exists():
        return
    mark = _free_mark()
    _, most = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    # A worker of pytest-xdist has pytest's mark. Its watchdog must not have it, or pytest's watchdog would end it.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (most, most))
    watchdog = subprocess.Popen([sys.executable, __file__, str(mark)], stdin=subprocess.PIPE, start_new_session=True)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (mark, most))

    @atexit.register
    def end() -> None:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (most, most))  # this process must end by itself
        watchdog.communicate()


def watch(mark: int) -> None:
    """Wait for the end of stdin, then end all processes with the mark."""
    sys.stdin.read()
    # SIGINT first: PostgreSQL then stops normally and removes its shared memory.
    for number in (signal.SIGINT, signal.SIGKILL):
        for pid in carriers(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        while carriers(mark) and time.monotonic() < give_up_at:
            time.sleep(0.1)


def carriers(mark: int) -> list[int]:
    """The ids of the living processes with this mark."""
    return [int(folder.name) for folder in PROC.iterdir() if folder.name.isdecimal() and _mark_of(folder) == mark]


def _mark_of(folder: Path) -> int | None:
    """The mark of the process of a folder in /proc. None if it has no mark or has ended."""
    with suppress(OSError):
        if not (folder / "cmdline").read_bytes():  # it has ended, but its parent has not read its exit status
            return None
        for line in (folder / "limits").read_text().splitlines():
            if line.startswith(_LIMIT):
                soft = line.removeprefix(_LIMIT).split()[0]
                return int(soft) if soft.isdecimal() else None
    return None


def _free_mark() -> int:
    """A number below the limit's usual 819,200 that no process has."""
    while carriers(mark := 1 + secrets.randbelow(500_000)):
        pass
    return mark


if __name__ == "__main__":
    watch(int(sys.argv[1]))
