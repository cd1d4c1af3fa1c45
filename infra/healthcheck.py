"""The health check of our containers: `healthcheck.py ARGUMENT [KIND|ADDRESS]`.

Exit 0 when a process with that argument runs, the servers that the container's settings name accept connections, and,
with KIND, the command's heartbeat in Postgres is young: a command that is frozen writes none. With ADDRESS (http://...)
its page must answer.

Docker restarts nothing that is unhealthy. So a command whose heartbeat has stopped for RESTART_SECONDS, though Postgres
answers, is killed here, and its restart policy starts it again. No Celery `inspect ping`: every half minute that would
cost an idle worker more time than its waiting.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

ADDRESSES = {"MASKFLEET_DATABASE_URL": 5432, "MASKFLEET_BROKER_URL": 6379}
INITS = ("docker-init", "tini")  # process 1; its arguments are those of the command that it started
OLD_SECONDS = 60.0  # six beats
RESTART_SECONDS = 180.0
_BEAT = """SELECT pid, extract(epoch FROM now() - seen_at)::float FROM process
           WHERE kind = %s AND host = %s ORDER BY seen_at DESC LIMIT 1"""


def runs(argument: str) -> bool:
    """Whether another process in this container was started with the argument."""
    wanted = argument.encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        is_init = Path(os.fsdecode(arguments[0])).name in INITS
        if wanted in arguments and not is_init and process.name != str(os.getpid()):
            return True
    return False


def address_in(variable: str) -> str | None:
    """The address that the variable holds, or the file that variable_FILE names. None when neither is set."""
    if path := os.environ.get(f"{variable}_FILE"):
        return Path(path).read_text().rstrip("\r\n")
    return os.environ.get(variable)


def unreachable() -> list[str]:
    """The variables of the servers that accept no connection, with the reason."""
    found = []
    for variable, port in ADDRESSES.items():
        address = address_in(variable)
        if address is None:
            continue
        url = urlsplit(address)
        try:
            socket.create_connection((url.hostname or "localhost", url.port or port), timeout=3).close()
        except OSError as error:
            found.append(f"{variable}: {url.hostname}: {error}")
    return found


def stopped(kind: str) -> list[str]:
    """Why this container's command of that kind counts as stopped. It is killed when it has long been."""
    import psycopg2  # the venv's

    url = (address_in("MASKFLEET_DATABASE_URL") or "").replace("postgresql+psycopg2://", "postgresql://", 1)
    try:
        with psycopg2.connect(url, connect_timeout=3) as connection, connection.cursor() as cursor:
            cursor.execute(_BEAT, (kind, socket.gethostname()))
            row = cursor.fetchone()
        connection.close()
    except psycopg2.Error:
        return ["Postgres gives no answer about the heartbeat"]
    if row is None:
        return [f"no heartbeat of a {kind} yet"]
    pid, age_seconds = row
    if age_seconds > RESTART_SECONDS:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"the last heartbeat of the {kind} is {age_seconds:.0f} s old"] if age_seconds > OLD_SECONDS else []


def silent(address: str) -> list[str]:
    try:
        urlopen(address, timeout=5).close()  # noqa: S310  it begins with http:, see below
    except OSError as error:
        return [f"{address}: {error}"]
    return []


def main(argument: str, more: str = "") -> list[str]:
    faults = unreachable() + ([] if runs(argument) else [f"no process with the argument {argument!r}"])
    if faults or not more:
        return faults
    return silent(more) if more.startswith("http:") else stopped(more)


if __name__ == "__main__":
    sys.exit("\n".join(main(*sys.argv[1:])) or 0)
