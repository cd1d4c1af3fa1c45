"""`demo`, `run`, `submit`: make a job here, or on the deployment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from db import processes
from db.queue import USUAL_PRIORITY
from db.settings import settings
from db.states import JobState
from orchestrator.cli.app import JsonOption, app, deployment_engine, err, fail, print_json
from orchestrator.cli.options import (
    DevicesOption,
    JobOptions,
    LocalFilesOption,
    PriorityOption,
    SourceArgument,
    takes_job_options,
)
from orchestrator.cli.request import (
    demonstration_notice,
    document_root,
    job_request,
    listed,
    print_dry_run,
    print_survey,
    require_embedding_store,
    require_source,
    require_weights,
)
from orchestrator.jobs.activity import why_nobody_can
from orchestrator.jobs.findings import nothing_found
from orchestrator.jobs.request import Request, submit_job
from orchestrator.local.interrupts import INTERRUPTED
from orchestrator.local.run import run as run_embedded
from orchestrator.terminal.console import printable
from orchestrator.terminal.jobs import job_as_json, read_job
from orchestrator.terminal.rows import detector_rows, prompt_rows, text_rows
from workers.detectors.files import require_library
from workers.models.loading import ONNX_LIBRARIES, require_libraries
from workers.models.registry import MODELS, find_model, largest_present
from workers.paths import own_path

_SURVEY_SECONDS = 10.0  # for so long `submit` lists its source, to print what it found


@app.command(epilog="Example: `maskfleet demo --out maskfleet-demo`")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the results go.")] = Path("maskfleet-demo"),
    devices: DevicesOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Label the sample scenes that come with maskfleet. Some of them are broken on purpose."""
    scenes = Path(__file__).parents[1] / "scenes"
    request = Request(source=str(scenes), model="sam_nano", name="demo")
    _run_and_report(request, out, devices, as_json, notice=demonstration_notice())


@app.command(epilog="Example: `maskfleet run ./photos --out out --param points_per_side=16`")
@takes_job_options
def run(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("--out", help="Where the results go.", show_default=False)],
    options: JobOptions,
    devices: DevicesOption = "auto",
    local_files: LocalFilesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label a folder or bucket on this machine alone, with nothing installed or started.

    After Ctrl-C, the same command resumes the job. Label Studio shows the images of label-studio.json, but those of a
    folder only with --local-files.
    """
    spec = find_model(options.model) if options.model else largest_present()
    request = job_request(source, spec, options)
    if options.dry_run:
        print_dry_run(request, as_json)
        return
    root = document_root(local_files, request.source)
    require_weights(spec)
    if request.detector:
        require_library(request.detector.kind)
    if request.classify:
        require_libraries("--classify", ("transformers",))
    if request.params.get("decoder") == "onnx":
        require_libraries("--decoder onnx", ONNX_LIBRARIES)
    notice = demonstration_notice() if spec.demonstration else None
    if notice and not options.model:
        err.print(notice, style="yellow")
    summary = _run_and_report(request, out, devices, as_json, notice=notice, local_files=root)
    for note in summary["notes"]:
        err.print(printable(note), style="dim", markup=False)
    if not _is_all_done(summary, request.source):
        raise typer.Exit(1)


@app.command(epilog="Example: `maskfleet submit s3://bucket/street --model sam_vit_h`")
@takes_job_options
def submit(
    source: SourceArgument,
    options: JobOptions,
    priority: PriorityOption = USUAL_PRIORITY,
    as_json: JsonOption = False,
) -> None:
    """Make a job on the deployment, and print its number."""
    wanted = options.model or settings().model
    if wanted is None:
        fail(f"which model? --model or MASKFLEET_MODEL must name one of {', '.join(MODELS)}")
    request = replace(job_request(source, find_model(wanted), options), priority=priority)
    if options.dry_run:
        print_dry_run(request, as_json)
        return
    if request.keep_embeddings is not None:
        require_embedding_store()
    require_source(request)
    engine = deployment_engine()
    with engine.begin() as db:
        job = submit_job(db, request)
        obstacle = why_nobody_can(processes.live(db), request.model)
    if obstacle:
        err.print(obstacle, style="yellow", markup=False)
    if as_json:
        print_json(job_as_json(*read_job(engine, job.id)))
    else:
        print(job.id)
        err.print(f"maskfleet watch {job.id}    follows it", style="dim")
    found = listed(request, seconds=_SURVEY_SECONDS)
    if not found.complete:
        err.print(f"the source is large; maskfleet show {job.id}    says what was found when it is listed", style="dim")
    print_survey(request, found)


def _run_and_report(
    request: Request, out: Path, devices: str, as_json: bool, *, notice: str | None, local_files: str | None = None
) -> dict[str, Any]:
    out = own_path(out)
    try:
        outputs = run_embedded(request, out=out, devices=devices, console=err, notice=notice, local_files=local_files)
    except KeyboardInterrupt:
        err.print("\nstopped; the same command goes on where it was")
        raise typer.Exit(INTERRUPTED) from None
    assets, prompts, detector, phrases = (outputs.summary[name] for name in ("assets", "prompts", "detector", "text"))
    rows = {
        **(prompt_rows(prompts) if prompts else {}),
        **(detector_rows(detector) if detector else {}),
        **(text_rows(phrases) if phrases else {}),
    }
    for what, line in rows.items():
        if line:
            err.print(f"{what}: {printable(line)}", style="dim", markup=False)
    if as_json:
        print_json(outputs.summary)
    else:
        left = f", {outputs.summary['pending']} left" if outputs.summary["pending"] else ""
        print(
            f"{assets['listed']} assets: {assets['labeled']} labeled with {outputs.summary['masks']} masks, "
            f"{assets['failed']} failed{left}, in {outputs.summary['seconds']:.1f} s"
        )
        print(f"gallery: {outputs.gallery}")
        print(f"with it in {out}: coco.json, label-studio.json, summary.json")
    return outputs.summary


def _is_all_done(summary: dict[str, Any], source: str) -> bool:
    """Whether there was something to do, and nothing failed or is left. If not, print what is left or was missing."""
    if summary["state"] == JobState.CANCELLED:
        left = f"{summary['pending']:,} assets are left"
        err.print(f"the job was cancelled, and {left}; the same command goes on where it was", style="red")
        return False
    why = nothing_found(source, summary["assets"]["listed"], summary["skipped"], _matched(summary))
    if why:
        err.print(f"nothing to do: {printable(why)}", style="red", markup=False)
    return not (why or summary["assets"]["failed"])


def _matched(summary: dict[str, Any]) -> dict[str, Any] | None:
    prompts: dict[str, Any] | None = summary["prompts"]
    return prompts if prompts and prompts["by_rule"] is not None else None
