"""Which chunks go into the queue next, and which are taken back from workers that died.

A message only wakes a worker up. These statements alone decide what is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

LOWEST_PRIORITY, USUAL_PRIORITY, HIGHEST_PRIORITY = 1, 5, 9  # bigger is sooner: each step doubles a job's share
MAX_DEATHS_ALONE = 3  # an asset that kills its process this often while it runs alone fails with crashed_worker


def reap(db: Connection) -> int:
    """Take back the chunks whose lease expired, and judge the assets in flight in them. Returns how many chunks.

    An asset that was in flight with others becomes a suspect and will run alone. When the process dies for the third
    time on an asset that runs alone, that asset fails with crashed_worker. Two reapers may run at once: each chunk is
    locked by one of them.
    """
    expired = db.execute(
        text(
            """SELECT id, in_flight FROM chunk WHERE state = 'running' AND lease_until < now()
               ORDER BY job_id, id FOR UPDATE SKIP LOCKED"""  # a job's counters are locked in the order of jobs
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


def expire_lease(db: Connection, *, chunk_id: int, worker: str, pid: int) -> None:
    """End now the lease of a process that is known to be dead, so that the reaper judges its chunk.

    pid: of that process. Another process of the same worker may hold the chunk already, if its message came twice.
    """
    db.execute(
        text(
            """UPDATE chunk SET lease_until = now() - interval '1 second'
               WHERE id = :id AND worker = :worker AND worker_pid = :pid AND state = 'running'"""
        ),
        {"id": chunk_id, "worker": worker, "pid": pid},
    )


def expire_all_leases(db: Connection) -> None:
    """End every lease now. For the embedded run, which knows that no other worker is alive."""
    db.execute(text("UPDATE chunk SET lease_until = now() - interval '1 second' WHERE state = 'running'"))
    db.execute(text("UPDATE chunk SET state = 'new' WHERE state = 'sent'"))


_STALE = "state = 'sent' AND sent_at < now() - make_interval(secs => :secs)"
# A queue is first in, first out. Chunks that were claimed before (token above 0) have their own queue.
_OVERTAKEN = """EXISTS (SELECT 1 FROM chunk later WHERE later.state = 'running' AND later.sent_at > chunk.sent_at
                         AND (later.token > 1) = (chunk.token > 0))"""


def has_stale_sent(db: Connection, *, resend_seconds: float) -> bool:
    """Whether a chunk was sent longer ago than this and never claimed. Its message waits, or was lost."""
    statement = text(f"SELECT EXISTS (SELECT 1 FROM chunk WHERE {_STALE})")
    return bool(db.execute(statement, {"secs": resend_seconds}).scalar_one())


def resend_stale(db: Connection, *, resend_seconds: float, queue_is_empty: bool) -> int:
    """Let the stale chunks with a lost message be sent again. Returns how many.

    When the queue is empty, no message waits, so these are all stale chunks. Otherwise they are the stale chunks that a
    chunk sent later has overtaken.
    """
    lost = "" if queue_is_empty else f"AND {_OVERTAKEN}"
    statement = text(f"UPDATE chunk SET state = 'new' WHERE {_STALE} {lost}")
    return db.execute(statement, {"secs": resend_seconds}).rowcount


@dataclass(frozen=True, slots=True)
class Window:
    """Chunks that were marked as sent. returned: those that a worker had before; they go first."""

    new: list[int]
    returned: list[int]

    @property
    def all(self) -> list[int]:
        return [*self.returned, *self.new]


_WINDOW_OF_FEW_WORKERS = 8


def window_of(*, workers: int, jobs: int, most: int) -> int:
    """How many chunks the queue should hold: two a worker and one a job, never more than `most`.

    What is in the queue comes before all that is sent later. So a short queue is a short wait for an urgent job. Each
    worker fills it up after each chunk, so none waits for it.
    """
    return min(most, max(2 * workers, _WINDOW_OF_FEW_WORKERS) + jobs)


def longest_wait(*, window: int, jobs: int) -> int:
    """How many chunks of others are handed out, at most, before the next one of a job that has a ready chunk.

    Until there is room for it in the queue each other job may get one place; then the whole queue is before it. Chunks
    that were claimed before come on top: those of workers that died, or of a store that did not answer.
    """
    return window + jobs - 1


def count_active(db: Connection) -> int:
    """The jobs that are at work."""
    return int(db.execute(text("SELECT count(*) FROM job WHERE state IN ('listing', 'running')")).scalar_one())


def set_priority(db: Connection, *, job_id: int, priority: int) -> bool:
    """Change a job's share. What is in the queue already stays there. False when there is no such job."""
    statement = text("UPDATE job SET priority = :priority WHERE id = :job_id AND deleted_at IS NULL")
    return db.execute(statement, {"job_id": job_id, "priority": priority}).rowcount == 1


