"""SQL of the sweep: which kept embeddings are deleted, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Engine, text

from db.session import require_session

_LOCK = 7_271_902_311  # of pg_try_advisory_lock: any number that nothing else uses
_UNUSED_MINUTES = 10  # an annotated task may be open again: what is in use is not deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEmbedding:
    """A stored row, with the time at which its bytes were written."""

    id: int
    address: str
    stored_at: datetime


@contextmanager
def sweep_lock(engine: Engine) -> Iterator[Connection | None]:
    """Be the one sweeper. Yields a connection that holds the lock, outside a transaction. None when another holds it.

    Do all writes on this connection. When it breaks, the lock is lost and the write fails too.
    """
    with engine.connect() as db:
        with db.begin():
            require_session(db)
            held = db.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": _LOCK}).scalar_one()
        try:
            yield db if held else None
        finally:
            db.invalidate()  # the pool would keep the connection, and so the lock


def drop_expired(db: Connection, *, days: float) -> list[str]:
    """Delete the rows not used for so long, and failed ones after an hour. Returns the addresses of the stored ones."""
    db.execute(text("DELETE FROM embedding WHERE state = 'failed' AND wanted_at < now() - interval '1 hour'"))
    statement = text(
        "DELETE FROM embedding WHERE used_at < now() - make_interval(secs => :seconds) RETURNING address, state"
    )
    rows = db.execute(statement, {"seconds": days * 86_400}).all()
    return [row.address for row in rows if row.state == "stored"]


def drop_annotated(db: Connection) -> list[str]:
    """Delete the stored rows whose every task is annotated, when nobody used them for ten minutes.

    An asset without a task waits for its publication. Wanted rows of such tasks are deleted too.
    """
    statement = text(
        f"""DELETE FROM embedding e USING (
                SELECT p.asset_id FROM ls_prediction p GROUP BY p.asset_id
                HAVING bool_and(EXISTS (SELECT 1 FROM ls_annotation n WHERE n.ls_task_id = p.ls_task_id))) done
            WHERE (done.asset_id = e.asset_id
                   OR done.asset_id = (SELECT o.answered_by FROM outcome o WHERE o.asset_id = e.asset_id))
              AND e.used_at < now() - interval '{_UNUSED_MINUTES} minutes'
            RETURNING e.address, e.state"""
    )
    return [row.address for row in db.execute(statement) if row.state == "stored"]


def drop_over_budget(db: Connection, *, budget_bytes: int) -> list[str]:
    """Delete the stored rows that were not used for the longest time, until the rest fits. Returns their addresses."""
    statement = text(
        """DELETE FROM embedding USING (
               SELECT id, sum(size_bytes) OVER (ORDER BY used_at DESC, id DESC) AS up_to
               FROM embedding WHERE state = 'stored') newest
           WHERE embedding.id = newest.id AND newest.up_to > :budget RETURNING address"""
    )
    return list(db.execute(statement, {"budget": budget_bytes}).scalars())


def stored_embeddings(db: Connection) -> list[StoredEmbedding]:
    rows = db.execute(text("SELECT id, address, stored_at FROM embedding WHERE state = 'stored'")).mappings()
    return [StoredEmbedding(**row) for row in rows]


def drop_without_file(db: Connection, *, rows: Sequence[StoredEmbedding]) -> int:
    """Delete these rows, except those that were stored again in the meantime. Returns how many."""
    statement = text(
        """DELETE FROM embedding USING unnest(CAST(:ids AS bigint[]), CAST(:times AS timestamptz[])) AS gone (id, at)
           WHERE embedding.id = gone.id AND state = 'stored' AND stored_at = gone.at"""
    )
    return db.execute(statement, {"ids": [row.id for row in rows], "times": [row.stored_at for row in rows]}).rowcount


def known_addresses(db: Connection, *, addresses: Sequence[str]) -> set[str]:
    """Those of these addresses that have a row, in any state."""
    statement = text("SELECT address FROM embedding WHERE address = ANY(:addresses)")
    return set(db.execute(statement, {"addresses": list(addresses)}).scalars())
