"""Connections to Postgres, and the migrations that build its tables.

Code outside db imports SQLAlchemy's connections and errors only from this module.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

__all__ = [
    "Connection",
    "DBAPIError",
    "DatabaseNotReady",
    "Engine",
    "OperationalError",
    "check_migrated",
    "is_passing",
    "migrate",
    "migration_config",
    "open_engine",
    "psycopg2_url",
]

_MIGRATIONS = Path(__file__).parent / "migrations"


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


def open_engine(url: str, *, pool_size: int = 4, statement_timeout_seconds: float = 60) -> Engine:
    """An engine. Its connections are checked before use, give up on a hung server, and never idle in a transaction.

    statement_timeout_seconds: 0 means no limit, for long work such as migrations and exports.
    """
    milliseconds = int(statement_timeout_seconds * 1000)
    options = f"-c statement_timeout={milliseconds} -c idle_in_transaction_session_timeout={milliseconds} -c jit=off"
    return create_engine(
        psycopg2_url(url),
        pool_pre_ping=True,
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


def migrate(url: str) -> tuple[str | None, str]:
    """Bring the tables to this version. Two may run at once: an advisory lock lets one through at a time.

    Returns the migration that was found, None for an empty database, and the one that the tables are at now.
    """
    engine = open_engine(url)
    found = _migration(engine)
    command.upgrade(migration_config(url), "head")
    now = _migration(engine)
    engine.dispose()
    return found, now or ""


def _migration(engine: Engine) -> str | None:
    with engine.connect() as connection:
        found: str | None = MigrationContext.configure(connection).get_current_revision()
    return found


def migration_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["url"] = url
    return config


def check_migrated(engine: Engine) -> str:
    """The newest migration. Raises DatabaseNotReady unless the tables are those of this version."""
    script = ScriptDirectory(str(_MIGRATIONS))
    found = _migration(engine)
    if found != script.get_current_head():
        raise DatabaseNotReady(
            f"database {engine.url.render_as_string()} is at migration {found}, expected "
            f"{script.get_current_head()}: run `maskfleet migrate`"
        )
    return str(found)
