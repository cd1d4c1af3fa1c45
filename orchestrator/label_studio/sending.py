"""Sends batches of entries to Label Studio until the server has each entry, or refuses it with a reason.

A request that failed may still have arrived. So its entries are looked up by their data.asset_id before they are sent
again. While a job is being sent, only this code talks to the server, in a thread of its own. It never uses the
database.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from orchestrator.label_studio.answers import FoundTask
from orchestrator.label_studio.client import LabelStudio, pause_seconds
from orchestrator.label_studio.entries import MAX_BYTES, Entry
from orchestrator.label_studio.errors import LabelStudioError, Refused, TooLarge, Unavailable
from orchestrator.label_studio.publication import POLL_SECONDS, Publication

_ATTEMPTS = 5
_ATTEMPTS_AT_ERROR = 2  # tries of a request that the server itself answers with 500
_ANSWERED_ITSELF = (429, 500)  # the server's own answers: it is done with the request
_REFUSALS_IN_A_ROW = 3  # by 500; then the fault is the server's, not the assets'

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """The result for an entry: its task, or why it was refused."""

    asset_uid: str
    task_id: int | None = None
    error: str | None = None


def find_on_server(
    client: LabelStudio, project_id: int, asset_uids: Sequence[str], model_version: str
) -> tuple[dict[str, list[FoundTask]], dict[str, list[FoundTask]]]:
    """The server's tasks of these assets, and the ones with a prediction of the version, both by asset_uid."""
    tasks = client.find_tasks(project_id, asset_uids)
    found = [uid for uid in asset_uids if uid in tasks]
    return tasks, client.find_tasks(project_id, found, model_version=model_version)


class Sender:
    """Delivers batches one after the other. max_bytes: the largest request that this server accepts.

    careful: the project has tasks that we did not store, so each entry is looked up before it is sent.
    """

    def __init__(self, publication: Publication, *, careful: bool) -> None:
        self.max_bytes = MAX_BYTES
        self._client = publication.client
        self._project_id = publication.project.id
        self._model_version = publication.job.model_version
        self._settle_seconds = publication.options.settle_seconds
        self._report = publication.report
        self._late = publication.late
        self._careful = careful
        self._refusals_in_a_row = 0

    def deliver(self, batch: Sequence[Entry], before: Future[list[Acknowledged]] | None) -> list[Acknowledged]:
        """Send a batch until every entry has arrived or is refused. If the server may have some of it, look first.

        before: the batch before this one. If that could not be sent, this one is not sent.
        """
        if before is not None:
            before.result()
        acknowledged: list[Acknowledged] = []
        entries = list(batch)
        if self._careful or any(entry.task_id is not None for entry in entries):
            entries = self._missing(entries, acknowledged)
        self._post(entries, acknowledged)
        return acknowledged

    def _post(self, entries: list[Entry], acknowledged: list[Acknowledged]) -> None:
        """Send entries until each has arrived. After a failure, look on the server. A request that is refused or too
        large is halved."""
        attempt = 0
        while entries:
            new = [entry for entry in entries if entry.task_id is None]
            if 0 < len(new) < len(entries):
                self._post(new, acknowledged)
                entries = [entry for entry in entries if entry.task_id is not None]
                continue
            try:
                self._send(entries, acknowledged)
                self._refusals_in_a_row = 0
                return
            except (TooLarge, Refused) as error:
                if isinstance(error, Refused) and error.status != 400:
                    raise
                self._halve(entries, acknowledged, error)
                return
            except Unavailable as error:
                log.warning("%s; looking what arrived", error)
                time.sleep(pause_seconds(attempt, error))
                entries = self._missing_at_last(entries, acknowledged, error)
                attempt += 1
                if entries and error.status not in _ANSWERED_ITSELF:
                    self._late.note()
                if entries and attempt >= (_ATTEMPTS_AT_ERROR if error.status == 500 else _ATTEMPTS):
                    if error.status != 500:
                        raise
                    self._halve(entries, acknowledged, error)
                    return

    def _send(self, entries: Sequence[Entry], acknowledged: list[Acknowledged]) -> None:
        """Send entries that are all new, or all known, in one request. Compare the server's counts with ours."""
        if entries[0].task_id is None:
            body = b",".join(b'{"data":%b,"predictions":[%b]}' % (entry.data, entry.prediction) for entry in entries)
            answer = self._client.import_tasks(self._project_id, b"[" + body + b"]")
            task_ids: Sequence[int | None] = answer.task_ids
            whole = len(task_ids) == len(entries) == answer.prediction_count
        else:
            task_ids = [entry.task_id for entry in entries]
            body = b",".join(b'{"task":%d,%b' % (entry.task_id or 0, entry.prediction[1:]) for entry in entries)
            whole = self._client.import_predictions(self._project_id, b"[" + body + b"]") == len(entries)
        if whole:
            acknowledged += [
                Acknowledged(asset_uid=e.asset_uid, task_id=i) for e, i in zip(entries, task_ids, strict=True)
            ]
            self._report.created += len(entries) if entries[0].task_id is None else 0
            self._report.attached += len(entries) if entries[0].task_id is not None else 0
            return
        for entry in self._missing(list(entries), acknowledged):
            error = "Label Studio took the request and left this asset's prediction out"
            acknowledged.append(Acknowledged(asset_uid=entry.asset_uid, error=error))

    def _halve(self, entries: list[Entry], acknowledged: list[Acknowledged], error: LabelStudioError) -> None:
        """Send a failed request as two halves. An entry that fails alone is refused with the reason."""
        if isinstance(error, TooLarge):
            self.max_bytes = max(min(self.max_bytes, sum(entry.size_bytes for entry in entries) // 2), 100_000)
        if len(entries) > 1:
            middle = len(entries) // 2
            self._post(entries[:middle], acknowledged)
            self._post(entries[middle:], acknowledged)
            return
        self._refusals_in_a_row += error.status == 500
        if self._refusals_in_a_row >= _REFUSALS_IN_A_ROW:
            raise error
        acknowledged.append(Acknowledged(asset_uid=entries[0].asset_uid, error=str(error)))

    def _missing_at_last(
        self, entries: list[Entry], acknowledged: list[Acknowledged], error: Unavailable
    ) -> list[Entry]:
        """The entries that the server does not have after a failed request. Waits until it cannot be working on it.

        After 500 and 429, the server itself answered and is done. A proxy's answer, or none, says nothing about it.
        """
        give_up_at = time.monotonic() + (0 if error.status in _ANSWERED_ITSELF else self._settle_seconds)
        while True:
            entries = self._missing(entries, acknowledged)
            if not entries or time.monotonic() >= give_up_at:
                return entries
            time.sleep(POLL_SECONDS)

    def _missing(self, entries: list[Entry], acknowledged: list[Acknowledged]) -> list[Entry]:
        """Acknowledge the entries whose prediction the server has; return the others with their task, if it has one."""
        uids = [entry.asset_uid for entry in entries]
        tasks, versioned = find_on_server(self._client, self._project_id, uids, self._model_version)
        missing = []
        for entry in entries:
            uid = entry.asset_uid
            if uid in versioned:
                acknowledged.append(Acknowledged(asset_uid=uid, task_id=versioned[uid][0].id))
                self._report.adopted += 1
            else:
                missing.append(replace(entry, task_id=tasks[uid][0].id if uid in tasks else None))
        return missing
