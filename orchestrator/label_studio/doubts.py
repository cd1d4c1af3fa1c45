"""Compares what we stored about a project with its server: resolves what is in doubt, repairs what differs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from db import published, publishing
from db.states import LsState
from orchestrator.label_studio.answers import FoundTask
from orchestrator.label_studio.publication import POLL_SECONDS, Publication
from orchestrator.label_studio.sending import find_on_server

_LATE_POLL_SECONDS = 10.0

log = logging.getLogger(__name__)


class Doubts:
    """Compares the outbox with the server, in the thread that owns the database connection."""

    def __init__(self, publication: Publication) -> None:
        self._publication = publication
        self._db = publication.db
        self._client = publication.client
        self._project_id = publication.project.id
        self._version = publication.job.model_version
        self._report = publication.report

    def resolve_in_doubt(self, *, final: bool) -> int:
        """Ask the server for what an earlier publisher was about to send. Returns how many must be sent again.

        A request that is not there may still arrive, so it stays in doubt until it is old enough. final: wait until
        then.
        """
        forgotten = 0
        with self._db.begin():
            versions = publishing.versions_in_doubt(self._db, ls_project=self._publication.ls_project)
        for version in versions:
            while True:
                youngest, dropped = self._resolve_version(version)
                forgotten += dropped
                if youngest is None or not final:
                    break
                time.sleep(POLL_SECONDS)
        return forgotten

    def _resolve_version(self, version: str) -> tuple[float | None, int]:
        """Look once at what is in doubt. Returns the age in seconds of the youngest that stays in doubt, and how many
        must be sent again.
        """
        after, youngest, dropped = 0, None, 0
        settle_seconds = self._publication.options.settle_seconds
        while True:
            rows = self._rows(version, LsState.SENDING, after)
            if not rows:
                return youngest, dropped
            after = rows[-1].ls_task_id
            tasks, versioned = self._find([row.asset_uid for row in rows], version)
            there = {r.ls_task_id: versioned[r.asset_uid][0].id for r in rows if r.asset_uid in versioned}
            old = [row for row in rows if row.ls_task_id not in there and row.age_seconds >= settle_seconds]
            doubtful = [row.age_seconds for row in rows if row.ls_task_id not in there and row not in old]
            youngest = min(doubtful, default=youngest)
            with self._db.begin():
                publishing.mark_done(
                    self._db, model_version=version, task_ids=there, ls_project=self._publication.ls_project
                )
                self._forget(old, tasks, version)
            self._report.adopted += len(there)
            dropped += len(old)
            if old:
                self._publication.late.note()
            self._publication.progress(len(there) if version == self._version else 0)

    def agrees(self) -> bool:
        """Whether the server has as many predictions of the job's version as we stored."""
        there = self._client.count_versions(self._project_id).get(self._version, 0)
        with self._db.begin():
            remembered = published.count_done(
                self._db, model_version=self._version, ls_project=self._publication.ls_project
            )
        return there == remembered

    def remove_late(self) -> bool:
        """Remove what arrives late: a request that was given up, and whose entries were sent again.

        Waits until none can arrive. Returns whether something is missing now.
        """
        late_seconds, missing = self._publication.options.late_seconds, False
        while (left := self._publication.late.left(late_seconds)) > 0:
            log.info("assets were sent again after a lost answer; watching %.0f s more for what arrives late", left)
            time.sleep(min(left, _LATE_POLL_SECONDS))
            if not self.agrees():
                missing = self.verify() or missing
        return missing

    def verify(self) -> bool:
        """Compare each stored prediction of the job's version with the server. Returns whether something is missing.

        If one is gone there, we forget it, so it is sent again. If one is there twice, the second is deleted unless
        somebody worked on it.
        """
        version, after, gone = self._version, 0, 0
        while True:
            rows = self._rows(version, LsState.DONE, after)
            if not rows:
                self._report.repaired += gone
                return gone > 0
            after = rows[-1].ls_task_id
            tasks, versioned = self._find([row.asset_uid for row in rows], version)
            kept = {uid: self._without_duplicates(found) for uid, found in versioned.items()}
            missing = [row for row in rows if row.asset_uid not in kept]
            moved = {
                row.ls_task_id: kept[row.asset_uid]
                for row in rows
                if row.asset_uid in kept and kept[row.asset_uid] != row.task_id
            }
            with self._db.begin():
                publishing.set_task_ids(self._db, task_ids=moved, ls_project=self._publication.ls_project)
                self._forget(missing, tasks, version)
            gone += len(missing)

    def _rows(self, version: str, state: LsState, after_ls_task_id: int) -> list[publishing.Row]:
        with self._db.begin():
            return publishing.version_rows(
                self._db,
                model_version=version,
                state=state,
                after_ls_task_id=after_ls_task_id,
                ls_project=self._publication.ls_project,
            )

    def _find(
        self, asset_uids: Sequence[str], version: str
    ) -> tuple[dict[str, list[FoundTask]], dict[str, list[FoundTask]]]:
        return find_on_server(self._client, self._project_id, asset_uids, version)

    def _forget(self, rows: Sequence[publishing.Row], tasks: dict[str, list[FoundTask]], version: str) -> None:
        """Forget predictions that the server does not have, and tasks that it does not have."""
        known = {row.ls_task_id: tasks[row.asset_uid][0].id for row in rows if row.asset_uid in tasks}
        publishing.set_task_ids(self._db, task_ids=known, ls_project=self._publication.ls_project)
        publishing.forget_predictions(self._db, model_version=version, ls_task_ids=list(known))
        publishing.forget_tasks(self._db, ls_task_ids=[r.ls_task_id for r in rows if r.ls_task_id not in known])

    def _without_duplicates(self, found: Sequence[FoundTask]) -> int:
        """Delete further tasks of an asset, and further predictions of the version, if nobody worked on them.

        Returns the task to keep: one that people worked on, else the oldest.
        """
        kept = found[0].id
        if len(found) > 1:
            worked_on = [task.id for task in found if self._is_worked_on(task.id)]
            kept = worked_on[0] if worked_on else kept
            for task in found:
                if task.id != kept and task.id not in worked_on:
                    self._client.delete_task(task.id)
                    self._report.duplicates_removed += 1
            if len(worked_on) > 1:
                self._report.notes.append(f"tasks {worked_on} are of one image, and people worked on each: left alone")
        # This count may be too high after a version was deleted. Then we look once more than needed.
        if any(task.prediction_count > 1 for task in found):
            self._remove_extra_predictions(kept)
        return kept

    def _is_worked_on(self, task_id: int) -> bool:
        task = self._client.get_task(task_id)
        # Another person's draft is not in the answer, so we also ask whether the task has any draft.
        return bool(task["annotations"] or task["drafts"] or self._client.has_draft(self._project_id, task_id))

    def _remove_extra_predictions(self, task_id: int) -> None:
        task = self._client.get_task(task_id)
        ours = sorted(p["id"] for p in task["predictions"] if p["model_version"] == self._version)
        if len(ours) < 2:
            return
        used = {annotation["parent_prediction"] for annotation in task["annotations"]}
        kept = next((prediction_id for prediction_id in ours if prediction_id in used), ours[0])
        for prediction_id in ours:
            if prediction_id != kept and prediction_id not in used:
                self._client.delete_prediction(prediction_id)
                self._report.duplicates_removed += 1
