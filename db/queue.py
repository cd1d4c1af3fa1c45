"""Which chunks go into the queue next, and which are taken back from workers that died.

A message is a wake-up. These statements alone decide what is to be done.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

MAX_DEATHS_ALONE = 3  # an asset that kills its process this often while alone is failed with crashed_worker


def reap(db: Connection) -> int:
    """Take back the chunks whose lease expired, and judge what was in flight in them. Returns how many chunks.

    An asset that was in flight with others becomes a suspect and will run alone; one that dies alone for the third
    time is failed with crashed_worker. Safe to run twice at once: each chunk is locked by one reaper.
    """
    expired = db.execute(
        text(
            """SELECT id, in_flight FROM chunk WHERE state = 'running' AND lease_until < now()
               ORDER BY id FOR UPDATE SKIP LOCKED"""
        )
    ).all()
    for chunk in expired:
        _count_deaths(db, in_flight=chunk.in_flight)
        db.execute(
            text(
                """UPDATE chunk SET state = 'new', token = token + 1, in_flight = '{}', lease_until = NULL
                   WHERE id = :id"""
            ),
            {"id": chunk.id},
        )
    return len(expired)


def _count_deaths(db: Connection, *, in_flight: Sequence[int]) -> None:
    values = {"ids": list(in_flight), "alone": 1 if len(in_flight) == 1 else 0, "most": MAX_DEATHS_ALONE}
    db.execute(
        text(
            """INSERT INTO suspect (asset_id, deaths_alone)
               SELECT id, :alone FROM unnest(CAST(:ids AS bigint[])) id
               WHERE NOT EXISTS (SELECT 1 FROM outcome WHERE asset_id = id)
               ON CONFLICT (asset_id) DO UPDATE SET deaths_alone = suspect.deaths_alone + :alone"""
        ),
        values,
    )
    db.execute(
        text(
            """INSERT INTO outcome (asset_id, job_id, error_kind, error)
               SELECT s.asset_id, a.job_id, 'crashed_worker',
                      'the worker process died ' || s.deaths_alone || ' times with this asset alone in flight'
               FROM suspect s JOIN asset a ON a.id = s.asset_id
               WHERE s.asset_id = ANY(:ids) AND s.deaths_alone >= :most
               ON CONFLICT (asset_id) DO NOTHING"""
        ),
        values,
    )


def expire_lease(db: Connection, *, chunk_id: int, worker: str) -> None:
    """Let the lease of a worker that is known to be dead end now, for the reaper to judge."""
    db.execute(
        text(
            """UPDATE chunk SET lease_until = now() - interval '1 second'
               WHERE id = :id AND worker = :worker AND state = 'running'"""
        ),
        {"id": chunk_id, "worker": worker},
    )


def expire_all_leases(db: Connection) -> None:
    """Let every lease end now. For the embedded run, which knows that no other worker is alive."""
    db.execute(text("UPDATE chunk SET lease_until = now() - interval '1 second' WHERE state = 'running'"))
    db.execute(text("UPDATE chunk SET state = 'new' WHERE state = 'sent'"))


_STALE = "state = 'sent' AND sent_at < now() - make_interval(secs => :secs)"


def has_stale_sent(db: Connection, *, resend_seconds: float) -> bool:
    """Whether a chunk was sent longer ago than this and never claimed: its message waits, or was lost."""
    statement = text(f"SELECT EXISTS (SELECT 1 FROM chunk WHERE {_STALE})")
    return bool(db.execute(statement, {"secs": resend_seconds}).scalar_one())


def resend_stale(db: Connection, *, resend_seconds: float) -> int:
    """Let the stale chunks be sent again; returns how many."""
    return db.execute(text(f"UPDATE chunk SET state = 'new' WHERE {_STALE}"), {"secs": resend_seconds}).rowcount


def take_window(db: Connection, *, window: int) -> list[int]:
    """Mark as sent as many new chunks as the queue has room for, in turn over the jobs; returns their ids.

    Publish them only after the commit: a crash in between is healed by `resend_stale`.
    """
    room = window - int(db.execute(text("SELECT count(*) FROM chunk WHERE state = 'sent'")).scalar_one())
    if room <= 0:
        return []
    statement = text(
        """WITH candidate AS (
               SELECT c.id, row_number() OVER (PARTITION BY j.id ORDER BY c.id) AS turn
               FROM job j CROSS JOIN LATERAL (
                   SELECT id FROM chunk WHERE job_id = j.id AND state = 'new' AND (ready_at IS NULL OR ready_at < now())
                   ORDER BY id LIMIT :room) c
               WHERE j.state IN ('listing', 'running') AND (j.asked->>'prompts' IS NULL OR j.matched IS NOT NULL)),
           taken AS (
               SELECT id FROM chunk WHERE id IN (SELECT id FROM candidate ORDER BY turn, id LIMIT :room)
               AND state = 'new' FOR UPDATE SKIP LOCKED)
           UPDATE chunk SET state = 'sent', sent_at = now() FROM taken WHERE chunk.id = taken.id RETURNING chunk.id"""
    )
    return sorted(db.execute(statement, {"room": room}).scalars())


def unsend(db: Connection, *, chunk_ids: Sequence[int]) -> None:
    """Take chunks back whose messages could not be published."""
    db.execute(text("UPDATE chunk SET state = 'new' WHERE id = ANY(:ids) AND state = 'sent'"), {"ids": list(chunk_ids)})