def take_window(db: Connection, *, window: int) -> Window:
    """Mark new chunks as sent, as many as the queue has room for, and share the queue between the jobs.

    A place goes to the job with the fewest chunks in the queue for its weight, which is 2 to the power of its priority.
    So a job that has none there comes before all that have some. Of several such jobs the one that was served longest
    ago comes first, so none is left out. `longest_wait` is the bound that follows.

    Returned chunks have their own window, so they never wait behind a full queue. Publish only after the commit. After
    a crash in between, `resend_stale` sends the chunks again.
    """
    sent, sent_again = db.execute(
        text(
            """SELECT count(*), count(*) FILTER (WHERE token > 0) FROM chunk JOIN job ON job.id = chunk.job_id
               WHERE chunk.state = 'sent' AND job.state IN ('listing', 'running')"""
        )
    ).one()
    rooms = {"room": max(window - sent, 0), "returned_room": max(window - sent_again, 0), "window": window}
    statement = text(
        """WITH queued AS (
               SELECT job_id, token > 0 AS returned, count(*) AS n FROM chunk WHERE state = 'sent' GROUP BY 1, 2),
           candidate AS (
               SELECT c.id, c.token > 0 AS returned, served.at AS served_at,
                      (coalesce(queued.n, 0) - 1 + row_number() OVER (PARTITION BY j.id, c.token > 0 ORDER BY c.id))
                      / power(2, j.priority) AS share
               FROM job j CROSS JOIN LATERAL (
                   SELECT id, token FROM chunk
                   WHERE job_id = j.id AND state = 'new' AND (ready_at IS NULL OR ready_at < now())
                   ORDER BY id LIMIT :window) c
               CROSS JOIN LATERAL (
                   SELECT max(sent_at) AS at FROM chunk WHERE job_id = j.id AND state IN ('running', 'done')) served
               LEFT JOIN queued ON queued.job_id = j.id AND queued.returned = (c.token > 0)
               WHERE j.state IN ('listing', 'running') AND (j.asked->>'prompts' IS NULL OR j.matched IS NOT NULL)),
           wanted AS (
               (SELECT id FROM candidate WHERE returned
                ORDER BY share, served_at NULLS FIRST, id LIMIT :returned_room) UNION ALL
               (SELECT id FROM candidate WHERE NOT returned
                ORDER BY share, served_at NULLS FIRST, id LIMIT :room)),
           taken AS (SELECT id FROM chunk WHERE id IN (SELECT id FROM wanted) AND state = 'new' FOR UPDATE SKIP LOCKED)
           UPDATE chunk SET state = 'sent', sent_at = now() FROM taken WHERE chunk.id = taken.id
           RETURNING chunk.id, chunk.token > 0 AS returned"""
    )
    rows = sorted(db.execute(statement, rooms).all())
    return Window(new=[row.id for row in rows if not row.returned], returned=[row.id for row in rows if row.returned])


def unsend(db: Connection, *, chunk_ids: Sequence[int]) -> None:
    """Take back chunks when their messages could not be published."""
    db.execute(text("UPDATE chunk SET state = 'new' WHERE id = ANY(:ids) AND state = 'sent'"), {"ids": list(chunk_ids)})


def unsend_job(db: Connection, *, job_id: int) -> None:
    """Let a job's sent chunks be sent again. Their messages may be used up while the job does not run.

    The caller has locked the job. A retry locks chunks before their job, so two that wait could wait for each other:
    a chunk that another one holds is left to it, which claims it or makes it new.
    """
    statement = text(
        """UPDATE chunk SET state = 'new' WHERE id IN (
               SELECT id FROM chunk WHERE job_id = :job_id AND state = 'sent' FOR UPDATE SKIP LOCKED)"""
    )
    db.execute(statement, {"job_id": job_id})
