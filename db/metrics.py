"""SQL of what operators measure: each function gives samples of one metric, (values of its labels, number).

Jobs that are over for an hour are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, text

from db import jobs, processes, progress
from db.states import ProcessKind

Sample = tuple[tuple[str, ...], float]

_WATCHED = """SELECT id FROM job WHERE deleted_at IS NULL
              AND (state NOT IN ('done', 'cancelled', 'failed') OR finished_at > now() - interval '1 hour')"""


def jobs_by_state(db: Connection) -> Iterator[Sample]:
    return _samples(db, "SELECT state, count(*) FROM job WHERE deleted_at IS NULL GROUP BY state")


def assets_by_state(db: Connection) -> Iterator[Sample]:
    """labeled, failed, running (in flight) and pending (the rest); together they are what is listed."""
    for job_id, found in sorted(jobs.count_jobs(db, job_ids=_watched(db)).items()):
        running = min(found.running, found.pending)
        yield (str(job_id), "labeled"), found.labeled
        yield (str(job_id), "failed"), found.failed
        yield (str(job_id), "running"), running
        yield (str(job_id), "pending"), found.pending - running


def masks(db: Connection) -> Iterator[Sample]:
    for job_id, found in progress.totals(db, job_ids=_watched(db)).items():
        yield (str(job_id),), found.masks


def failed_by_kind(db: Connection) -> Iterator[Sample]:
    return _samples(
        db,
        f"""SELECT job_id, error_kind, sum(assets) FROM outcome_counter
            WHERE job_id IN ({_WATCHED}) AND error_kind <> '' GROUP BY job_id, error_kind HAVING sum(assets) > 0""",
    )


def chunks_by_state(db: Connection) -> Iterator[Sample]:
    """Of jobs that run. `new` waits for room in the queue."""
    return _samples(
        db,
        """SELECT s.state, count(c.id) FROM (VALUES ('new'), ('sent'), ('running')) AS s (state)
           LEFT JOIN (SELECT c.id, c.state FROM chunk c JOIN job j ON j.id = c.job_id
                      WHERE c.state <> 'done' AND j.state IN ('listing', 'running')) c USING (state)
           GROUP BY s.state""",
    )


def oldest_chunks(db: Connection) -> Iterator[Sample]:
    """Of jobs that run."""
    return _samples(
        db,
        """SELECT 'sent', coalesce(extract(epoch FROM now() - min(c.sent_at)), 0)
           FROM chunk c JOIN job j ON j.id = c.job_id
           WHERE c.state = 'sent' AND j.state IN ('listing', 'running')
           UNION ALL
           SELECT 'running', coalesce(extract(epoch FROM now() - min(c.claimed_at)), 0)
           FROM chunk c JOIN job j ON j.id = c.job_id
           WHERE c.state = 'running' AND j.state IN ('listing', 'running')""",
    )


def lease_overdue(db: Connection) -> Iterator[Sample]:
    """Of jobs that run: without one nobody takes chunks back, and nobody needs them."""
    return _samples(
        db,
        """SELECT extract(epoch FROM now() - min(c.lease_until)) FROM chunk c JOIN job j ON j.id = c.job_id
           WHERE c.state = 'running' AND j.state IN ('listing', 'running') HAVING count(*) > 0""",
    )


def listing_failing(db: Connection) -> Iterator[Sample]:
    return _samples(
        db,
        """SELECT id, extract(epoch FROM now() - list_failing_since) FROM job
           WHERE state = 'listing' AND list_failing_since IS NOT NULL""",
    )


def live_processes(db: Connection) -> Iterator[Sample]:
    """All kinds, so that an alert sees a 0."""
    kinds = [process.kind for process in processes.live(db)]
    for kind in ProcessKind:
        yield (str(kind),), kinds.count(kind)


def failed_starts(db: Connection) -> Iterator[Sample]:
    for process in processes.live(db):
        if process.kind is ProcessKind.WORKER:
            yield (process.name,), process.failed_starts


def unpublished(db: Connection) -> Iterator[Sample]:
    """Of jobs that a project has something of: labeled assets minus the predictions that are not waiting.

    Assets without a prompt are not published, so they do not count.
    """
    sent = list(
        _samples(
            db,
            f"""SELECT job_id, project_id, coalesce(sum(predictions) FILTER (WHERE state <> 'sending'), 0)
                FROM prediction_counter WHERE job_id IN ({_WATCHED})
                GROUP BY job_id, project_id HAVING sum(predictions) > 0""",
        )
    )
    counts = jobs.count_jobs(db, job_ids=sorted({int(labels[0]) for labels, _ in sent})) if sent else {}
    for labels, number in sent:
        found = counts.get(int(labels[0]))
        if found is not None:  # it may be deleted just now
            yield labels, max(found.labeled - found.without_prompts - number, 0)


def predictions(db: Connection) -> Iterator[Sample]:
    return _samples(
        db,
        f"""SELECT job_id, project_id, state, sum(predictions) FROM prediction_counter
            WHERE job_id IN ({_WATCHED}) GROUP BY job_id, project_id, state HAVING sum(predictions) > 0""",
    )


def review_ages(db: Connection) -> Iterator[Sample]:
    return _samples(
        db, "SELECT project_id, extract(epoch FROM now() - max(pulled_at)) FROM ls_pull GROUP BY project_id"
    )


def embeddings(db: Connection) -> Iterator[Sample]:
    return _samples(db, "SELECT state, count(*) FROM embedding GROUP BY state")


def embedding_bytes(db: Connection) -> Iterator[Sample]:
    return _samples(db, "SELECT state, sum(size_bytes) FROM embedding GROUP BY state")


def _watched(db: Connection) -> list[int]:
    return list(db.execute(text(f"{_WATCHED} ORDER BY id")).scalars())


def _samples(db: Connection, statement: str) -> Iterator[Sample]:
    """The rows of a statement: the last column is the number, those before it are the labels."""
    for row in db.execute(text(statement)):
        *labels, number = row
        yield tuple(str(label) for label in labels), float(number)
