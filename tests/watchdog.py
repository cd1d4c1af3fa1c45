"""Ends what a test process or a benchmark leaves running when it is killed: servers, workers, what those started.

A process that gets SIGKILL runs no fixture's end. So each test process (pytest itself, and each of pytest-xdist's
workers) starts a watchdog: a process in a session of its own that reads a pipe. The kernel closes the pipe when the
test process ends, however it ends. The watchdog then ends every process that carries the test process's mark.

The mark is a limit that nothing here uses, the bytes of POSIX message queues, set to a number of this test process's
own. The kernel gives a process's limits to all its descendants. A new session, another user, another parent and a
clean environment, which our PostgreSQL has all together, do not change them.
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
    """From now on, what this process starts ends with it.

    Does nothing where the kernel shows no such limit, which is everywhere but on Linux.
    """
    if not (PROC / "self" / "limits").exists():
        return
    mark = _free_mark()
    _, most = resource.getrlimit(resource.RLIMIT_MSGQUEUE)
    # A worker of pytest-xdist carries the mark of pytest. Its watchdog must not, or pytest's would end it.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (most, most))
    watchdog = subprocess.Popen([sys.executable, __file__, str(mark)], stdin=subprocess.PIPE, start_new_session=True)
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (mark, most))

    @atexit.register
    def end() -> None:
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (most, most))  # this process is to end by itself
        watchdog.communicate()


def watch(mark: int) -> None:
    """Wait for the end of stdin, then end whatever carries the mark."""
    sys.stdin.read()
    # SIGINT first: PostgreSQL, when it stops in order, removes its shared memory.
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
    """The mark of the process of a folder of /proc, if it has one and lives."""
    with suppress(OSError):
        if not (folder / "cmdline").read_bytes():  # it has ended, and its parent has not asked how
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
