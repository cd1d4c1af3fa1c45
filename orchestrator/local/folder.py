"""The database of a folder that `maskfleet run` wrote, for as long as one command or several need it.

Several commands may use it at once: `maskfleet assist OUT` for hours, `maskfleet publish OUT` meanwhile. The first
starts the server, and the last one stops it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from db.session import migration_of, newest_migration, open_engine
from db.settings import settings
from orchestrator.local.postgres import EmbeddedPostgres, remove_sockets
from workers.paths import own_path


class NoFolderError(RuntimeError):
    """The folder was not written by `maskfleet run`, or cannot be used. The message says what to do."""


def state_dir_of(out: Path) -> Path:
    """Where `run` keeps the state of an OUT folder."""
    return own_path(settings().state_dir or out / ".maskfleet")


def is_folder(job: str) -> bool:
    """Whether a JOB argument names a folder and no number."""
    return not job.isdecimal()


@contextmanager
def folder_database(out: Path) -> Iterator[str]:
    """The address of the folder's database, its server started if it does not run.

    Raises NoFolderError for a folder without state, PostgresFailed when the server does not start.
    """
    state_dir = state_dir_of(out)
    if not (state_dir / "lock").exists():
        raise NoFolderError(f"{out}: no folder that `maskfleet run` wrote, and no job's number (`maskfleet jobs`)")
    with served_database(state_dir) as url:
        yield url


@contextmanager
def served_database(state_dir: Path) -> Iterator[str]:
    """The same for a state folder, which must exist. Its tables are brought to this version."""
    with (state_dir / "users").open("a+") as users:
        with _alone(state_dir):
            server = EmbeddedPostgres(state_dir / "postgres")
            if _try_lock(users, fcntl.LOCK_EX):  # nobody uses it: a server that still runs was left behind
                server.__enter__()
                if (state_dir / "address").exists():
                    remove_sockets((state_dir / "address").read_text())
                _write_address(state_dir, server.url)
            url = (state_dir / "address").read_text()
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            _migrate(url)
            yield url
        finally:
            with _alone(state_dir):
                if _try_lock(users, fcntl.LOCK_EX):
                    (state_dir / "address").unlink(missing_ok=True)
                    server.stop(url)


def _migrate(url: str) -> None:
    engine = open_engine(url)
    found = migration_of(engine)
    engine.dispose()
    if found != newest_migration():
        # Imported only now: Alembic takes longer than most commands.
        from db.migrating import migrate

        migrate(url)


@contextmanager
def _alone(state_dir: Path) -> Iterator[None]:
    """One command at a time starts or stops the server."""
    with (state_dir / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_address(state_dir: Path, url: str) -> None:
    written = state_dir / "address.new"
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(url)
    written.replace(state_dir / "address")
