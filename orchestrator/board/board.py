"""What the board shows, by page and region. Every region is HTML that was read a moment ago, for all viewers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from db import jobs
from db.jobs import Job
from db.session import Connection, DBAPIError, Engine
from orchestrator.board import home, job
from orchestrator.board.readings import Readings
from workers.errors import redact

_MOST_KEPT = 400

# Each region of a page: for how many seconds it is fresh at least, and what reads it.
_HOME: Mapping[str, tuple[float, Callable[[Connection], str]]] = {
    "summary": (3.0, home.summary),
    "jobs": (2.0, home.jobs_list),
    "fleet": (5.0, home.fleet),
}
_JOB: Mapping[str, tuple[float, Callable[..., str]]] = {
    "standing": (1.5, job.standing),
    "time": (5.0, job.time_chart),
    "workers": (2.0, job.workers),
    "failures": (5.0, job.failures),
    "pictures": (30.0, job.pictures),
    "histograms": (15.0, job.histograms),
    "people": (15.0, job.people),
}

log = logging.getLogger(__name__)


class Board:
    """Reads pages. Its methods may be called from several threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readings = Readings(_MOST_KEPT)

    def home(self) -> dict[str, str]:
        """The regions of the first page, by name."""
        return {name: self._region(("home", name), fresh, read) for name, (fresh, read) in _HOME.items()}

    def find_job(self, job_id: int) -> Job | None:
        with self._engine.begin() as db:
            return jobs.get_job(db, job_id=job_id)

    def job(self, found: Job) -> dict[str, str]:
        """The regions of a job's page, by name."""
        regions: dict[str, str] = {}
        for name, (fresh, read) in _JOB.items():
            regions[name] = self._region((found.id, name), fresh, partial(read, job=found))
        return regions

    def _region(self, key: tuple[int | str, str], fresh_seconds: float, read: Callable[[Connection], str]) -> str:
        try:
            return self._readings.get(key, fresh_seconds, lambda: self._read(read))
        except (DBAPIError, LookupError) as error:
            log.warning("%s is not shown: %s", key, redact(" ".join(str(getattr(error, "orig", error)).split())))
            return '<p class="bad">Postgres did not answer in time. This is tried again.</p>'

    def _read(self, read: Callable[[Connection], str]) -> str:
        with self._engine.begin() as db:
            return read(db)
