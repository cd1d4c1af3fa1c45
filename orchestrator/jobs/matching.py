"""Matches jobs' prompts with their assets beside the dispatcher's rounds: for ten million this takes minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Self

from db.jobs import Job
from db.session import Engine
from orchestrator.jobs.prepare import match_prompts

_AT_ONCE = 4  # each has its own connection and temporary file
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 640.0
_STOP_SECONDS = 5.0  # each stops between two steps of SQLite


class Matchings:
    """The matchings that run. Other jobs are listed and sent meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stop = threading.Event()
        self._running: dict[int, Future[bool]] = {}
        self._pauses: dict[int, tuple[float, float]] = {}  # of jobs for which the disk was full: until when, how long

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop those that run. The next dispatcher begins them again."""
        self._stop.set()
        wait(self._running.values(), timeout=_STOP_SECONDS)

    def go_on(self, jobs: Sequence[Job], *, seconds: float) -> None:
        """Begin to match these jobs, the smallest first, and wait for those that take no longer than this.

        Raises what ended one of them; it begins again in a later round.
        """
        idle = [job for job in jobs if job.id not in self._running]  # one that ended since they were read is matched
        self._judge()
        free = _AT_ONCE - len(self._running)
        waiting = [job for job in idle if self._may_begin(job.id)]
        begun = sorted(waiting, key=lambda job: (job.asset_count, job.id))[:free]
        for job in begun:
            self._running[job.id] = self._begin(job)
        wait([self._running[job.id] for job in begun], timeout=seconds)
        self._judge()

    def _begin(self, job: Job) -> Future[bool]:
        result: Future[bool] = Future()

        def run() -> None:
            try:
                result.set_result(match_prompts(self._engine, job, stop=self._stop))
            except BaseException as error:  # noqa: BLE001  `_judge` raises it, in the dispatcher's thread
                result.set_exception(error)

        threading.Thread(target=run, name=f"match {job.id}", daemon=True).start()
        return result

    def _may_begin(self, job_id: int) -> bool:
        return time.monotonic() >= self._pauses.get(job_id, (0.0, 0.0))[0]

    def _judge(self) -> None:
        for job_id in [job_id for job_id, result in self._running.items() if result.done()]:
            if self._running.pop(job_id).result():
                self._pauses.pop(job_id, None)
            else:
                pause = min(
                    max(2 * self._pauses.get(job_id, (0.0, 0.0))[1], _FIRST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS
                )
                self._pauses[job_id] = (time.monotonic() + pause, pause)
