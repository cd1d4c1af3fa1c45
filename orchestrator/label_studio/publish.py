"""Brings a job's labeled assets into a Label Studio project: one task an asset, one prediction an asset and version.

A reconciler over the outbox of `db.publishing`: what it is about to send is written down first, what the server
answers after. Label Studio neither deduplicates nor has keys of its own, so whatever may have arrived is looked up by
its data.asset_id before it is sent again. Only the thread that sends talks to the server, while the next requests are
made (`entries`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

from sqlalchemy import Connection, Engine

from db import jobs as queries
from db import publishing
from db.jobs import Job, StoredMask
from db.publishing import Candidate, Intent, Place
from db.settings import settings
from db.tables import JobState, LsState
from orchestrator.export.coco import mask_of_row
from orchestrator.label_studio.client import (
    FoundTask,
    LabelStudio,
    LabelStudioError,
    Refused,
    TooLarge,
    Unavailable,
    asset_uid,
    pause_seconds,
)
from orchestrator.label_studio.config import Controls, find_controls, require_controls
from orchestrator.label_studio.entries import MAX_BYTES, Entry, Labeled, Plan, entries_of
from orchestrator.label_studio.regions import DEFAULT_LABEL, RegionKind
from workers.storage.source import Source, open_source

# Beyond 50 to 100 tasks a request gains nothing.
MAX_TASKS = 100
FIRST_TASKS = 50  # of the first request, so that the server starts while the next is made
# How long a request that nobody waits for any more may still be at work in the server: an import of 8 MB took 20 s.
SETTLE_SECONDS = 30.0

_ATTEMPTS = 5
_ATTEMPTS_AT_ERROR = 2  # of a request that the server itself answers with 500
_REFUSALS_IN_A_ROW = 3  # by 500: then it is the server's fault, not the assets'
_PAGE = 200
_BUILD_PAGE = 10  # masks of so many assets are read at once: 3,000 on one asset are a few MB
_LOOKED_AT = 10  # images that the server is asked for before files are published
_POLL_SECONDS = 1.0
_FOLLOW_SECONDS = 3.0
_OVER = (JobState.DONE, JobState.CANCELLED, JobState.FAILED)

log = logging.getLogger(__name__)


class PublishError(LabelStudioError):
    """The job cannot be published like this; the message says what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How regions look and where the images are.

    max_regions: shown at most on a task, best first. local_files: for jobs over a folder, Label Studio's
    LOCAL_FILES_DOCUMENT_ROOT as this machine names it. settle_seconds: see SETTLE_SECONDS.
    """

    as_: RegionKind = "auto"
    max_regions: int = 150
    local_files: str | None = None
    settle_seconds: float = SETTLE_SECONDS


@dataclass(slots=True, kw_only=True)
class Report:
    """What one `publish_job` did. refused: (uri, reason) of each asset that the project could not take."""

    created: int = 0
    attached: int = 0  # predictions added to tasks that were there
    adopted: int = 0  # found on the server, though nobody remembered an answer
    already: int = 0  # there before, by this job or by another with the same model_version
    repaired: int = 0  # remembered, and gone from the server: sent again
    duplicates_removed: int = 0
    shown_version: str = ""
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Landed:
    """What became of an entry: its task, or why it was refused."""

    asset_uid: str
    task_id: int | None = None
    error: str | None = None


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
) -> Report:
    """Bring the project to what the job has now, and switch the version it shows when the job is over.

    progress: called with how many more assets are in the project. waiting: called each second while another publisher
    is at work on the project. verify: compare what is remembered with the server, and repair. Raises LabelStudioError;
    running it again goes on.
    """

    def wait() -> None:
        waiting()
        time.sleep(_POLL_SECONDS)

    with publishing.project_lock(engine, place=Place(client.url, project_id), wait=wait) as db:
        publisher = _Publisher(db, client, job, project_id, options, progress)
        publisher.reconcile(verify=verify)
        return publisher.report


def follow(
    engine: Engine,
    client: LabelStudio,
    project_id: int,
    options: Options,
    *,
    job_id: int | None,
    stop: threading.Event,
    landed: Callable[[Job, Report], None],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Keep a project up with a job until that is over; without job_id with every job made since the project, for ever.

    landed: called after each pass that found something to do. A server or a job that cannot be worked with is logged
    and tried again; with job_id it is raised, except for a server that is away.
    """
    finished: set[tuple[int, datetime | None]] = set()
    while not stop.is_set():
        over = False
        try:
            for job in _jobs_to_follow(engine, client, project_id, job_id):
                over = job.state in _OVER
                if (job.id, job.finished_at) in finished or not (over or _has_new(engine, client, project_id, job)):
                    continue
                landed(job, publish_job(engine, client, job, project_id, options, progress=progress, verify=over))
                if over:
                    finished.add((job.id, job.finished_at))
        except Unavailable as error:
            log.warning("%s; trying again", error)
            over = False
        except LabelStudioError as error:
            if job_id is not None:
                raise
            log.warning("%s; trying again", error)
        if over and job_id is not None:
            return
        stop.wait(_FOLLOW_SECONDS)


