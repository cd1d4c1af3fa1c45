"""The board's pages, their photos, and the events that keep them up to date."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC
from functools import partial

import orjson
from tornado.iostream import StreamClosedError

from db.jobs import Job
from db.session import DBAPIError
from orchestrator.board.door import Handler
from orchestrator.board.home import job_name
from orchestrator.pages.page import fact

_LOOK_SECONDS = 2.0  # between two looks of one viewer
_PING_SECONDS = 15.0


class Home(Handler):
    async def get(self) -> None:
        regions = await self.read(self.served.board.home)
        self.show("home.html", "Jobs", {name: [html] for name, html in regions.items()}, events="/events")


class _JobHandler(Handler):
    async def find(self, job_id: str) -> Job | None:
        """The job. Without one, the answer is given."""
        try:
            found: Job | None = await self.read(self.served.board.find_job, int(job_id))
        except DBAPIError:
            self.send_error(503)
            return None
        if found is None:
            self.send_error(404)
        return found


class JobPage(_JobHandler):
    async def get(self, job_id: str) -> None:
        job = await self.find(job_id)
        if job is None:
            return
        regions = await self.read(self.served.board.job, job)
        parts: dict[str, Iterable[str]] = {name: [html] for name, html in regions.items()}
        parts |= {"name": [job_name(job)], "facts": _facts(job)}
        self.show("job.html", job_name(job), parts, events=f"/jobs/{job.id}/events")


def _facts(job: Job) -> Iterable[str]:
    facts = {"Job": str(job.id), "Source": job.source, "Model": job.model_version, "Priority": str(job.priority)}
    yield from (fact(name, value) for name, value in facts.items())
    yield f"<div><dt>Submitted</dt><dd>{job.created_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC</dd></div>"


class Photo(Handler):
    def refuse(self) -> None:
        self.send_error(401)

    async def get(self, job_id: str, asset_id: str) -> None:
        loop = asyncio.get_running_loop()
        get = partial(self.served.photos.get, int(job_id), int(asset_id))
        try:
            picture = await loop.run_in_executor(self.served.decoding, get)
        except DBAPIError:
            self.send_error(503)
            return
        if picture is None:
            self.send_error(404)
            return
        self.set_header("Content-Type", picture.content_type)
        self.set_header("Cache-Control", "private, max-age=600")
        self.finish(picture.content)


class Events(_JobHandler):
    """Regions that changed, as server-sent events, until the viewer leaves or the board ends."""

    def refuse(self) -> None:
        self.send_error(401)

    async def get(self, job_id: str | None = None) -> None:
        if job_id is not None and await self.find(job_id) is None:
            return
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("X-Accel-Buffering", "no")  # else some proxies hold events back
        shown: dict[str, str] = {}
        silent = 0.0
        try:
            while not self.served.ending.is_set():
                regions = await self._regions(job_id)
                changed = {name: html for name, html in regions.items() if shown.get(name) != html}
                silent = 0.0 if changed else silent + _LOOK_SECONDS
                if changed:
                    shown |= changed
                    self.write(b"data: " + orjson.dumps(changed) + b"\n\n")
                elif silent >= _PING_SECONDS:
                    silent = 0.0
                    self.write(b": still here\n\n")
                await self.flush()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.served.ending.wait(), _LOOK_SECONDS)
        except StreamClosedError:
            return

    async def _regions(self, job_id: str | None) -> dict[str, str]:
        board = self.served.board
        if job_id is None:
            found: dict[str, str] = await self.read(board.home)
            return found
        try:
            job = await self.read(board.find_job, int(job_id))
            return {} if job is None else await self.read(board.job, job)
        except DBAPIError:
            return {}
