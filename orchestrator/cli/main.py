"""The command line. Results go to stdout, progress and logs to stderr; exit 0 done, 1 some assets failed, 2 usage or
environment, 130 interrupted."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import OperationalError

from db import annotations as reviewing
from db import jobs as queries
from db import publishing
from db.jobs import Job
from db.session import DatabaseNotReady, check_migrated, open_engine
from db.session import migrate as migrate_database
from db.settings import settings
from db.tables import JobState
from orchestrator.jobs.request import Request, select, submit_job
from orchestrator.label_studio.client import LabelStudio, LabelStudioError
from orchestrator.local.doctor import examine
from orchestrator.local.postgres import PostgresFailed
from orchestrator.local.run import INTERRUPTED, RunError
from orchestrator.local.run import run as run_embedded
from orchestrator.prompts.detectors import read_detector, read_phrases
from orchestrator.prompts.files import PromptFile, list_reports, read_prompts
from orchestrator.terminal import jobs as watching
from workers import models
from workers.detectors.detector import AskedDetector
from workers.detectors.files import DetectorKind, require_library
from workers.errors import ErrorKind, SourceError, TransientError, redact
from workers.models import ModelError
from workers.params import ParamError, parse_params
from workers.prompts import Prompt, PromptError, PromptKind, parse_prompt_params
from workers.storage.source import open_source

USAGE = 2  # the exit code of wrong usage or a missing environment; typer uses it too

app = typer.Typer(
    name="maskfleet",
    help="Masks on every image of a folder or bucket before people start work.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models, and their weights on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
label_studio_app = typer.Typer(help="Projects of Label Studio, where people correct masks.", no_args_is_help=True)
app.add_typer(label_studio_app, name="label-studio")

err = watching.stderr_console()


class ExportFormat(StrEnum):
    COCO = "coco"
    YOLO = "yolo"
    PNG = "png"
    LABEL_STUDIO = "label-studio"


class RegionForm(StrEnum):
    AUTO = "auto"
    POLYGON = "polygon"
    BRUSH = "brush"
    RECTANGLE = "rectangle"


# ------------------------------------------------------------------------------------------------------- job options

SourceArgument = Annotated[str, typer.Argument(help="A folder, or s3://bucket/prefix.", show_default=False)]
JobArgument = Annotated[int, typer.Argument(help="The job's number, as `maskfleet jobs` shows it.", show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", help="A name that `maskfleet models list` knows.")]
ParamOption = Annotated[
    list[str] | None,
    typer.Option("--param", help="name=value, with SAM's own names: points_per_side, pred_iou_thresh, …; repeatable."),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="Ask where these say: JSON lines or COCO boxes in a file or s3:// object, or a folder of YOLO labels. "
        "`grid` (every object, without prompts) is the default.",
    ),
]
DetectorOption = Annotated[
    str | None,
    typer.Option(
        "--detector",
        help="Ask where this detector finds something: a transformers checkpoint (folder or hub name) or an .onnx file "
        "in the layout of mmdeploy's RTMDet. Its classes become the labels.",
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--detector-threshold", min=0, max=1, help="Take the detector's boxes of scores above this; 0.5."),
]
ClassesOption = Annotated[
    str | None, typer.Option("--classes", help="Only these classes of the detector, separated by commas.")
]
LabelMapOption = Annotated[
    Path | None,
    typer.Option("--label-map", help="YAML or JSON: the detector's class -> your label, or null to drop it."),
]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="A phrase, or phrase:label; repeatable, each asked apart. For a model that takes text, or with "
        "--detector a Grounding DINO or OWLv2 checkpoint.",
    ),
]
DecoderOption = Annotated[
    str | None,
    typer.Option("--decoder", help="What runs SAM's decoder: torch (the default) or onnx, with onnxruntime."),
]
LabelOption = Annotated[str | None, typer.Option("--label", help="The class of every mask, for jobs with one class.")]
IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", help="Take keys that match this glob, whatever their suffix.")
]
ExcludeOption = Annotated[list[str] | None, typer.Option("--exclude", help="Leave out keys that match this glob.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Take this many assets at most.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be taken, and store nothing.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute again what an earlier job has answered.")]
NameOption = Annotated[str, typer.Option("--name", help="What people call the job.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
LocalFilesOption = Annotated[
    Path | None, typer.Option("--local-files", help="Label Studio's LOCAL_FILES_DOCUMENT_ROOT, for jobs over a folder.")
]
DevicesOption = Annotated[str, typer.Option("--devices", help="all, cpu, numbers such as 0,1, or cpu,cpu.")]


@app.command(epilog="Example: `maskfleet demo --out maskfleet-demo`")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("maskfleet-demo"),
    devices: DevicesOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Label the sample scenes that ship with maskfleet, some of them broken on purpose."""
    scenes = Path(__file__).parents[1] / "scenes"
    request = Request(source=str(scenes), model="sam_nano", name="demo")
    _run(request, out, devices, as_json, notice=_demonstration_notice())