def _jobs_to_follow(engine: Engine, client: LabelStudio, project_id: int, job_id: int | None) -> list[Job]:
    if job_id is None:
        made_at = datetime.fromisoformat(client.get_project(project_id).created_at)
        with engine.begin() as db:
            return publishing.jobs_since(db, moment=made_at)
    with engine.begin() as db:
        job = queries.get_job(db, job_id=job_id)
    if job is None:
        raise PublishError(f"there is no job {job_id}: `maskfleet jobs` lists them")
    return [job]


def _has_new(engine: Engine, client: LabelStudio, project_id: int, job: Job) -> bool:
    with engine.begin() as db:
        place = Place(client.url, project_id)
        return bool(publishing.unpublished(db, job_id=job.id, place=place, after_asset_id=0, page=1))


def image_address(uri: str, local_files: str | None) -> str:
    """The address under which Label Studio shows an asset: s3:// as it is, a file below its document root by path.

    Raises PublishError for a file that Label Studio has not been told how to see.
    """
    if not uri.startswith("file://"):
        return uri
    if local_files is None:
        raise PublishError(
            "the job's images are files, which Label Studio cannot see by themselves: start it with "
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT set to a folder "
            "above them, then give that folder to `maskfleet label-studio setup --job JOB --local-files FOLDER` and to "
            "`maskfleet publish … --local-files FOLDER`; or put the images into a bucket"
        )
    path, root = PurePosixPath(unquote(uri.removeprefix("file://"))), PurePosixPath(local_files)
    if not path.is_relative_to(root):
        raise PublishError(f"{path} is not below --local-files {root}: name a folder above the job's images")
    return f"/data/local-files/?d={quote(str(path.relative_to(root)))}"


