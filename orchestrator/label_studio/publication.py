"""One pass of `publish`: the job, the project it goes into, and what the parts of the pass share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from db.jobs import Job
from db.publishing import LsProject
from db.session import Connection
from orchestrator.label_studio.answers import Project
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.names import RegionKind
from orchestrator.label_studio.report import Report

# A request that nobody waits for may still be at work in the server for so long. An import of 8 MB took 20 s.
SETTLE_SECONDS = 30.0
POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How regions look and where the images are.

    max_masks: at most so many are shown on a task, the best first. local_files: for jobs over a folder, Label Studio's
    LOCAL_FILES_DOCUMENT_ROOT as this machine names it. settle_seconds: see SETTLE_SECONDS.
    """

    as_: RegionKind = "auto"
    max_masks: int = 150
    local_files: str | None = None
    settle_seconds: float = SETTLE_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One pass over one job and one project, under the project's lock.

    db: the connection that holds the lock. Only the main thread uses it. progress: called with the number of assets
    newly in the project. report: counts what the pass did.
    """

    db: Connection
    client: LabelStudio
    job: Job
    project: Project
    options: Options
    progress: Callable[[int], None]
    report: Report = field(default_factory=Report)

    @property
    def ls_project(self) -> LsProject:
        return LsProject(self.client.url, self.project.id)
