"""Which assets and masks of a job an export is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, islice

from db import results
from db.jobs import Job
from db.results import FailedAsset, LabeledAsset, StoredMask
from db.reviewed_masks import labels_left, reviewed_assets, with_score
from db.session import Connection
from orchestrator.export.errors import ExportError
from orchestrator.export.keys import Keys
from orchestrator.label_studio.names import DEFAULT_LABEL
from workers.errors import meant


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """All conditions hold together. Those on masks leave every asset in, perhaps without masks: only `keys` and
    `reviewed` choose assets.

    labels: those of the export, where a mask without a label is "object". min_area_px: whole pixels. min_score: of
    predictions; masks that people left are not asked for theirs. page: the masks of this many assets are in memory.
    masks_apart: assets come bare where nobody reviewed, for a writer that reads their masks by columns.
    """

    labels: frozenset[str] = frozenset()
    min_area_px: int = 0
    min_score: float | None = None
    reviewed: bool = False
    keys: Keys | None = None
    page: int = 100
    masks_apart: bool = False

    def check(self, db: Connection, job: Job) -> None:
        """Raises ExportError for a label that no mask of the job has. People may have given others (`reviewed`)."""
        known = {*results.labels_of(db, job_id=job.id), DEFAULT_LABEL}
        strange = sorted(self.labels - known)
        if strange and not self.reviewed:
            raise ExportError(
                f"--label {strange[0]}{meant(strange[0], known)}: job {job.id} has {', '.join(sorted(known)[:20])}"
            )

    def class_names(self, db: Connection, job: Job) -> list[str]:
        """The labels in the order of their class numbers: the job's, then people's, whatever the conditions choose."""
        own = results.labels_of(db, job_id=job.id) or [DEFAULT_LABEL]
        people = {*labels_left(db, job_id=job.id)} - {*own} if self.reviewed else set()
        return own + sorted(people, key=lambda label: (label != DEFAULT_LABEL, label))

    def assets(self, db: Connection, job: Job, after: str = "") -> Iterator[LabeledAsset]:
        """Stream the assets in key order with the masks that are asked for. after: only later keys."""
        bare = self.masks_apart and not self.reviewed
        assets: Iterator[LabeledAsset]
        if self.keys is not None:
            find = partial(results.bare_of_keys if bare else results.labeled_of_keys, db, job_id=job.id)
            assets = _assets_of_keys(find, self.keys, after=after, page=self.page)
        elif bare:
            assets = results.bare_assets(db, job_id=job.id, after=after)
        else:
            assets = results.labeled_assets(db, job_id=job.id, after=after, page=self.page)
        if self.reviewed:
            assets = reviewed_assets(db, job_id=job.id, assets=assets, min_score=self.min_score)
        for asset in assets:
            scored = asset if bare or self.reviewed or self.min_score is None else with_score(asset, self.min_score)
            is_whole = bare or (not self.labels and self.min_area_px <= 0)
            yield scored if is_whole else replace(scored, masks=[m for m in scored.masks if self._is_wanted(m)])

    def failed(self, db: Connection, job: Job) -> Iterator[FailedAsset]:
        """Stream the failed assets that are asked for. Nobody reviewed a failed asset."""
        if self.reviewed:
            return
        if self.keys is None:
            yield from results.stream_failed(db, job_id=job.id)
            return
        keys = iter(self.keys)
        while batch := list(islice(keys, self.page)):
            yield from results.failed_of_keys(db, job_id=job.id, keys=batch)

    def _is_wanted(self, mask: StoredMask) -> bool:
        label = DEFAULT_LABEL if mask.label is None else mask.label
        return mask.area_px >= self.min_area_px and (not self.labels or label in self.labels)


def _assets_of_keys(
    find: Callable[..., Sequence[LabeledAsset]], keys: Keys, *, after: str, page: int
) -> Iterator[LabeledAsset]:
    rest = dropwhile(lambda key: key <= after, keys)
    while batch := list(islice(rest, page)):
        found = find(keys=batch)
        present = {asset.key for asset in found}
        keys.tell_missing([key for key in batch if key not in present])
        yield from found
