"""`export`: a job's masks as files."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from db import reviewed_masks
from db.session import Connection
from orchestrator.cli.app import JobArgument, app, called, deployment_engine, err, fail
from orchestrator.cli.options import LocalFilesOption
from orchestrator.cli.request import document_root
from orchestrator.cli.root import opened
from orchestrator.export.formats import ExportFormat, Question, Written
from orchestrator.export.keys import Keys
from orchestrator.export.selection import Selection
from orchestrator.terminal.console import printable
from orchestrator.terminal.jobs import read_job
from orchestrator.terminal.progress import bars_on
from workers.paths import own_path

_MOST_IN_A_PART = 1_000_000_000


@app.command(epilog="Example: `maskfleet export 12 --format coco --out coco.json`")
def export(
    job: JobArgument,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="What to write.", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="File, or folder for png, yolo and parquet; with parts a folder or s3://bucket/prefix.",
            show_default=False,
        ),
    ],
    reviewed: Annotated[
        bool, typer.Option("--reviewed", help="The masks as people left them, as `review` read them.")
    ] = False,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score", help="Only predictions of this score or more; with --reviewed, for assets nobody annotated."
        ),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Only masks with this label; repeatable. `object` is no label.")
    ] = None,
    min_area: Annotated[int, typer.Option("--min-area", min=0, help="Only masks of this many pixels or more.")] = 0,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="Only assets with these keys: a text file, one key a line.")
    ] = None,
    shard_assets: Annotated[
        int | None,
        typer.Option(
            "--shard-assets",
            min=1,
            max=_MOST_IN_A_PART,
            help="In parts of this many assets; the same command goes on after a stop. parquet always does: 100000.",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", min=1, max=64, metavar="N", help="Write N parts at once.")
    ] = 1,
    images: Annotated[bool, typer.Option("--images", help="With yolo: copy the images too.")] = False,
    local_files: LocalFilesOption = None,
) -> None:
    """Write a job's masks as COCO, YOLO, PNG, Label Studio or Parquet files, streaming.

    With --reviewed: only annotated assets; with --min-score, the others too. Run `maskfleet review` first.
    """
    _check(file_format, images=images, local_files=local_files)
    if min_score is not None and not isfinite(min_score):
        fail(f"--min-score {min_score}: expected a score, such as 0.8")
    engine = deployment_engine(statement_timeout_seconds=0)
    found, counts = read_job(engine, job)
    if counts.pending:
        err.print(f"job {job} is {found.state}: {counts.pending} assets are not in the export yet", style="yellow")
    question = Question(
        file_format=file_format,
        images=images,
        local_files=None if local_files is None else document_root(local_files, found.source),
        part_assets=shard_assets,
        processes=processes,
        selection=Selection(
            labels=frozenset(label or ()),
            min_area_px=min_area,
            min_score=min_score,
            reviewed=reviewed,
            keys=None if keys is None else _read_keys(keys),
            page=file_format.page,
        ),
    )
    chosen = keys is not None or reviewed
    with engine.connect() as db, bars_on(err) as bars:
        if reviewed:
            _say_reviewed(db, job, others=min_score is not None)
        bar = bars.bar(f"job {job}", None if chosen else counts.labeled - counts.without_prompts)
        written = replace(question, progress=bar.show).write(db, found, counts, out)
    _say(out, written)


def _check(file_format: ExportFormat, *, images: bool, local_files: Path | None) -> None:
    if local_files is not None and file_format is not ExportFormat.LABEL_STUDIO:
        fail("--local-files goes with --format label-studio")
    if images and file_format is not ExportFormat.YOLO:
        fail("--images goes with --format yolo")


def _read_keys(path: Path) -> Keys:
    try:
        keys = opened.enter_context(closing(Keys(own_path(path))))
    except OSError as error:
        fail(f"--keys {path}: cannot be read ({error.strerror})")
    if next(iter(keys), None) is None:
        fail(f"--keys {path}: no line of it is a key, expected a text file in UTF-8 with a key a line")
    return keys


def _say_reviewed(db: Connection, job: int, *, others: bool) -> None:
    count = reviewed_masks.annotated_assets(db, job_id=job)
    if count == 0 and not others:
        fail(f"no annotation of job {job} has been read: `maskfleet review {called(job)} --project ID` reads them")
    err.print(f"{count:,} assets as people left them")


def _say(out: str, written: Written) -> None:
    said = f"{out}: was complete already; nothing was written" if written.was_there else f"wrote {out}"
    err.print(printable(said), markup=False)
    for note in written.notes:
        err.print(printable(note), style="yellow", markup=False)
