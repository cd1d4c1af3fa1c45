"""The formats of an export, each with its writer, and the one question that `export` asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

from db.jobs import Counts, Job
from db.results import LabeledAsset
from db.reviewed_masks import annotations_read
from db.session import Connection
from orchestrator.export.coco import export_coco
from orchestrator.export.errors import ExportError
from orchestrator.export.files import collect_seldom
from orchestrator.export.label_studio import export_label_studio
from orchestrator.export.parquet import export_failed, export_parquet
from orchestrator.export.parts import Parts, WritePart, open_parts, write_parts
from orchestrator.export.png import export_png
from orchestrator.export.processes import PartWriter, part_ranges, write_parts_at_once
from orchestrator.export.selection import Selection
from orchestrator.export.yolo import export_yolo
from workers.errors import AssetError
from workers.paths import own_path

_PART_ASSETS = 100_000  # of Parquet, which always comes in parts


class ExportFormat(StrEnum):
    COCO = "coco"
    YOLO = "yolo"
    PNG = "png"
    LABEL_STUDIO = "label-studio"
    PARQUET = "parquet"

    @property
    def page(self) -> int:
        """The masks of this many assets are in memory at once. Pages are short where writing takes long."""
        return {ExportFormat.PNG: 10, ExportFormat.YOLO: 20, ExportFormat.LABEL_STUDIO: 20}.get(self, 200)

    @property
    def suffix(self) -> str:
        """Of a part's name. The parts of the other formats are folders."""
        suffixes = {ExportFormat.COCO: ".json", ExportFormat.LABEL_STUDIO: ".json", ExportFormat.PARQUET: ".parquet"}
        return suffixes.get(self, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What became of an export. notes: for people. was_there: it was complete already, and nothing was written."""

    notes: Sequence[str]
    was_there: bool = False


def tell_nobody(_: int) -> None:
    """The progress of an export that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be written. part_assets: assets a part; None is the format's usual: one file, or Parquet's parts.

    local_files: as `export_label_studio` takes it. images: as `export_yolo` takes it. processes: parts at once.
    progress: called with how many assets are written; first with how many were there before.
    """

    file_format: ExportFormat
    selection: Selection
    part_assets: int | None = None
    images: bool = False
    local_files: str | None = None
    processes: int = 1
    progress: Callable[[int], None] = tell_nobody

    def write(self, db: Connection, job: Job, counts: Counts, out: str) -> Written:
        """Write it. Raises ExportError for what cannot be written, or not there."""
        collect_seldom()
        by_columns = self.file_format in (ExportFormat.COCO, ExportFormat.PARQUET)
        question = replace(self, selection=replace(self.selection, masks_apart=by_columns))
        try:
            return question._write(db, job, counts, out)
        except (AssetError, FileExistsError, PermissionError) as error:
            raise ExportError(str(error)) from error

    def _write(self, db: Connection, job: Job, counts: Counts, out: str) -> Written:
        in_parts = self.part_assets is not None or self.file_format is ExportFormat.PARQUET
        self._check(db, job, out, in_parts=in_parts)
        if in_parts:
            written = self._write_parts(db, job, counts, out)
        else:
            assets = self._told(self.selection.assets(db, job), 0)
            write = self._writer(db, job, labels=self._class_names(db, job))
            written = Written(notes=write(own_path(out), assets) or [])
        return (
            written
            if self.selection.keys is None
            else replace(written, notes=[*written.notes, *self.selection.keys.notes()])
        )

    def _told(self, assets: Iterable[LabeledAsset], before: int) -> Iterator[LabeledAsset]:
        """The assets on their way, told to `progress`."""
        self.progress(before)
        for number, asset in enumerate(assets, start=before + 1):
            yield asset
            self.progress(number)

    def _check(self, db: Connection, job: Job, out: str, *, in_parts: bool) -> None:
        self.selection.check(db, job)
        if self.processes > 1 and not in_parts:
            raise ExportError("--processes: only --format parquet, or an export with --shard-assets, has parts")
        if self.processes > 1 and self.selection.keys is not None:
            raise ExportError("--processes with --keys: one process reads the keys in order; leave --processes out")
        if "://" in out and not in_parts:
            raise ExportError(f"{out}: only --format parquet, or an export with --shard-assets, goes to a bucket")
        if in_parts and self.selection.reviewed and self.file_format in (ExportFormat.COCO, ExportFormat.YOLO):
            raise ExportError(
                f"--reviewed with --shard-assets and --format {self.file_format}: people's own labels would have other "
                "numbers in each part: leave --shard-assets out, or use --format parquet"
            )

    def _write_parts(self, db: Connection, job: Job, counts: Counts, out: str) -> Written:
        part_assets = self.part_assets or _PART_ASSETS
        with open_parts(out, self._request(db, job, counts, part_assets)) as parts:
            if parts.complete:
                return Written(notes=[], was_there=True)
            if self.processes > 1:
                self._write_at_once(db, job, parts, out, part_assets)
            else:
                assets = self._told(self.selection.assets(db, job, after=parts.last_key), parts.count("assets"))
                writer = self._writer(db, job, labels=self._class_names(db, job))
                write_parts(parts, assets, writer, part_assets=part_assets, suffix=self.file_format.suffix)
            self._finish(db, job, parts)
            said = f"{len(parts.finished):,} parts, {parts.count('assets'):,} assets, {parts.count('masks'):,} masks"
            return Written(notes=[said, *parts.notes()])

    def _write_at_once(self, db: Connection, job: Job, parts: Parts, out: str, part_assets: int) -> None:
        ranges = part_ranges(
            db,
            job,
            after=parts.last_key,
            first=len(parts.finished),
            part_assets=part_assets,
            suffix=self.file_format.suffix,
        )
        writer = PartWriter(
            database_url=db.engine.url.render_as_string(hide_password=False),
            job=job,
            selection=self.selection,
            # It goes to other processes.
            make_writer=partial(replace(self, progress=tell_nobody)._writer, labels=self._class_names(db, job)),
            out=out if "://" in out else str(parts.folder),
        )
        write_parts_at_once(parts, ranges, writer, processes=self.processes, progress=self.progress)

    def _finish(self, db: Connection, job: Job, parts: Parts) -> None:
        if self.file_format is ExportFormat.PARQUET:
            export_failed(job, parts.folder, self.selection.failed(db, job))
        parts.finish()

    def _request(self, db: Connection, job: Job, counts: Counts, part_assets: int) -> dict[str, Any]:
        """What must be the same for an export to go on. The counts tell a job that changed in the meantime, and
        `annotations` that people did.
        """
        selection = self.selection
        return {
            "job": job.id,
            "source": job.source,
            "model_version": job.model_version,
            "format": str(self.file_format),
            "shard_assets": part_assets,
            "label": sorted(selection.labels),
            "min_area": selection.min_area_px,
            "min_score": selection.min_score,
            "reviewed": selection.reviewed,
            "annotations": annotations_read(db, job_id=job.id) if selection.reviewed else None,
            "keys_sha256": None if selection.keys is None else selection.keys.sha256,
            "images": self.images,
            "local_files": self.local_files,
            "listed": counts.listed,
            "labeled": counts.labeled,
            "failed": counts.failed,
            "without_prompts": counts.without_prompts,
            "job_masks": counts.masks,
        }

    def _class_names(self, db: Connection, job: Job) -> list[str] | None:
        """Read once for all parts, so that a class has the same number in each. None where classes have none."""
        has_numbers = self.file_format in (ExportFormat.COCO, ExportFormat.YOLO)
        return self.selection.class_names(db, job) if has_numbers else None

    def _writer(self, db: Connection, job: Job, *, labels: Sequence[str] | None) -> WritePart:
        """The format's writer of one file or folder."""
        writers: dict[ExportFormat, Callable[..., list[str] | None]] = {
            ExportFormat.COCO: partial(export_coco, db, job, labels=labels, selection=self.selection),
            ExportFormat.YOLO: partial(export_yolo, db, job, images=self.images, labels=labels),
            ExportFormat.PNG: partial(export_png, db, job),
            ExportFormat.LABEL_STUDIO: partial(export_label_studio, db, job, local_files=self.local_files),
            ExportFormat.PARQUET: partial(export_parquet, db, job, self.selection),
        }
        return writers[self.file_format]
