"""The part of a job that a project does not have yet: read from the database, sent, and the server's answer stored.

Everything here runs in the thread that owns the database connection. Requests are sent in a thread of their own
(`sending`), so the next one is made while one is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from db import publishing, results
from db.publishing import Candidate, Intent
from db.results import StoredMask
from db.states import LsState
from orchestrator.label_studio.addresses import asset_uid, image_address
from orchestrator.label_studio.config import Controls
from orchestrator.label_studio.entries import Entry, Labeled, Plan, entries_of
from orchestrator.label_studio.publication import Publication
from orchestrator.label_studio.review_order import candidate_pages, make_order
from orchestrator.label_studio.sending import Acknowledged, Sender
from workers.storage.asset import Source
from workers.stored_masks import mask_of_row

# More than 50 to 100 tasks in a request are not faster.
MAX_TASKS = 100
FIRST_TASKS = 50  # in the first request, so the server starts while the next one is made

_PAGE = 200
_BUILD_PAGE = 10  # assets whose masks are read at once; 3,000 masks on one asset are a few MB


class Outgoing:
    """The labeled assets of a job that the project does not have."""

    def __init__(self, publication: Publication, controls: Controls, source: Source, sender: Sender) -> None:
        self._publication = publication
        self._db = publication.db
        self._job = publication.job
        self._controls = controls
        self._source = source
        self._sender = sender
        self._is_ordered = False

    def send_all(self) -> None:
        """Send every labeled asset that the project does not have. One request is ready while another is on its way."""
        self._publication.report.already = 0  # each time, all that was there is met again
        with ThreadPoolExecutor(1, thread_name_prefix="sender") as thread:
            in_flight: deque[tuple[dict[str, int], Future[list[Acknowledged]]]] = deque()
            before: Future[list[Acknowledged]] | None = None
            for batch in self._batches():
                ids = self._write_intents(batch)
                before = thread.submit(self._sender.deliver, batch, before)
                in_flight.append((ids, before))
                if len(in_flight) > 1:
                    self._acknowledge(*in_flight.popleft())
            for sent in in_flight:
                self._acknowledge(*sent)

    def _acknowledge(self, ls_task_ids: dict[str, int], answer: Future[list[Acknowledged]]) -> None:
        """Store what the server answered."""
        acknowledged = answer.result()
        done = {ls_task_ids[one.asset_uid]: one.task_id for one in acknowledged if one.task_id is not None}
        errors = {ls_task_ids[one.asset_uid]: one.error for one in acknowledged if one.error is not None}
        version = self._job.model_version
        with self._db.begin():
            publishing.mark_done(
                self._db, model_version=version, task_ids=done, ls_project=self._publication.ls_project
            )
            publishing.mark_refused(self._db, model_version=version, errors=errors)
        self._publication.progress(len(done))

    def _batches(self) -> Iterator[list[Entry]]:
        """The entries to send, in requests of at most MAX_TASKS tasks and MAX_BYTES. A larger task goes alone."""
        batch: list[Entry] = []
        size_bytes = 0
        most = FIRST_TASKS
        for entry in self._entries():
            if batch and (len(batch) >= most or size_bytes + entry.size_bytes > self._sender.max_bytes):
                yield batch
                batch, size_bytes, most = [], 0, MAX_TASKS
            batch.append(entry)
            size_bytes += entry.size_bytes
        if batch:
            yield batch

    def _entries(self) -> Iterator[Entry]:
        """The labeled assets that the project does not have. Those that do not fit its config are stored as refused."""
        options = self._publication.options
        plan = Plan(
            controls=self._controls,
            as_=options.as_,
            max_masks=options.max_masks,
            model_version=self._job.model_version,
        )
        for entries in entries_of(plan, self._groups()):
            if refused := [entry for entry in entries if entry.error is not None]:
                self._write_intents(refused)
            yield from (entry for entry in entries if entry.error is None)

    def _write_intents(self, entries: Sequence[Entry]) -> dict[str, int]:
        """Store what is about to be sent, or refused. Returns the ls_task id of each by its asset_uid."""
        with self._db.begin():
            return publishing.write_intents(
                self._db,
                job_id=self._job.id,
                model_version=self._job.model_version,
                intents=[_intent(entry) for entry in entries],
                ls_project=self._publication.ls_project,
            )

    def _groups(self) -> Iterator[list[Labeled]]:
        """The labeled assets to send with their masks, a few at a time."""
        for page in self._candidates():
            for start in range(0, len(page), _BUILD_PAGE):
                group = page[start : start + _BUILD_PAGE]
                with self._db.begin():
                    masks = results.masks_of(self._db, asset_ids=[candidate.asset_id for candidate, *_ in group])
                    results.require_job(self._db, job_id=self._job.id)
                yield [self._labeled(c, uri, task_id, masks.get(c.asset_id, [])) for c, uri, task_id in group]

    def _labeled(self, asset: Candidate, uri: str, task_id: int | None, stored: Sequence[StoredMask]) -> Labeled:
        return Labeled(
            asset_id=asset.asset_id,
            asset_uid=asset_uid(uri),
            uri=uri,
            address=image_address(uri, self._publication.options.local_files),
            task_id=task_id,
            size_hw=asset.size_hw,
            masks=[mask_of_row(mask, asset.size_hw) for mask in stored],
        )

    def _candidates(self) -> Iterator[list[tuple[Candidate, str, int | None]]]:
        """Pages of labeled assets to send, each with its uri and with its task, if the project has one already."""
        ls_project = self._publication.ls_project
        is_first = not self._is_ordered
        if is_first:
            make_order(self._publication)
            self._is_ordered = True
        for page in candidate_pages(self._publication, _PAGE):
            uris = [self._source.uri(candidate.key) for candidate in page]
            uids = [asset_uid(uri) for uri in uris]
            with self._db.begin():
                rows = publishing.rows_of(
                    self._db, model_version=self._job.model_version, asset_uids=uids, ls_project=ls_project
                )
            wanted = []
            for candidate, uri, uid in zip(page, uris, uids, strict=True):
                row = rows.get(uid)
                if row is not None and row.state in (LsState.DONE, LsState.SENDING):
                    self._publication.report.already += row.state is LsState.DONE
                    continue
                wanted.append((candidate, uri, row.task_id if row is not None else None))
            if is_first:
                self._publication.progress(len(page) - len(wanted))
            yield wanted


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
