"""Outages of a database that a test can bring about and take back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, make_url, text


@contextmanager
def postgres_refuses_everybody(database_url: str) -> Iterator[None]:
    """Let nobody into the database, and end all connections to it."""
    alter(database_url, "WITH ALLOW_CONNECTIONS false")
    try:
        yield
    finally:
        alter(database_url, "WITH ALLOW_CONNECTIONS true")


def alter(database_url: str, change: str) -> None:
    """Change the database, and end all connections to it, so that the next ones meet the change."""
    _as_admin(database_url, f'ALTER DATABASE "{make_url(database_url).database}" {change}')
    end_connections(database_url)


def end_connections(database_url: str) -> None:
    name = make_url(database_url).database
    _as_admin(database_url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


def _as_admin(database_url: str, statement: str) -> None:
    url = make_url(database_url).set(drivername="postgresql+psycopg2", database="template1")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as db:
        db.execute(text(statement))
    admin.dispose()
