"""One pass of `publish`: the job, the project it goes into, and what the parts of the pass share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from db.jobs import Job
from db.publishing import LsProject
from db.session import Connection
from orchestrator.label_studio.answers import Project
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.names import RegionKind
from orchestrator.label_studio.report import Report

# A request that nobody waits for may still be at work in the server for so long. An import of 8 MB took 20 s.
SETTLE_SECONDS = 30.0
# A gateway may hand such a request on even later. So after its entries were sent again, the project is watched for so
# long. Together it is longer than the time-outs of common gateways (nginx and AWS: 60 s).
LATE_SECONDS = 60.0
POLL_SECONDS = 1.0


ReviewOrder = Literal["listing", "score", "disagreement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How regions look and where the images are.

    max_masks: at most so many are shown on a task, the best first. local_files: for jobs over a folder, Label Studio's
    LOCAL_FILES_DOCUMENT_ROOT as this machine names it. settle_seconds, late_seconds: see SETTLE_SECONDS and
    LATE_SECONDS. order: in which assets become tasks, see `review_order`.
    """

    as_: RegionKind = "auto"
    max_masks: int = 150
    local_files: str | None = None
    settle_seconds: float = SETTLE_SECONDS
    late_seconds: float = LATE_SECONDS
    order: ReviewOrder = "listing"


@dataclass(slots=True)
class LateRequests:
    """When entries were last sent again, in monotonic seconds, though their first request may still arrive."""

    sent_again_at: float | None = None

    def note(self) -> None:
        self.sent_again_at = time.monotonic()

    def left(self, late_seconds: float) -> float:
        """For how many seconds more the first request may arrive."""
        return 0.0 if self.sent_again_at is None else self.sent_again_at + late_seconds - time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One pass over one job and one project, under the project's lock.

    db: the connection that holds the lock. Only the main thread uses it. progress: called with the number of assets
    newly in the project. report: counts what the pass did. late: also what earlier passes of this process sent again.
    after_asset_id: an earlier pass has dealt with the assets up to this one, and this pass leaves them alone. 0: none.
    """

    db: Connection
    client: LabelStudio
    job: Job
    project: Project
    options: Options
    progress: Callable[[int], None]
    report: Report = field(default_factory=Report)
    late: LateRequests = field(default_factory=LateRequests)
    after_asset_id: int = 0

    @property
    def ls_project(self) -> LsProject:
        return LsProject(self.client.url, self.project.id)