class _Publisher:
    """One pass over one job and one project, under the project's lock."""

    def __init__(
        self,
        db: Connection,
        client: LabelStudio,
        job: Job,
        project_id: int,
        options: Options,
        progress: Callable[[int], None],
    ) -> None:
        self._db = db
        self._client = client
        self._job = job
        self._project = client.get_project(project_id)
        self._options = options
        self._progress = progress
        self._source: Source = open_source(job.source, s3_endpoint=settings().s3_endpoint)
        self._place = Place(client.url, project_id)
        self._controls = self._check_config()
        self._careful = self._check_tasks()
        self._max_bytes = MAX_BYTES
        self._refusals_in_a_row = 0
        self.report = Report()

    # --------------------------------------------------------------------------------------------- the order of things

    def reconcile(self, *, verify: bool) -> None:
        """Find out what is in doubt, send what is missing, compare with the server's count, and repair."""
        self._check_images()
        with self._db.begin():
            publishing.forget_refused(self._db, job_id=self._job.id, place=self._place)
        self._settle(final=False)
        if verify and not self._agrees():
            self._verify()
        self._send_all()
        if self._settle(final=True):
            self._send_all()
        if verify and not self._agrees() and self._verify():
            self._send_all()
        self._show_version()
        with self._db.begin():
            self.report.refused = publishing.refused_of(self._db, job_id=self._job.id, place=self._place)

    def _check_config(self) -> Controls:
        with self._db.begin():
            labels = queries.labels_of(self._db, job_id=self._job.id) or [DEFAULT_LABEL]
        controls = find_controls(self._project.label_config)
        require_controls(controls, as_=self._options.as_, labels=labels)
        return controls

    def _check_tasks(self) -> bool:
        """Whether the project has tasks that we do not remember, so that each asset is looked up before it is sent.

        Raises PublishError for a project that has nothing of ours and tasks of others.
        """
        with self._db.begin():
            known = publishing.count_tasks(self._db, place=self._place)
        if known == self._project.task_count:
            return False
        if known == 0:
            first = next(iter(self._client.list_tasks(self._project.id, page_size=1)), None)
            if first is not None and "asset_id" not in first["data"]:
                raise PublishError(
                    f"project {self._project.id}, {self._project.title!r}, has {self._project.task_count} tasks that "
                    "maskfleet did not make (their data have no asset_id), and is left alone: "
                    "`maskfleet label-studio setup` makes a project of its own"
                )
        return True

    def _check_images(self) -> None:
        """See that the project shows the job's images: a bucket without a storage is noted, a folder is refused."""
        with self._db.begin():
            some = publishing.unpublished(
                self._db, job_id=self._job.id, after_asset_id=0, page=_LOOKED_AT, place=self._place
            )
        addresses = [image_address(self._source.uri(asset.key), self._options.local_files) for asset in some]
        if not addresses:
            return
        if addresses[0].startswith("s3://"):
            bucket = addresses[0].split("/")[2]
            if all(storage["bucket"] != bucket for storage in self._client.list_storages("s3", self._project.id)):
                self.report.notes.append(
                    f"project {self._project.id} has no storage of bucket {bucket}, so its images will not show: "
                    f"maskfleet label-studio setup --project {self._project.id} --job {self._job.id}"
                )
        # Some images may be gone since they were labeled; where none is served it is the project that serves none.
        elif not any(map(self._client.serves, addresses)):
            raise PublishError(
                f"Label Studio does not serve {addresses[0]}: maskfleet label-studio setup --project "
                f"{self._project.id} --job {self._job.id} --local-files lets it, where --local-files here is its "
                "document root"
            )

    # -------------------------------------------------------------------------------------------------------- sending

    def _send_all(self) -> None:
        """Send every labeled asset that the project has not; one request waits, ready, while another is under way."""
        with ThreadPoolExecutor(1, thread_name_prefix="sender") as sender:
            flights: deque[tuple[dict[str, int], Future[list[_Landed]]]] = deque()
            before: Future[list[_Landed]] | None = None
            for batch in self._batches():
                ids = self._write_intents(batch)
                before = sender.submit(self._deliver, batch, before)
                flights.append((ids, before))
                if len(flights) > 1:
                    self._land(*flights.popleft())
            for flight in flights:
                self._land(*flight)

    def _land(self, ls_task_ids: dict[str, int], flight: Future[list[_Landed]]) -> None:
        """Write down what the server answered."""
        landed = flight.result()
        done = {ls_task_ids[one.asset_uid]: one.task_id for one in landed if one.task_id is not None}
        errors = {ls_task_ids[one.asset_uid]: one.error for one in landed if one.error is not None}
        with self._db.begin():
            publishing.mark_done(self._db, model_version=self._job.model_version, task_ids=done, place=self._place)
            publishing.mark_refused(self._db, model_version=self._job.model_version, errors=errors)
        self._progress(len(done))

    def _batches(self) -> Iterator[list[Entry]]:
        """What is to be sent, in requests of at most MAX_TASKS tasks and MAX_BYTES, or one larger task alone."""
        batch: list[Entry] = []
        size_bytes = 0
        most = FIRST_TASKS
        for entry in self._entries():
            if batch and (len(batch) >= most or size_bytes + entry.size_bytes > self._max_bytes):
                yield batch
                batch, size_bytes, most = [], 0, MAX_TASKS
            batch.append(entry)
            size_bytes += entry.size_bytes
        if batch:
            yield batch

    def _entries(self) -> Iterator[Entry]:
        """The labeled assets that the project has not; those that do not fit its config are written down as refused."""
        plan = Plan(
            controls=self._controls,
            as_=self._options.as_,
            max_regions=self._options.max_regions,
            model_version=self._job.model_version,
        )
        for entries in entries_of(plan, self._groups()):
            if refused := [entry for entry in entries if entry.error is not None]:
                self._write_intents(refused)
            yield from (entry for entry in entries if entry.error is None)

    def _write_intents(self, entries: Sequence[Entry]) -> dict[str, int]:
        """Write down what is about to be sent, or refused; gives the ls_task id of each by its asset_uid."""
        with self._db.begin():
            return publishing.write_intents(
                self._db,
                job_id=self._job.id,
                model_version=self._job.model_version,
                intents=[_intent(entry) for entry in entries],
                place=self._place,
            )

    def _groups(self) -> Iterator[list[Labeled]]:
        """The labeled assets to send with their masks, few at a time."""
        for page in self._candidates():
            for start in range(0, len(page), _BUILD_PAGE):
                group = page[start : start + _BUILD_PAGE]
                with self._db.begin():
                    masks = queries.masks_of(self._db, asset_ids=[candidate.asset_id for candidate, *_ in group])
                yield [self._labeled(c, uri, task_id, masks.get(c.asset_id, [])) for c, uri, task_id in group]

    def _labeled(self, asset: Candidate, uri: str, task_id: int | None, stored: Sequence[StoredMask]) -> Labeled:
        return Labeled(
            asset_id=asset.asset_id,
            asset_uid=asset_uid(uri),
            uri=uri,
            address=image_address(uri, self._options.local_files),
            task_id=task_id,
            size_hw=asset.size_hw,
            masks=[mask_of_row(mask, asset.size_hw) for mask in stored],
        )

    def _candidates(self) -> Iterator[list[tuple[Candidate, str, int | None]]]:
        """Pages of labeled assets to send, each with its uri and the task that the project has of it already."""
        after = 0
        while True:
            with self._db.begin():
                page = publishing.unpublished(
                    self._db, job_id=self._job.id, after_asset_id=after, page=_PAGE, place=self._place
                )
                uris = [self._source.uri(candidate.key) for candidate in page]
                uids = [asset_uid(uri) for uri in uris]
                rows = publishing.rows_of(
                    self._db, model_version=self._job.model_version, asset_uids=uids, place=self._place
                )
            wanted = []
            for candidate, uri, uid in zip(page, uris, uids, strict=True):
                row = rows.get(uid)
                if row is not None and row.state in (LsState.DONE, LsState.SENDING):
                    self.report.already += row.state is LsState.DONE
                    continue
                wanted.append((candidate, uri, row.task_id if row is not None else None))
            self._progress(len(page) - len(wanted))
            yield wanted
            if len(page) < _PAGE:
                return
            after = page[-1].asset_id

    # ------------------------------------------------------------------------------------- in the thread that sends

    def _deliver(self, batch: Sequence[Entry], before: Future[list[_Landed]] | None) -> list[_Landed]:
        """Send a batch, looking first where the server may have some of it; every entry lands or is refused.

        before: the batch before this one; where that could not be sent, neither is this.
        """
        if before is not None:
            before.result()
        landed: list[_Landed] = []
        entries = list(batch)
        if self._careful or any(entry.task_id is not None for entry in entries):
            entries = self._look(entries, landed)
        self._post(entries, landed)
        return landed

    def _post(self, entries: list[Entry], landed: list[_Landed]) -> None:
        """Send entries until each has landed; looks after a failure, and halves what is refused or too large."""
        attempt = 0
        while entries:
            new = [entry for entry in entries if entry.task_id is None]
            if 0 < len(new) < len(entries):
                self._post(new, landed)
                entries = [entry for entry in entries if entry.task_id is not None]
                continue
            try:
                self._send(entries, landed)
                self._refusals_in_a_row = 0
                return
            except (TooLarge, Refused) as error:
                if isinstance(error, Refused) and error.status != 400:
                    raise
                self._halve(entries, landed, error)
                return
            except Unavailable as error:
                log.warning("%s; looking what arrived", error)
                time.sleep(pause_seconds(attempt, error))
                entries = self._look_again(entries, landed, error)
                attempt += 1
                if entries and attempt >= (_ATTEMPTS_AT_ERROR if error.status == 500 else _ATTEMPTS):
                    if error.status != 500:
                        raise
                    self._halve(entries, landed, error)
                    return

    def _send(self, entries: Sequence[Entry], landed: list[_Landed]) -> None:
        """Send entries that are all new, or all known, in one request; compare the server's counts with ours."""
        if entries[0].task_id is None:
            body = b",".join(b'{"data":%b,"predictions":[%b]}' % (entry.data, entry.prediction) for entry in entries)
            answer = self._client.import_tasks(self._project.id, b"[" + body + b"]")
            task_ids: Sequence[int | None] = answer.task_ids
            whole = len(task_ids) == len(entries) == answer.prediction_count
        else:
            task_ids = [entry.task_id for entry in entries]
            body = b",".join(b'{"task":%d,%b' % (entry.task_id or 0, entry.prediction[1:]) for entry in entries)
            whole = self._client.import_predictions(self._project.id, b"[" + body + b"]") == len(entries)
        if whole:
            landed += [_Landed(asset_uid=e.asset_uid, task_id=i) for e, i in zip(entries, task_ids, strict=True)]
            self.report.created += len(entries) if entries[0].task_id is None else 0
            self.report.attached += len(entries) if entries[0].task_id is not None else 0
            return
        for entry in self._look(list(entries), landed):
            error = "Label Studio took the request and left this asset's prediction out"
            landed.append(_Landed(asset_uid=entry.asset_uid, error=error))

    def _halve(self, entries: list[Entry], landed: list[_Landed], error: LabelStudioError) -> None:
        """Send two halves of what cannot be sent whole; an entry that fails alone is refused with the reason."""
        if isinstance(error, TooLarge):
            self._max_bytes = max(min(self._max_bytes, sum(entry.size_bytes for entry in entries) // 2), 100_000)
        if len(entries) > 1:
            middle = len(entries) // 2
            self._post(entries[:middle], landed)
            self._post(entries[middle:], landed)
            return
        self._refusals_in_a_row += error.status == 500
        if self._refusals_in_a_row >= _REFUSALS_IN_A_ROW:
            raise error
        landed.append(_Landed(asset_uid=entries[0].asset_uid, error=str(error)))

    def _look_again(self, entries: list[Entry], landed: list[_Landed], error: Unavailable) -> list[Entry]:
        """What the server has not after a failed request, once it can no longer be at work on it.

        With 500 and 429 it answered itself and is done; a proxy's answer, or none, says nothing about the server.
        """
        give_up_at = time.monotonic() + (0 if error.status in (429, 500) else self._options.settle_seconds)
        while True:
            entries = self._look(entries, landed)
            if not entries or time.monotonic() >= give_up_at:
                return entries
            time.sleep(_POLL_SECONDS)

    def _look(self, entries: list[Entry], landed: list[_Landed]) -> list[Entry]:
        """Land the entries whose prediction the server has; return the others with their task, if it has that."""
        uids = [entry.asset_uid for entry in entries]
        tasks, versioned = self._find(uids, self._job.model_version)
        missing = []
        for entry in entries:
            uid = entry.asset_uid
            if uid in versioned:
                landed.append(_Landed(asset_uid=uid, task_id=versioned[uid][0].id))
                self.report.adopted += 1
            else:
                missing.append(replace(entry, task_id=tasks[uid][0].id if uid in tasks else None))
        return missing

    def _find(
        self, uids: Sequence[str], model_version: str
    ) -> tuple[dict[str, list[FoundTask]], dict[str, list[FoundTask]]]:
        """The server's tasks of these assets, and those of them with a prediction of the version."""
        tasks = self._client.find_tasks(self._project.id, uids)
        found = [uid for uid in uids if uid in tasks]
        return tasks, self._client.find_tasks(self._project.id, found, model_version=model_version)

    # ------------------------------------------------------------------------------------------ doubts and differences

    def _settle(self, *, final: bool) -> int:
        """Ask the server for what an earlier publisher was about to send. Returns how many of it are to be sent again.

        What is not there may still arrive, so it stays in doubt until it is old enough; final: wait for that.
        """
        forgotten = 0
        with self._db.begin():
            versions = publishing.versions_in_doubt(self._db, place=self._place)
        for version in versions:
            while True:
                youngest, dropped = self._settle_version(version, final=final)
                forgotten += dropped
                if youngest is None or not final:
                    break
                time.sleep(_POLL_SECONDS)
        return forgotten

    def _settle_version(self, version: str, *, final: bool) -> tuple[float | None, int]:
        """Look once at what is in doubt: the age in seconds of the youngest that remains so, and how many fell."""
        after, youngest, dropped = 0, None, 0
        while True:
            with self._db.begin():
                rows = publishing.version_rows(
                    self._db, model_version=version, state=LsState.SENDING, after_ls_task_id=after, place=self._place
                )
            if not rows:
                return youngest, dropped
            after = rows[-1].ls_task_id
            tasks, versioned = self._find([row.asset_uid for row in rows], version)
            there = {r.ls_task_id: versioned[r.asset_uid][0].id for r in rows if r.asset_uid in versioned}
            old = [
                row for row in rows if row.ls_task_id not in there and row.age_seconds >= self._options.settle_seconds
            ]
            doubtful = [row.age_seconds for row in rows if row.ls_task_id not in there and row not in old]
            youngest = min(doubtful, default=youngest)
            with self._db.begin():
                publishing.mark_done(self._db, model_version=version, task_ids=there, place=self._place)
                self._drop(old, tasks, version)
            self.report.adopted += len(there)
            dropped += len(old)
            self._progress(len(there) if version == self._job.model_version else 0)

    def _drop(self, rows: Sequence[publishing.Row], tasks: dict[str, list[FoundTask]], version: str) -> None:
        """Forget predictions that the server has not, and tasks where it has not even those."""
        known = {row.ls_task_id: tasks[row.asset_uid][0].id for row in rows if row.asset_uid in tasks}
        publishing.set_task_ids(self._db, task_ids=known, place=self._place)
        publishing.forget_predictions(self._db, model_version=version, ls_task_ids=list(known))
        publishing.forget_tasks(self._db, ls_task_ids=[r.ls_task_id for r in rows if r.ls_task_id not in known])

    def _agrees(self) -> bool:
        """Whether the server has as many predictions of the job's version as we remember."""
        there = self._client.count_versions(self._project.id).get(self._job.model_version, 0)
        with self._db.begin():
            return there == publishing.count_done(self._db, model_version=self._job.model_version, place=self._place)

    def _verify(self) -> bool:
        """Compare each prediction of the job's version that we remember with the server; whether something is missing.

        What is gone there is forgotten, so that it is sent again; what is there twice is reduced to one, where nobody
        has worked on it.
        """
        version, after, gone = self._job.model_version, 0, 0
        while True:
            with self._db.begin():
                rows = publishing.version_rows(
                    self._db, model_version=version, state=LsState.DONE, after_ls_task_id=after, place=self._place
                )
            if not rows:
                self.report.repaired += gone
                return gone > 0
            after = rows[-1].ls_task_id
            tasks, versioned = self._find([row.asset_uid for row in rows], version)
            kept = {uid: self._without_duplicates(found, version) for uid, found in versioned.items()}
            missing = [row for row in rows if row.asset_uid not in kept]
            moved = {
                row.ls_task_id: kept[row.asset_uid]
                for row in rows
                if row.asset_uid in kept and kept[row.asset_uid] != row.task_id
            }
            with self._db.begin():
                publishing.set_task_ids(self._db, task_ids=moved, place=self._place)
                self._drop(missing, tasks, version)
            gone += len(missing)

    def _without_duplicates(self, found: Sequence[FoundTask], version: str) -> int:
        """Delete further tasks of an asset, and further predictions of the version on it, that nobody worked on.

        Returns the task to keep: one that people worked on before others, else the oldest.
        """
        kept = found[0].id
        if len(found) > 1:
            worked_on = [task.id for task in found if self._is_worked_on(task.id)]
            kept = worked_on[0] if worked_on else kept
            for task in found:
                if task.id != kept and task.id not in worked_on:
                    self._client.delete_task(task.id)
                    self.report.duplicates_removed += 1
            if len(worked_on) > 1:
                self.report.notes.append(f"tasks {worked_on} are of one image, and people worked on each: left alone")
        # Stale after a version was deleted, so it may be too high: then one look too many is taken.
        if any(task.prediction_count > 1 for task in found):
            self._remove_extra_predictions(kept, version)
        return kept

    def _is_worked_on(self, task_id: int) -> bool:
        task = self._client.get_task(task_id)
        # Another person's draft is not in the answer, so a task with any is asked for as well.
        return bool(task["annotations"] or task["drafts"] or self._client.has_draft(self._project.id, task_id))

    def _remove_extra_predictions(self, task_id: int, version: str) -> None:
        task = self._client.get_task(task_id)
        ours = sorted(p["id"] for p in task["predictions"] if p["model_version"] == version)
        if len(ours) < 2:
            return
        used = {annotation["parent_prediction"] for annotation in task["annotations"]}
        kept = next((prediction_id for prediction_id in ours if prediction_id in used), ours[0])
        for prediction_id in ours:
            if prediction_id != kept and prediction_id not in used:
                self._client.delete_prediction(prediction_id)
                self.report.duplicates_removed += 1

    def _show_version(self) -> None:
        """Let the project show the job's version, once all of it is there and the job is over, or none is shown."""
        version, shown = self._job.model_version, self._client.get_project(self._project.id).model_version
        self.report.shown_version = shown
        if shown == version or not (self._job.state in _OVER or not shown):
            return
        if version not in self._client.count_versions(self._project.id):
            return
        self._client.show_version(self._project.id, version)
        self.report.shown_version = version


def _intent(entry: Entry) -> Intent:
    return Intent(
        asset_uid=entry.asset_uid,
        uri=entry.uri,
        asset_id=entry.asset_id,
        mask_count=entry.mask_count,
        left_out=entry.mask_count - len(entry.ious),
        iou_sum=sum(entry.ious),
        iou_min=min(entry.ious, default=None),
        error=entry.error,
    )
