"""`export`: a job's masks as files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from db import results, reviewed_masks
from db.session import Connection
from orchestrator.cli.app import JobArgument, app, deployment_engine, err, fail
from orchestrator.cli.options import LocalFilesOption
from orchestrator.cli.request import document_root
from orchestrator.terminal.console import printable
from orchestrator.terminal.jobs import read_job


class ExportFormat(StrEnum):
    COCO = "coco"
    YOLO = "yolo"
    PNG = "png"
    LABEL_STUDIO = "label-studio"


@app.command(epilog="Example: `maskfleet export 12 --format coco --out coco.json`")
def export(
    job: JobArgument,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="What to write.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File, or folder for png and yolo.", show_default=False)],
    reviewed: Annotated[
        bool, typer.Option("--reviewed", help="The masks as people left them, as `review` read them.")
    ] = False,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score", help="Only predictions of this score or more; with --reviewed, for assets nobody annotated."
        ),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="With yolo: copy the images too.")] = False,
    local_files: LocalFilesOption = None,
) -> None:
    """Write a job's masks as COCO, YOLO datasets, PNG files or Label Studio tasks, streaming.

    With --reviewed: only annotated assets; with --min-score, the others too. Run `maskfleet review` first.
    """
    from orchestrator.export.coco import export_coco
    from orchestrator.export.label_studio import export_label_studio
    from orchestrator.export.png import export_png
    from orchestrator.export.yolo import export_yolo

    write: dict[ExportFormat, Callable[..., list[str] | None]] = {
        ExportFormat.COCO: export_coco,
        ExportFormat.YOLO: functools.partial(export_yolo, images=images),
        ExportFormat.PNG: export_png,
        ExportFormat.LABEL_STUDIO: export_label_studio,
    }
    if local_files is not None and file_format is not ExportFormat.LABEL_STUDIO:
        fail("--local-files goes with --format label-studio")
    if images and file_format is not ExportFormat.YOLO:
        fail("--images goes with --format yolo")
    engine = deployment_engine(statement_timeout_seconds=0)
    found, counts = read_job(engine, job)
    if counts.pending:
        err.print(f"job {job} is {found.state}: {counts.pending} assets are not in the export yet", style="yellow")
    if local_files is not None:
        root = document_root(local_files, found.source)
        write[ExportFormat.LABEL_STUDIO] = functools.partial(export_label_studio, local_files=root)
    with engine.connect() as db:
        notes = write[file_format](db, found, out, _exported(db, job, reviewed=reviewed, min_score=min_score))
    err.print(f"wrote {out}")
    for note in notes or ():
        err.print(printable(note), style="yellow", markup=False)


def _exported(
    db: Connection, job: int, *, reviewed: bool, min_score: float | None
) -> Iterator[results.LabeledAsset] | None:
    """The reviewed assets, which are exported instead of the labeled assets."""
    if not reviewed:
        return None if min_score is None else reviewed_masks.scored_assets(db, job_id=job, min_score=min_score)
    count = reviewed_masks.annotated_assets(db, job_id=job)
    if count == 0 and min_score is None:
        fail(f"no annotation of job {job} has been read: `maskfleet review {job} --project ID` reads them")
    err.print(f"{count:,} assets as people left them")
    return reviewed_masks.reviewed_assets(db, job_id=job, min_score=min_score)
