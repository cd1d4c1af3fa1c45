"""`tune`: teaches a model's mask decoder what reviewers corrected, and says whether it became better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from db.publishing import LsProject
from db.settings import settings
from orchestrator.cli.app import JobArgument, JsonOption, app, deployment_engine, err, print_json
from orchestrator.cli.label_studio import connect_label_studio, project_number
from orchestrator.cli.root import opened
from orchestrator.export.files import alone_in, replacing
from orchestrator.local.interrupts import INTERRUPTED
from orchestrator.terminal.console import stdout_console
from orchestrator.terminal.jobs import read_job
from orchestrator.terminal.progress import SECONDS, Bar, Bars, bars_on
from orchestrator.tuning.install import install, require_free_name
from orchestrator.tuning.lessons import make_plan
from orchestrator.tuning.process import Said, TuneStopped, train_and_judge
from orchestrator.tuning.verdict import (
    NAMES,
    Judged,
    Measured,
    Verdict,
    decide,
    measured_as_json,
    read_judged,
    said_of_defaults,
)
from workers.paths import own_path
from workers.tuning.outcome import JUDGED_NAME
from workers.tuning.plan import Plan, TuneError, forget_untrained, read_plan, write_plan

_STATE = ".maskfleet"
_DECODER = "decoder.safetensors"
# Each stage of a tuning: what is said of it, and what is counted.
_STAGES = {
    "images": ("reading images", "image"),
    "copies": ("encoding turned copies", "image"),
    "train": ("training", SECONDS),
    "thresholds": ("choosing thresholds", "image"),
    "verdict": ("judging", "image"),
}


@app.command(epilog="Example: `maskfleet tune 12 --project 3 --name our_sam --minutes 30`")
def tune(
    job: JobArgument,
    name: Annotated[str, typer.Option("--name", help="The new model's name.", show_default=False)],
    project: Annotated[int | None, typer.Option("--project", help="Label Studio's project, by number.")] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="How long to train.")] = 15,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws other prompts in another order.")] = 1,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:1; auto takes CUDA if it is there.")
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of tune.json, the page and the checkpoint; default: tune-NAME.")
    ] = None,
    keep_anyway: Annotated[bool, typer.Option("--keep-anyway", help="Keep the model whatever the verdict.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Teach the mask decoder of a job's model what people corrected in Label Studio. Only its decoder changes.

    About a fifth of the annotated images is not used to teach. On it the decoder is judged before and after. NAME
    becomes a model only when it is better. Exits 1 when it is not. After Ctrl-C the same command goes on.
    """
    folder = own_path(out or f"tune-{name}")
    engine = deployment_engine(statement_timeout_seconds=0)
    found, _ = read_job(engine, job)
    require_free_name(name)
    plan = read_plan(folder / _STATE)
    if plan is None:
        number = project_number(project)
        with connect_label_studio() as client:
            ls_project, config = LsProject(client.url, number), client.get_project(number).label_config
        plan = make_plan(engine, found, ls_project, config=config, name=name, seed=seed, settings=settings())
        write_plan(plan, folder / _STATE)
    else:
        _require_same(plan, folder, job=job, name=name, seed=seed, project=project)
        err.print(f"going on with the tuning in {folder}", style="dim", markup=False)
    taken = TuneError(f"{folder}: another tuning writes there now; wait for it, or name another --out")
    opened.enter_context(alone_in(folder, taken))
    _train(plan, folder, minutes=minutes, device=device)
    judged = read_judged(folder / _STATE / JUDGED_NAME)
    verdict = decide(judged.assets)
    is_kept = verdict.is_better or keep_anyway
    model = install(plan, folder / _STATE / _DECODER, judged.rest["defaults"]) if is_kept else None
    document = _document(plan, judged, verdict, model.sha256 if model else None)
    _write(folder, document, plan, judged, verdict)
    if as_json:
        print_json(document)
    else:
        _print(plan, judged, verdict, folder, is_kept=is_kept)
    if not is_kept:
        raise typer.Exit(1)


def _require_same(plan: Plan, folder: Path, *, job: int, name: str, seed: int, project: int | None) -> None:
    asked = {"job": job, "name": name, "seed": seed, "project": project or plan.project}
    for what, value in asked.items():
        if (begun := getattr(plan, what)) != value:
            raise TuneError(
                f"{folder} has a tuning with {what} {begun}, not {value}: name another --out, or remove the folder"
            )


def _train(plan: Plan, folder: Path, *, minutes: float, device: str) -> None:
    try:
        with bars_on(err) as bars:
            train_and_judge(folder / _STATE, seconds=60 * minutes, device=device, listen=_listener(bars))
    except TuneStopped:
        err.print(
            f"stopped; what was done is stored in {folder}. The same command goes on; remove the folder to begin again",
            style="yellow",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED) from None
    except TuneError:
        forget_untrained(folder / _STATE)  # what was wrong with it is put right by other annotations, or another job
        raise


def _listener(bars: Bars) -> Callable[[Said], None]:
    """Shows each stage as a bar of its own."""
    shown: dict[str, Bar] = {}

    def listen(said: Said) -> None:
        stage = said.get("stage")
        if stage not in _STAGES:
            return
        title, unit = _STAGES[stage]
        if stage not in shown:
            shown[stage] = bars.bar(title, unit=unit)
        text = f"step {said['step']}, box {said['box']:.2f}, click {said['click']:.2f}" if stage == "train" else ""
        shown[stage].show(int(said["done"]), int(said["of"]), note=text)

    return listen


def _document(plan: Plan, judged: Judged, verdict: Verdict, sha256: str | None) -> dict[str, Any]:
    return {
        "name": plan.name,
        "model": plan.model,
        "job": plan.job,
        "project": plan.project,
        "seed": plan.seed,
        "is_better": verdict.is_better,
        "kept": sha256 is not None,
        "sha256": sha256,
        "reasons": verdict.reasons,
        "measured": measured_as_json(verdict.measured),
        "by_label": {label: measured_as_json(found) for label, found in verdict.by_label.items()},
        **judged.rest,
    }


def _write(folder: Path, document: dict[str, Any], plan: Plan, judged: Judged, verdict: Verdict) -> None:
    from orchestrator.pages.tune import write_tune

    with replacing(folder / "tune.json") as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    write_tune(plan, judged, verdict, folder / "index.html")


def _print(plan: Plan, judged: Judged, verdict: Verdict, folder: Path, *, is_kept: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("on the held-out images", "before", "after", "gain", "95 % of resamples"):
        table.add_column(column, justify="left" if column.startswith("on") else "right")
    for name, found in verdict.measured.items():
        table.add_row(NAMES[name], *_cells(found))
    stdout_console().print(table)
    for reason in verdict.reasons:
        err.print(f"{plan.name}: {reason}", style="yellow", markup=False)
    err.print(said_of_defaults(judged), markup=False, highlight=False)
    if is_kept:
        err.print(f"{plan.name} is a model now: `maskfleet submit … --model {plan.name}`", markup=False)
    else:
        err.print(f"{plan.name} was not kept; --keep-anyway keeps it", markup=False)
    err.print(f"wrote {folder / 'tune.json'} and {folder / 'index.html'}", markup=False, highlight=False)


def _cells(found: Measured) -> tuple[str, str, str, str]:
    return f"{found.before:.3f}", f"{found.after:.3f}", f"{found.gain:+.3f}", found.interval