@app.command(epilog="Example: `maskfleet run ./photos --out out --param points_per_side=16`")
def run(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", help="Where the results go.", show_default=False)],
    model: ModelOption = None,
    prompts: PromptsOption = None,
    detector: DetectorOption = None,
    detector_threshold: ThresholdOption = None,
    classes: ClassesOption = None,
    label_map: LabelMapOption = None,
    text: TextOption = None,
    param: ParamOption = None,
    decoder: DecoderOption = None,
    label: LabelOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    fresh: FreshOption = False,
    name: NameOption = "",
    devices: DevicesOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Label a folder or bucket on this machine alone, with nothing installed or started.

    Ctrl-C leaves a job that the same command resumes.
    """
    chosen = models.find(model) if model else models.largest_present()
    asked = _read_detector(detector, detector_threshold, classes, label_map)
    phrases = read_phrases(text or [])
    _require_one_way(chosen, asked, phrases, prompts, label)
    params = _with_decoder(param, decoder)
    request = _request(
        source, chosen.name, prompts, asked, phrases, params, label, include, exclude, limit, fresh, name
    )
    if dry_run:
        _dry_run(request, as_json)
        return
    _require_weights(chosen)
    if asked:
        require_library(asked.kind)
    if request.params.get("decoder") == "onnx":
        models.require_libraries("--decoder onnx", models.ONNX_LIBRARIES)
    notice = _demonstration_notice() if chosen.demonstration else None
    if notice and not model:
        err.print(notice, style="yellow")
    summary = _run(request, out, devices, as_json, notice=notice)
    if summary["assets"]["failed"]:
        raise typer.Exit(1)


@app.command(epilog="Example: `maskfleet submit s3://bucket/street --model sam_vit_h`")
def submit(
    source: SourceArgument,
    model: ModelOption = None,
    prompts: PromptsOption = None,
    detector: DetectorOption = None,
    detector_threshold: ThresholdOption = None,
    classes: ClassesOption = None,
    label_map: LabelMapOption = None,
    text: TextOption = None,
    param: ParamOption = None,
    decoder: DecoderOption = None,
    label: LabelOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    limit: LimitOption = None,
    dry_run: DryRunOption = False,
    fresh: FreshOption = False,
    name: NameOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a job on the deployment; prints its number."""
    wanted = model or settings().model
    if wanted is None:
        _fail(f"which model? --model or MASKFLEET_MODEL must name one of {', '.join(models.MODELS)}")
    chosen = models.find(wanted)
    asked = _read_detector(detector, detector_threshold, classes, label_map)
    phrases = read_phrases(text or [])
    _require_one_way(chosen, asked, phrases, prompts, label)
    params = _with_decoder(param, decoder)
    request = _request(
        source, chosen.name, prompts, asked, phrases, params, label, include, exclude, limit, fresh, name
    )
    if dry_run:
        _dry_run(request, as_json)
        return
    open_source(request.source, s3_endpoint=settings().s3_endpoint).check()
    engine = _engine()
    with engine.begin() as db:
        job = submit_job(db, request)
    if as_json:
        _print_json(watching.job_as_json(*watching.read_job(engine, job.id)))
    else:
        print(job.id)
        err.print(f"maskfleet watch {job.id}    follows it", style="dim")


@app.command(epilog="Example: `maskfleet watch 12`")
def watch(
    job: JobArgument,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Follow a job until it is over; exits 1 when assets failed."""
    engine = _engine()
    if not once:
        watching.follow_job(engine, job, console=err, refresh_seconds=1.0)
    found, counts = watching.read_job(engine, job)
    if as_json:
        _print_json(watching.job_as_json(found, counts))
    else:
        print(watching.one_line(found, counts))
    if counts.failed or found.state is JobState.FAILED:
        raise typer.Exit(1)


@app.command(epilog="Example: `maskfleet jobs --limit 5`")
def jobs(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many of the newest.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the newest jobs."""
    engine = _engine()
    with engine.begin() as db:
        found = [(job, queries.count_job(db, job_id=job.id)) for job in queries.list_jobs(db, limit=limit)]
    if as_json:
        _print_json([watching.job_as_json(job, counts) for job, counts in found])
    else:
        Console().print(watching.jobs_table(found))


@app.command(epilog="Example: `maskfleet show 12 --failed`")
def show(
    job: JobArgument,
    failed: Annotated[bool, typer.Option("--failed", help="List the failed assets with their reasons.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one job: how far it is, what was skipped, what failed and why."""
    engine = _engine()
    found, counts = watching.read_job(engine, job)
    with engine.begin() as db:
        failures = queries.failed_assets(db, job_id=job) if failed else []
        published = publishing.published(db, job_id=job)
        prompts = watching.prompts_report(db, found)
        detector = watching.detector_report(db, found)
        phrases = watching.text_report(db, found)
        busy = queries.busy_share(db, job_id=job)
    if as_json:
        listed = [{"key": f.key, "error_kind": f.error_kind, "error": f.error} for f in failures]
        places = [dataclasses.asdict(place) for place in published]
        shown: dict[str, Any] = {"prompts": prompts, "detector": detector, "text": phrases, "published": places}
        shown["model_busy_share"] = busy
        _print_json(watching.job_as_json(found, counts) | shown | ({"failed": listed} if failed else {}))
    else:
        watching.print_job(Console(), found, counts, failures, published, prompts, detector, phrases, busy)


@app.command(epilog="Example: `maskfleet cancel 12`")
def cancel(job: JobArgument) -> None:
    """Stop a job; what is labeled stays, and `resume` goes on."""
    engine = _engine()
    with engine.begin() as db:
        done = queries.cancel_job(db, job_id=job)
    found, _ = watching.read_job(engine, job)
    if not done:
        _fail(f"job {job} is {found.state}: only a listing or running job can be cancelled")
    err.print(f"job {job} is cancelled; maskfleet resume {job} goes on")


@app.command(epilog="Example: `maskfleet resume 12`")
def resume(job: JobArgument) -> None:
    """Let a cancelled or failed job go on where it stopped."""
    engine = _engine()
    with engine.begin() as db:
        done = queries.resume_job(db, job_id=job)
    found, _ = watching.read_job(engine, job)
    if not done:
        _fail(f"job {job} is {found.state}: only a cancelled or failed job can be resumed")
    err.print(f"job {job} goes on; maskfleet watch {job} follows it")


@app.command(epilog="Example: `maskfleet retry 12 --kind not_found`")
def retry(
    job: JobArgument,
    kind: Annotated[ErrorKind | None, typer.Option("--kind", help="Only assets that failed for this reason.")] = None,
) -> None:
    """Try a job's failed assets again."""
    engine = _engine()
    watching.read_job(engine, job)
    with engine.begin() as db:
        count = queries.retry_failed(db, job_id=job, error_kind=kind)
    err.print(f"{count} assets of job {job} run again" if count else f"job {job} has no such failed assets")


@app.command(epilog="Example: `maskfleet export 12 --format coco --out coco.json`")
def export(
    job: JobArgument,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="What to write.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="File, or folder for png and yolo.", show_default=False)],
    reviewed: Annotated[
        bool, typer.Option("--reviewed", help="What people made of them, as `review` read it.")
    ] = False,
    min_score: Annotated[
        float | None,
        typer.Option(
            "--min-score", help="Only predictions of this score; with --reviewed, for assets nobody annotated."
        ),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="With yolo: copy the images too.")] = False,
) -> None:
    """Write a job's masks as COCO, YOLO datasets, PNG files or Label Studio tasks, streaming.

    With --reviewed: of annotated assets alone, and with --min-score of the others too. Run `maskfleet review` before.
    """
    from orchestrator.export.coco import export_coco, export_label_studio
    from orchestrator.export.png import export_png
    from orchestrator.export.yolo import export_yolo

    write: dict[ExportFormat, Callable[..., Any]] = {
        ExportFormat.COCO: export_coco,
        ExportFormat.YOLO: functools.partial(export_yolo, images=images),
        ExportFormat.PNG: export_png,
        ExportFormat.LABEL_STUDIO: export_label_studio,
    }
    if images and file_format is not ExportFormat.YOLO:
        _fail("--images goes with --format yolo")
    engine = _engine(statement_timeout_seconds=0)
    found, counts = watching.read_job(engine, job)
    if counts.pending:
        err.print(f"job {job} is {found.state}: {counts.pending} assets are not in the export yet", style="yellow")
    with engine.connect() as db:
        write[file_format](db, found, out, _exported(db, job, reviewed=reviewed, min_score=min_score))
    err.print(f"wrote {out}")


def _exported(
    db: Connection, job: int, *, reviewed: bool, min_score: float | None
) -> Iterator[queries.LabeledAsset] | None:
    """What is exported instead of the labeled assets as they are."""
    if not reviewed:
        return None if min_score is None else reviewing.scored_assets(db, job_id=job, min_score=min_score)
    count = reviewing.annotated_assets(db, job_id=job)
    if count == 0 and min_score is None:
        _fail(f"no annotation of job {job} has been read: `maskfleet review {job} --project ID` reads them")
    err.print(f"{count:,} assets as people left them")
    return reviewing.reviewed_assets(db, job_id=job, min_score=min_score)


@app.command(epilog="Example: `maskfleet publish 12 --project 3`")
def publish(
    job: Annotated[int | None, typer.Argument(help="The job's number; none with --follow: all.")] = None,
    project: Annotated[int | None, typer.Option("--project", help="Label Studio's project, by number.")] = None,
    as_: Annotated[RegionForm, typer.Option("--as", help="How masks are drawn; auto: polygons, else brush.")] = (
        RegionForm.AUTO
    ),
    follow: Annotated[bool, typer.Option("--follow", help="Keep up until the job is over.")] = False,
    max_regions: Annotated[int, typer.Option("--max-regions", min=1, help="Shown at most on a task.")] = 150,
    local_files: LocalFilesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a job's assets into a Label Studio project, with their masks as predictions.

    Run it again at any time: what is there is not sent twice, what was deleted there is put back. Exits 1 when the
    project could not take some assets.
    """
    from orchestrator.label_studio import publish as publisher

    _log_to_stderr()
    number = _project_number(project)
    if job is None and not follow:
        _fail("which job? `maskfleet jobs` lists them; without one, --follow keeps up with all")
    engine = _engine()
    total = watching.read_job(engine, job)[1].labeled if job is not None else None
    options = publisher.Options(
        as_=as_.value, max_regions=max_regions, local_files=str(local_files.absolute()) if local_files else None
    )
    documents: dict[int, dict[str, Any]] = {}
    with (
        _label_studio() as client,
        Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            console=err,
            disable=not err.is_terminal,
        ) as bars,
    ):
        bar = bars.add_task(f"project {number}", total=total)

        def landed(job_of: Job, report: publisher.Report) -> None:
            documents[job_of.id] = watching.report_as_json(job_of, client.url, number, report)
            watching.print_report(err, job_of, report)

        if follow:
            publisher.follow(
                engine,
                client,
                number,
                options,
                job_id=job,
                stop=_stop_on_signals(),
                landed=landed,
                progress=lambda n: bars.advance(bar, n),
            )
        else:
            found, _ = watching.read_job(engine, job or 0)
            report = publisher.publish_job(
                engine,
                client,
                found,
                number,
                options,
                progress=lambda n: bars.advance(bar, n),
                waiting=lambda: bars.update(bar, description=f"project {number}: another publisher is at work"),
            )
            landed(found, report)
    if as_json:
        _print_json([*documents.values()] if job is None else documents.get(job))
    if any(document["refused"] for document in documents.values()):
        raise typer.Exit(1)


@app.command(epilog="Example: `maskfleet review 12 --project 3 --html review.html`")
def review(
    job: JobArgument,
    project: Annotated[int | None, typer.Option("--project", help="Label Studio's project, by number.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots and the worst overlays.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep reading until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", min=1, help="Seconds between looks, with --follow.")] = 30,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="HOST:PORT", help="With --follow: look when Label Studio's webhook calls."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read what people made of a job's masks in Label Studio, and count what they kept, edited, deleted and added.

    `maskfleet export --reviewed` writes what was read last. With --follow and --json there is one document a line.
    """
    from orchestrator.label_studio.wake import wake_on_webhook

    number = _project_number(project)
    engine = _engine(statement_timeout_seconds=0)
    found, _ = watching.read_job(engine, job)
    called = threading.Event()
    with ExitStack() as stack:
        client = stack.enter_context(_label_studio())
        if listen is not None:
            if not follow:
                _fail("--listen only wakes --follow: give both")
            place = stack.enter_context(
                wake_on_webhook(*_listen_address(listen), secret=_webhook_secret(), event=called)
            )
            err.print(f"webhooks may call http://{place[0]}:{place[1]}/", style="dim", highlight=False)
        try:
            while True:
                called.clear()
                _review_once(engine, client, found, number, html, as_json=as_json, in_a_line=follow)
                if not follow:
                    return
                called.wait(every)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _review_once(
    engine: Engine,
    client: LabelStudio,
    job: queries.Job,
    project: int,
    html: Path | None,
    *,
    as_json: bool,
    in_a_line: bool,
) -> None:
    from orchestrator.label_studio.review import pull, read_review
    from orchestrator.pages.review import write_review

    with err.status("reading annotations") as status:
        pull(engine, client, project, progress=lambda n: status.update(f"reading annotations: {n:,} tasks"))
    read = read_review(engine, job, publishing.Place(client.url, project))
    if as_json and in_a_line:
        print(json.dumps(read.as_json(), ensure_ascii=False), flush=True)
    elif as_json:
        _print_json(read.as_json())
    else:
        watching.print_review(Console(), read)
    if html is not None:
        write_review(engine, read, html)
        err.print(f"wrote {html}")


@app.command(epilog="Example: `maskfleet worker --devices 0,1`")
def worker(
    devices: DevicesOption = "all",
    parent: Annotated[int | None, typer.Option("--parent", hidden=True)] = None,
) -> None:
    """Run one worker process on each CUDA device (or the CPU), restarting dead ones; SIGTERM drains them."""
    from workers.running.devices import DeviceError, find_devices, serve
    from workers.running.tasks import top_up

    _log_to_stderr()
    _require_broker()
    engine = _engine()

    def keep_going() -> None:
        try:
            top_up(engine)
        except OperationalError as error:
            logging.getLogger(__name__).warning("Postgres did not answer: %s", redact(str(error)))

    try:
        found = find_devices(devices)
    except DeviceError as error:
        _fail(str(error))
    raise typer.Exit(serve(found, drain_seconds=settings().drain_seconds, top_up=keep_going, parent_pid=parent))


@app.command(epilog="Example: `maskfleet dispatch`")
def dispatch() -> None:
    """List new jobs, keep the queue topped up, take back what dead workers held."""
    from orchestrator.jobs.dispatch import dispatch as run_dispatcher

    _log_to_stderr()
    _require_broker()
    engine = _engine()
    run_dispatcher(engine, _stop_on_signals())


@app.command(epilog="Example: `maskfleet migrate`")
def migrate() -> None:
    """Bring the database's tables to this version; safe to run twice."""
    migrate_database(_database_url())
    err.print("the database is up to date")


@app.command(epilog="Example: `maskfleet doctor`")
def doctor(as_json: JsonOption = False) -> None:
    """Say in one screen what is reachable, what is missing, and how to mend it."""
    findings = examine()
    if as_json:
        _print_json([{"what": f.what, "ok": f.ok, "found": f.found, "remedy": f.remedy} for f in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for finding in findings:
            mark = {True: "[green]ok[/green]", False: "[red]missing[/red]", None: "[dim]not set[/dim]"}[finding.ok]
            table.add_row(mark, f"[bold]{finding.what}[/bold]", finding.found)
            if finding.remedy:
                table.add_row("", "", f"[dim]{finding.remedy}[/dim]")
        Console().print(table)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(USAGE)


# ------------------------------------------------------------------------------------------------------------ models


@models_app.command("list", epilog="Example: `maskfleet models list`")
def models_list(as_json: JsonOption = False) -> None:
    """List the models: what they take, how large they are, whether their weights are here."""
    if as_json:
        _print_json(
            [
                {
                    "name": spec.name,
                    "family": spec.family,
                    "parameters": spec.parameter_count,
                    "prompts": list(spec.prompts),
                    "decoders": list(spec.decoders),
                    "missing_libraries": models.missing_libraries(spec.libraries),
                    "licence": spec.licence,
                    "present": models.is_present(spec),
                    "path": str(models.weights_path(spec)),
                }
                for spec in models.MODELS.values()
            ]
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "family", "parameters", "prompts", "licence", "weights"):
        table.add_column(column)
    for spec in models.MODELS.values():
        weights = "present" if models.is_present(spec) else "absent"
        if missing := models.missing_libraries(spec.libraries):
            weights += f", needs {' and '.join(missing)}"
        size = f"{spec.parameter_count / 1e6:.1f} M"
        table.add_row(spec.name, spec.family, size, ", ".join(spec.prompts), spec.licence, weights)
    Console().print(table)
    err.print("maskfleet models pull NAME    brings absent weights", style="dim")


ModelArgument = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]


@models_app.command("pull", epilog="Example: `maskfleet models pull sam_vit_b`")
def models_pull(name: ModelArgument) -> None:
    """Download a model's weights; goes on where an earlier download stopped, and checks the sha256."""
    from workers.models.weights import pull

    spec = models.find(name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task(name, total=spec.size_bytes)
        path = pull(spec, lambda done, total: progress.update(bar, completed=done, total=total))
    print(path)


@models_app.command("verify", epilog="Example: `maskfleet models verify sam_vit_b`")
def models_verify(name: ModelArgument) -> None:
    """Check a model's weights on this machine against their pinned size and sha256."""
    from workers.models.weights import remedy, verify

    spec = models.find(name)
    verified = verify(spec)
    print(f"{verified.path}: {verified.found}")
    if not verified.ok:
        _fail(remedy(spec))


@models_app.command("export-onnx", epilog="Example: `maskfleet models export-onnx sam_vit_b`")
def models_export_onnx(
    name: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where it goes; default: the weights' folder, for `--decoder onnx`.")
    ] = None,
) -> None:
    """Write SAM's prompt encoder and mask decoder as one ONNX file, for `--decoder onnx` and for other programs."""
    spec = models.find(name)
    models.require_decoder(spec, "onnx")
    models.require_libraries("export-onnx", models.ONNX_LIBRARIES)
    _require_weights(spec)
    # In a process of its own: it needs torch, which no command loads.
    command = [sys.executable, "-P", "-m", "workers.models.onnx_export", name, *([] if out is None else [str(out)])]
    if subprocess.run(command, check=False).returncode:
        raise typer.Exit(USAGE)


# ------------------------------------------------------------------------------------------------------ label studio


@label_studio_app.command(
    "setup", epilog='Example: `maskfleet label-studio setup --title "Street" --job 12 --label car --label "red bus"`'
)
def label_studio_setup(
    project: Annotated[int | None, typer.Option("--project", help="An existing project, by number.")] = None,
    title: Annotated[str, typer.Option("--title", help="Of the project to make, or to take when it is there.")] = "",
    job: Annotated[int | None, typer.Option("--job", help="Take labels and images from this job.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="A label to offer; repeatable.")] = None,
    smart: Annotated[bool, typer.Option("--smart", help="Add smart key points and rectangles.")] = False,
    update_config: Annotated[
        bool, typer.Option("--update-config", help="Add to an existing project's labeling config what it lacks.")
    ] = False,
    local_files: Annotated[
        bool, typer.Option("--local-files", help="Let Label Studio serve the job's folder, which it must see.")
    ] = False,
    send_keys: Annotated[
        bool, typer.Option("--send-keys", help="Store our S3 keys in the project; else the server's own are used.")
    ] = False,
    presign: Annotated[
        bool, typer.Option("--presign", help="Browsers fetch from S3 themselves; it needs CORS.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a project ready for `publish`, or check one: labels and tools, the images' storage, a tab by score.

    An existing labeling config is left alone: what it lacks is said, with the lines to add, and the exit status is 2.
    """
    from orchestrator.label_studio.setup import Wanted, make_project, set_up_project

    labels, source = list(label or []), None
    if job is not None:
        engine = _engine()
        source = watching.read_job(engine, job)[0].source
        with engine.begin() as db:
            labels += [name for name in queries.labels_of(db, job_id=job) if name not in labels]
    if project is None and not title:
        _fail("which project? --project NUMBER, or --title of the one to make")
    wanted = Wanted(
        labels=labels,
        smart=smart,
        update_config=update_config,
        source=source,
        local_files=local_files,
        send_keys=send_keys,
        presign=presign,
    )
    with _label_studio() as client:
        if project is not None:
            set_up = set_up_project(client, client.get_project(project), wanted)
        else:
            set_up = make_project(client, title, wanted)
        url = f"{client.url}/projects/{set_up.project.id}/data"
    if as_json:
        _print_json(
            {"project": set_up.project.id, "url": url, "done": set_up.done, "missing_config_lines": set_up.missing}
        )
    else:
        print(set_up.project.id)
        for line in [*set_up.done, url]:
            err.print(line, markup=False, highlight=False)
    if set_up.missing:
        lines = "\n".join(set_up.missing)
        _fail(f"the labeling config lacks these lines; add them, or run again with --update-config:\n{lines}")


# ----------------------------------------------------------------------------------------------------------- helpers


def _project_number(project: int | None) -> int:
    number = project or settings().label_studio_project
    if number is None:
        _fail("which project? --project or MASKFLEET_LABEL_STUDIO_PROJECT; `maskfleet label-studio setup` makes one")
    return number


def _listen_address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        _fail(f"--listen {listen!r}: expected a host and a port, such as 127.0.0.1:8090")
    return host or "127.0.0.1", int(port)


def _webhook_secret() -> str:
    secret = settings().webhook_secret
    if secret is None:
        _fail("set MASKFLEET_WEBHOOK_SECRET, and give Label Studio's webhook the header X-Maskfleet-Secret with it")
    return secret.get_secret_value()


def _label_studio() -> LabelStudio:
    """The deployment's Label Studio, once it is reached and takes the token."""
    url, key = settings().label_studio_url, settings().label_studio_api_key
    if url is None or key is None:
        _fail(
            "set MASKFLEET_LABEL_STUDIO_URL, such as http://host:8080, and MASKFLEET_LABEL_STUDIO_API_KEY, a token "
            "from Account & Settings there"
        )
    client = LabelStudio(url, key.get_secret_value())
    client.check()
    return client


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _request(
    source: str,
    model: str,
    prompts: str | None,
    detector: AskedDetector | None,
    text: list[Prompt],
    param: list[str] | None,
    label: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    limit: int | None,
    fresh: bool,
    name: str,
) -> Request:
    texts = {}
    for given in param or []:
        key, separator, value = given.partition("=")
        if not separator:
            raise ParamError(f"--param {given!r}: expected name=value, such as points_per_side=16")
        texts[key.strip()] = value.strip()
    where = source if "://" in source else str(Path(source).expanduser().absolute())
    asked_by_grid = prompts is None or prompts == "grid"
    is_automatic = asked_by_grid and not (detector or text)
    params = parse_params(texts) if is_automatic else parse_prompt_params(texts)
    models.require_decoder(models.find(model), params.get("decoder", "torch"))
    return Request(
        source=where,
        model=model,
        name=name,
        prompts=None if asked_by_grid or prompts is None else _read_prompts(prompts, where, model, detector),
        detector=detector,
        text=text,
        params=params,
        label=label,
        include=include or (),
        exclude=exclude or (),
        limit=limit,
        fresh=fresh,
    )


def _read_detector(
    name: str | None,
    threshold: float | None,
    classes: str | None,
    label_map: Path | None,
) -> AskedDetector | None:
    if name is None:
        if threshold is not None or classes or label_map:
            _fail("--detector-threshold, --classes and --label-map go with --detector")
        return None
    with err.status(f"reading {watching.printable(name)}"):
        return read_detector(name, threshold=threshold, classes=classes, label_map=label_map)


def _require_one_way(
    spec: models.ModelSpec,
    detector: AskedDetector | None,
    text: list[Prompt],
    prompts: str | None,
    label: str | None,
) -> None:
    """Options that mean nothing together are refused."""
    prompts = None if prompts == "grid" else prompts
    if not (spec.automatic or detector or text or prompts):
        _fail(f"{spec.name} makes no masks of everything: tell it what to look for with --text or --prompts")
    if detector and "box" not in spec.prompts:
        _fail(f"{spec.name} takes no boxes of a detector, only {' and '.join(spec.prompts)}")
    takes_phrases = detector is not None and detector.kind is DetectorKind.OPEN_VOCABULARY
    if text and prompts is not None:
        _fail("--text and --prompts both say where to look: a prompt line of the file may hold a text")
    if takes_phrases and not text and prompts is None:
        _fail('this detector looks for phrases: --text "red bus", or --prompts with texts')
    if detector and not takes_phrases and (text or prompts is not None):
        other = "--text" if text else "--prompts"
        _fail(
            f"--detector and {other} both say where to look: give one of them; text needs a detector that takes phrases"
        )
    if text and not takes_phrases and "text" not in spec.prompts:
        _fail(
            f"{spec.name} takes no text: choose a model that does (maskfleet models list), or give --detector a "
            "Grounding DINO or OWLv2 checkpoint"
        )
    if label is not None and (text or (detector and not takes_phrases)):
        _fail("a class or phrase is each mask's label: --label-map or --text phrase:label renames it, not --label")


def _with_decoder(param: list[str] | None, decoder: str | None) -> list[str]:
    """`--decoder X` is `--param decoder=X`."""
    return [*(param or []), *([] if decoder is None else [f"decoder={decoder}"])]


def _read_prompts(address: str, source: str, model: str, detector: AskedDetector | None) -> PromptFile:
    """Read a prompt file and say what in it cannot be used."""
    with err.status(f"reading {watching.printable(redact(address))}"):
        endpoint = settings().s3_endpoint
        besides: tuple[PromptKind, ...] = ("text",) if detector else ()
        found = read_prompts(address, source=source, spec=models.find(model), s3_endpoint=endpoint, besides=besides)
    for line in list_reports(found.bad, found.bad_count):
        err.print(watching.printable(line), style="yellow", markup=False)
    return found


def _run(request: Request, out: Path, devices: str, as_json: bool, *, notice: str | None) -> dict[str, Any]:
    try:
        outputs = run_embedded(request, out=out, devices=devices, console=err, notice=notice)
    except KeyboardInterrupt:
        err.print("\nstopped; the same command goes on where it was")
        raise typer.Exit(INTERRUPTED) from None
    assets, prompts, detector, phrases = (outputs.summary[name] for name in ("assets", "prompts", "detector", "text"))
    rows = {
        **(watching.prompt_rows(prompts) if prompts else {}),
        **(watching.detector_rows(detector) if detector else {}),
        **(watching.text_rows(phrases) if phrases else {}),
    }
    for what, line in rows.items():
        if line:
            err.print(f"{what}: {watching.printable(line)}", style="dim", markup=False)
    if as_json:
        _print_json(outputs.summary)
    else:
        print(
            f"{assets['listed']} assets: {assets['labeled']} labeled with {outputs.summary['masks']} masks, "
            f"{assets['failed']} failed, in {outputs.summary['seconds']:.1f} s"
        )
        print(f"gallery: {outputs.gallery}")
    if not assets["listed"]:
        err.print(
            f"no images under {request.source}: skipped {outputs.summary['skipped'] or 'nothing'}", style="yellow"
        )
    return outputs.summary


def _dry_run(request: Request, as_json: bool) -> None:
    """List with the job's filters and print how many, how many bytes, and a sample."""
    source = open_source(request.source, s3_endpoint=settings().s3_endpoint)
    source.check()
    count, size_bytes, sample, skipped = 0, 0, list[str](), dict[str, int]()
    with err.status("listing"):
        for page in select(source, asked=request.asked(), after=None, found=0):
            count += len(page.assets)
            size_bytes += sum(asset.size_bytes for asset in page.assets)
            sample += [asset.key for asset in page.assets[: 10 - len(sample)]]
            for reason, n in page.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + n
    if as_json:
        version = request.model_version()
        _print_json(
            {"assets": count, "bytes": size_bytes, "sample": sample, "skipped": skipped, "model_version": version}
        )
        return
    print(f"{count:,} assets, {size_bytes:,} bytes; nothing was stored")
    for reason, n in sorted(skipped.items()):
        print(f"skipped {n:,}: {reason}")
    for key in sample:
        print(f"  {watching.printable(key)}")


def _demonstration_notice() -> str:
    return (
        "sam_nano is a demonstration model of 3 million parameters, trained on drawn scenes only. "
        "For real work: maskfleet models pull sam_vit_b"
    )


def _engine(*, statement_timeout_seconds: float = 60) -> Engine:
    engine = open_engine(_database_url(), statement_timeout_seconds=statement_timeout_seconds)
    check_migrated(engine)
    return engine


def _database_url() -> str:
    url = settings().database_url
    if url is None:
        _fail("MASKFLEET_DATABASE_URL is not set: name the deployment's PostgreSQL, or use `maskfleet run`")
    return url.get_secret_value()


def _require_weights(spec: models.ModelSpec) -> None:
    """A run's worker is this machine's own: it would wait for weights and libraries in vain."""
    from workers.models.weights import remedy, verify

    models.require_libraries(spec.name, spec.libraries)
    verified = verify(spec)
    if not verified.ok:
        _fail(f"{spec.name}: {verified.path} is {verified.found}; {remedy(spec)}")


def _require_broker() -> None:
    if settings().broker_url is None:
        _fail("MASKFLEET_BROKER_URL is not set: name the deployment's Redis, such as redis://:password@host:6379/0")


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


def _print_json(document: object) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def _fail(message: str) -> NoReturn:
    err.print(f"maskfleet: {message}", style="red", markup=False)
    raise typer.Exit(USAGE)


_FAILURES = (
    SourceError,
    PromptError,
    TransientError,
    ParamError,
    ModelError,
    DatabaseNotReady,
    RunError,
    PostgresFailed,
    LabelStudioError,
)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """What an operator can mend is said in a line; anything else is a fault of ours and shows its trace."""
    try:
        yield
    except _FAILURES as error:
        message = str(error)
    except LookupError as error:
        if type(error) is not LookupError:
            raise
        message = str(error)
    except OperationalError as error:
        message = f"Postgres did not answer: {error.orig}; `maskfleet doctor` says more"
    except BrokenPipeError:
        os._exit(0)
    else:
        return
    err.print(f"maskfleet: {redact(message)}", style="red", markup=False)
    sys.exit(USAGE)


def main() -> None:
    with _errors_as_messages():
        app()


if __name__ == "__main__":
    main()
