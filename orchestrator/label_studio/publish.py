"""Brings a job's labeled assets into a Label Studio project: one task per asset, one prediction per asset and version.

A reconciler over the outbox of `db.publishing`: it stores what it will send before it sends, and the server's answer
after. Label Studio does not deduplicate and has no unique keys. So anything that may have arrived is looked up by its
data.asset_id before it is sent again. During sending, only the sending thread talks to the server; the next requests
are made meanwhile (`entries`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime

from db import jobs, published, publishing, results
from db import progress as outcomes
from db.jobs import Job
from db.publishing import LsProject
from db.session import DBAPIError, Engine, is_passing
from db.settings import settings
from db.states import JobState
from orchestrator.label_studio.addresses import PublishError, image_address
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import Controls, find_controls, require_controls
from orchestrator.label_studio.doubts import Doubts
from orchestrator.label_studio.errors import LabelStudioError, Unavailable
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.label_studio.outgoing import Outgoing
from orchestrator.label_studio.publication import POLL_SECONDS, LateRequests, Options, Publication
from orchestrator.label_studio.report import Report
from orchestrator.label_studio.sending import Sender
from workers.errors import redact
from workers.storage.asset import Source
from workers.storage.source import open_source

_LOOKED_AT = 10  # images that are tried on the server before files are published
_FOLLOW_SECONDS = 3.0
_OVER = (JobState.DONE, JobState.CANCELLED, JobState.FAILED, JobState.PAUSED)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A look at a job that is followed. up_to: all assets up to this id had an outcome then. is_new: a pass follows."""

    labeled: int
    up_to: int
    is_new: bool


def publish_job(
    engine: Engine,
    client: LabelStudio,
    job: Job,
    project_id: int,
    options: Options,
    *,
    progress: Callable[[int], None] = lambda _: None,
    waiting: Callable[[], None] = lambda: None,
    verify: bool = True,
    late: LateRequests | None = None,
    after_asset_id: int = 0,
) -> Report:
    """Send what the project lacks of the job, and switch the version it shows when the job is over.

    progress: called with the number of assets newly in the project. waiting: called each second while another publisher
    works on the project. verify: compare what we stored with the server, and repair; this also waits for late requests.
    late: what earlier passes know of them. after_asset_id: as in Publication. Raises LabelStudioError. Run it again to
    go on.
    """

    def wait() -> None:
        waiting()
        time.sleep(POLL_SECONDS)

    with publishing.project_lock(engine, ls_project=LsProject(client.url, project_id), wait=wait) as db:
        project = client.get_project(project_id)
        publication = Publication(
            db=db,
            client=client,
            job=job,
            project=project,
            options=options,
            progress=progress,
            late=late or LateRequests(),
            after_asset_id=after_asset_id,
        )
        _reconcile(publication, verify=verify)
        return publication.report


