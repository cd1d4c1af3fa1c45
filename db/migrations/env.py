"""Runs the migrations: each in its own transaction, with a limit on waiting for locks, one runner at a time."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text

from db.session import open_engine
from db.tables import Base

_ONE_RUNNER = 0x6D61736B  # "mask": the advisory lock of migrations

engine = open_engine(context.config.attributes["url"], statement_timeout_seconds=0)
with engine.connect() as connection:
    connection.execute(text("SET lock_timeout = '30s'"))
    connection.execute(text(f"SELECT pg_advisory_lock({_ONE_RUNNER})"))
    connection.commit()
    context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.execute(text(f"SELECT pg_advisory_unlock({_ONE_RUNNER})"))
    connection.commit()
engine.dispose()
