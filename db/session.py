"""Connections to Postgres.

Code outside db imports SQLAlchemy's connections and errors only from this module.
"""

from __future__ import annotations

from pathlib import Path

import orjson
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError

__all__ = [
    "Connection",
    "DBAPIError",
    "DatabaseNotReady",
    "Engine",
    "OperationalError",
    "check_migrated",
    "is_about_values",
    "is_passing",
    "migration_of",
    "newest_migration",
    "open_engine",
    "psycopg2_url",
    "require_session",
]

_MIGRATIONS = Path(__file__).parent / "migrations" / "versions"


class DatabaseNotReady(RuntimeError):
    """The database cannot be used: its tables are not those of this version, or its address is not valid."""


# SQLSTATE classes of temporary errors: connection, transaction state (read-only, ended while idle), resources,
# operator.
_PASSING_CLASSES = ("08", "25", "53", "57")
_SCHEMES = ("postgres", "postgresql", "postgresql+psycopg2")


def is_passing(error: DBAPIError) -> bool:
    """Whether the error is temporary: Postgres is away, restarts, is read-only, or has no free resources."""
    code = getattr(error.orig, "pgcode", None) or ""
    return isinstance(error, OperationalError) or error.connection_invalidated or code[:2] in _PASSING_CLASSES


def is_about_values(error: DBAPIError) -> bool:
    """Whether Postgres refuses what was to be stored: a key twice, or a value that it cannot hold."""
    return isinstance(error, IntegrityError | DataError)


def open_engine(
    url: str, *, pool_size: int = 4, statement_timeout_seconds: float = 60, read_only: bool = False
) -> Engine:
    """An engine. Its connections are checked before use, give up on a hung server, and never idle in a transaction.

    statement_timeout_seconds: 0 means no limit, for long work such as migrations and exports. read_only: Postgres
    refuses every write.
    """
    milliseconds = int(statement_timeout_seconds * 1000)
    options = f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={milliseconds} -c jit=off"
    options += " -c default_transaction_read_only=on" if read_only else ""
    return create_engine(
        psycopg2_url(url),
        pool_pre_ping=True,
        json_deserializer=orjson.loads,  # a tenth of json's time, which is a fifth of an export
        pool_size=pool_size,
        connect_args={"connect_timeout": 10, "options": options, "application_name": "maskfleet"},
    )


def psycopg2_url(url: str) -> URL:
    """The same address with the driver that we use. postgres:// and postgresql:// are both accepted.

    Raises DatabaseNotReady when it is not such an address. The message does not repeat it: it may hold a password.
    """
    scheme = url.partition("://")[0]
    if scheme not in _SCHEMES:
        raise DatabaseNotReady(
            f"the database's address begins with {scheme[:20]!r}, expected postgresql://user@host/name"
        )
    try:
        return make_url(url.replace("postgres://", "postgresql://", 1)).set(drivername="postgresql+psycopg2")
    except (ArgumentError, ValueError) as error:
        raise DatabaseNotReady(
            "the database's address cannot be read, expected postgresql://user@host:5432/name"
        ) from error


def require_session(db: Connection) -> None:
    """For what holds a lock for longer than a transaction. Raises DatabaseNotReady behind a pooler of transactions.

    There each transaction may be on another connection of the server, so that two could hold the lock at once. Such a
    pooler also drops the options that `open_engine` asks for, and that shows.
    """
    if db.execute(text("SELECT current_setting('jit')")).scalar_one() == "on":
        raise DatabaseNotReady(
            "the database is reached through a pooler that gives each transaction another connection, so a lock would "
            "hold nothing: let this command's MASKFLEET_DATABASE_URL name PostgreSQL itself"
        )


def migration_of(engine: Engine) -> str | None:
    """The newest migration of the tables, None for an empty database."""
    # Not by Alembic: importing it takes longer than most commands, and this is asked by each of them.
    with engine.connect() as connection:
        if connection.execute(text("SELECT to_regclass('alembic_version')")).scalar_one() is None:
            return None
        found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    return found


def newest_migration() -> str:
    """The newest migration of this version: their files begin with their number."""
    return max(path.name.partition("_")[0] for path in _MIGRATIONS.glob("[0-9]*.py"))


def check_not_newer(engine: Engine) -> str | None:
    """The newest migration of the tables. Raises DatabaseNotReady when a newer version of maskfleet made them."""
    found, newest = migration_of(engine), newest_migration()
    if found is not None and found > newest:
        raise DatabaseNotReady(
            f"database {engine.url.render_as_string()} is at migration {found}, and this version knows only {newest}: "
            "start the newer version of maskfleet again, or put back the dump from before the upgrade"
        )
    return found


def check_migrated(engine: Engine) -> str:
    """The newest migration. Raises DatabaseNotReady unless the tables are those of this version."""
    found, newest = check_not_newer(engine), newest_migration()
    if found != newest:
        raise DatabaseNotReady(
            f"database {engine.url.render_as_string()} is at migration {found}, expected {newest}: "
            "run `maskfleet migrate`"
        )
    return newest