def follow_project(
    engine: Engine,
    client: LabelStudio,
    project_id: int,
    options: Options,
    *,
    job_id: int | None,
    stop: threading.Event,
    published_pass: Callable[[Job, Report], None],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Publish a job until it is over. Without job_id: every job made after the project, without end.

    published_pass: called after each pass that found something to do. Errors of a server or a job are logged and tried
    again; those of one job keep no other from being published. With job_id they are raised, unless the server is only
    away.
    """
    finished: set[tuple[int, datetime | None]] = set()
    seen: dict[int, _Seen] = {}
    troubles: dict[int, str] = {}
    late = LateRequests()
    while not stop.is_set():
        over = False
        try:
            for job in _jobs_to_follow(engine, client, project_id, job_id):
                over, before = job.state in _OVER, seen.get(job.id)
                if (job.id, job.finished_at) in finished:
                    continue
                now = _look(engine, LsProject(client.url, project_id), job, before)
                with _apart(job, troubles) if job_id is None else nullcontext():
                    if over or now.is_new:
                        report = publish_job(
                            engine,
                            client,
                            job,
                            project_id,
                            options,
                            progress=progress,
                            verify=over,
                            late=late,
                            after_asset_id=0 if over or before is None else before.up_to,
                        )
                        published_pass(job, report)
                    seen[job.id] = now
                    if over:
                        finished.add((job.id, job.finished_at))
        except (LabelStudioError, DBAPIError) as error:
            if not _is_tried_again(error, job_id):
                raise
            log.warning("%s; trying again", redact(str(error.orig if isinstance(error, DBAPIError) else error)))
            over = False
        if over and job_id is not None:
            return
        stop.wait(_FOLLOW_SECONDS)


@contextmanager
def _apart(job: Job, troubles: dict[int, str]) -> Iterator[None]:
    """What is wrong with a job is logged, and the jobs after it have their turn. LookupError: it was deleted meanwhile.

    troubles: what was said of each job, so that it is said once.
    """
    try:
        yield
    except (LabelStudioError, LookupError) as error:
        if isinstance(error, Unavailable | KeyError | IndexError):
            raise
        if troubles.get(job.id) != str(error):
            log.warning("job %d: %s; trying again", job.id, redact(str(error)))
        troubles[job.id] = str(error)
    else:
        troubles.pop(job.id, None)


def _is_tried_again(error: LabelStudioError | DBAPIError, job_id: int | None) -> bool:
    """Whether following goes on after this error: if it may pass, or if other jobs can still be published."""
    if isinstance(error, DBAPIError):
        return is_passing(error)
    return job_id is None or isinstance(error, Unavailable)


def _jobs_to_follow(engine: Engine, client: LabelStudio, project_id: int, job_id: int | None) -> list[Job]:
    if job_id is None:
        made_at = datetime.fromisoformat(client.get_project(project_id).created_at)
        with engine.begin() as db:
            return jobs.jobs_since(db, moment=made_at)
    with engine.begin() as db:
        job = jobs.get_job(db, job_id=job_id)
    if job is None:
        raise PublishError(f"there is no job {job_id}: `maskfleet jobs` lists them")
    return [job]


def _look(engine: Engine, ls_project: LsProject, job: Job, before: _Seen | None) -> _Seen:
    """What there is to publish of a job. Only the first look reads outcomes."""
    with engine.begin() as db:
        labeled = outcomes.totals(db, job_ids=[job.id])[job.id].labeled
        if before is not None:
            is_new = labeled != before.labeled
            return _Seen(labeled, outcomes.complete_up_to(db, job_id=job.id) if is_new else before.up_to, is_new)
        up_to = outcomes.complete_up_to(db, job_id=job.id)
        is_new = bool(publishing.unpublished(db, job_id=job.id, ls_project=ls_project, after_asset_id=0, page=1))
        return _Seen(labeled, up_to, is_new)


def _reconcile(publication: Publication, *, verify: bool) -> None:
    """Resolve what is in doubt, send what is missing, compare with the server's count, and repair."""
    db, job, ls_project = publication.db, publication.job, publication.ls_project
    source = open_source(job.source, s3_endpoint=settings().s3_endpoint)
    controls = _check_config(publication)
    sender = Sender(publication, careful=_has_unknown_tasks(publication))
    outgoing, doubts = Outgoing(publication, controls, source, sender), Doubts(publication)
    _check_images(publication, source)
    if not publication.after_asset_id:
        with db.begin():
            publishing.forget_refused(db, job_id=job.id, ls_project=ls_project)
    doubts.resolve_in_doubt(final=False)
    if verify and not doubts.agrees():
        doubts.verify()
    outgoing.send_all()
    if doubts.resolve_in_doubt(final=True):
        outgoing.send_all()
    if verify and not doubts.agrees() and doubts.verify():
        outgoing.send_all()
    if verify and doubts.remove_late():
        outgoing.send_all()
    _show_version(publication)
    with db.begin():
        publication.report.refused = published.refused_of(db, job_id=job.id, ls_project=ls_project)
    if verify:
        _count_what_is_not_shown(publication)


def _check_config(publication: Publication) -> Controls:
    with publication.db.begin():
        labels = results.labels_of(publication.db, job_id=publication.job.id) or [DEFAULT_LABEL]
    controls = find_controls(publication.project.label_config)
    require_controls(controls, as_=publication.options.as_, labels=labels)
    return controls


def _has_unknown_tasks(publication: Publication) -> bool:
    """Whether the project has tasks that we did not store. Then each asset is looked up before it is sent.

    Raises PublishError for a project with tasks of others and none of ours.
    """
    project = publication.project
    with publication.db.begin():
        known = published.count_tasks(publication.db, ls_project=publication.ls_project)
    if known == project.task_count:
        return False
    if known == 0:
        first = next(iter(publication.client.list_tasks(project.id, page_size=1)), None)
        if first is not None and "asset_id" not in first["data"]:
            raise PublishError(
                f"project {project.id}, {project.title!r}, has {project.task_count} tasks that "
                "maskfleet did not make (their data have no asset_id), and is left alone: "
                "`maskfleet label-studio setup` makes a project of its own"
            )
    return True


def _check_images(publication: Publication, source: Source) -> None:
    """Check that the project shows the job's images. A bucket without a storage is noted, a folder is refused."""
    client, job_id, project_id = publication.client, publication.job.id, publication.project.id
    with publication.db.begin():
        some = publishing.unpublished(
            publication.db,
            job_id=job_id,
            after_asset_id=publication.after_asset_id,
            page=_LOOKED_AT,
            ls_project=publication.ls_project,
        )
    addresses = [image_address(source.uri(asset.key), publication.options.local_files) for asset in some]
    if not addresses:
        return
    if addresses[0].startswith("s3://"):
        bucket = addresses[0].split("/")[2]
        if all(storage["bucket"] != bucket for storage in client.list_storages("s3", project_id)):
            publication.report.notes.append(
                f"project {project_id} has no storage of bucket {bucket}, so its images will not show: "
                f"maskfleet label-studio setup --project {project_id} --job {job_id}"
            )
    # Some images may be gone since they were labeled. If none at all is served, the project is the cause.
    elif not any(map(client.serves, addresses)):
        raise PublishError(
            f"Label Studio does not serve {addresses[0]}: maskfleet label-studio setup --project "
            f"{project_id} --job {job_id} --local-files lets it, where --local-files here is its "
            "document root"
        )


def _count_what_is_not_shown(publication: Publication) -> None:
    """Report what the project does not show of the job: masks beyond a task's limit, and assets without a prompt."""
    db, job, report, ls_project = publication.db, publication.job, publication.report, publication.ls_project
    with db.begin():
        there = [
            found
            for found in published.published(db, job_id=job.id)
            if LsProject(found.server, found.project_id) == ls_project
        ]
        report.without_prompts = jobs.count_job(db, job_id=job.id).without_prompts
    report.masks_left_out = sum(found.masks_left_out for found in there)
    if report.masks_left_out:
        total = report.masks_left_out + sum(found.masks_shown for found in there)
        report.notes.append(
            f"{report.masks_left_out:,} of {total:,} masks are not shown: a task gets its "
            f"{publication.options.max_masks} best, of those that --as can draw; for more, publish with --max-masks "
            "into a new project"
        )
    if report.without_prompts:
        report.notes.append(f"{report.without_prompts:,} assets have no prompt: nobody looked at them, left out")


def _show_version(publication: Publication) -> None:
    """Let the project show the job's version when the job is over and complete there, or if it shows no version."""
    client, job, project_id = publication.client, publication.job, publication.project.id
    version, shown = job.model_version, client.get_project(project_id).model_version
    publication.report.shown_version = shown
    if shown == version or not (job.state in _OVER or not shown):
        return
    if version not in client.count_versions(project_id):
        return
    client.show_version(project_id, version)
    publication.report.shown_version = version
