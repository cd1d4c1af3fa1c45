"""The health check of our containers. `healthcheck.py ARGUMENT` exits 0 when a process with that argument runs, and
Postgres and Redis accept connections from this container.

It uses only the standard library, not Celery: an `inspect ping` every half minute would cost an idle worker more time
than its waiting. It does not detect a worker that hangs; for that there is the lease, which expires.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

ADDRESSES = {"MASKFLEET_DATABASE_URL": 5432, "MASKFLEET_BROKER_URL": 6379}


def runs(argument: str) -> bool:
    """Whether another process in this container was started with the argument."""
    wanted = argument.encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if wanted in arguments and process.name != str(os.getpid()):
            return True
    return False


def unreachable() -> list[str]:
    """The variables of the servers that accept no connection, with the reason."""
    found = []
    for variable, port in ADDRESSES.items():
        url = urlsplit(os.environ.get(variable, ""))
        try:
            socket.create_connection((url.hostname or "localhost", url.port or port), timeout=3).close()
        except OSError as error:
            found.append(f"{variable}: {url.hostname}: {error}")
    return found


if __name__ == "__main__":
    faults = unreachable() + ([] if runs(sys.argv[1]) else [f"no process with the argument {sys.argv[1]!r}"])
    sys.exit("\n".join(faults) or 0)
