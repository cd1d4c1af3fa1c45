"""Runs the migrations: each in its own transaction, with a limit on waiting for locks, one runner at a time."""

from __future__ import annotations

from typing import Any

from alembic import context
from sqlalchemy import text

from db.partitions import is_partition
from db.session import open_engine, require_session

_ONE_RUNNER = 0x6D61736B  # "mask": the advisory lock of migrations


def _is_compared(name: str | None, kind: str, _: Any) -> bool:
    """Whether the models must have it. Partitions are made while jobs are listed."""
    return not (kind == "table" and is_partition(name or ""))


engine = open_engine(context.config.attributes["url"], statement_timeout_seconds=0)
with engine.connect() as connection:
    require_session(connection)
    connection.execute(text(f"SELECT pg_advisory_lock({_ONE_RUNNER})"))  # however long the runner before takes
    wait = context.config.attributes.get("lock_timeout", "30s")
    connection.execute(text("SELECT set_config('lock_timeout', :wait, false)"), {"wait": wait})
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=context.config.attributes.get("models"),  # a test compares them; an upgrade needs none
        transaction_per_migration=True,
        include_name=_is_compared,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.execute(text(f"SELECT pg_advisory_unlock({_ONE_RUNNER})"))
    connection.commit()
engine.dispose()
