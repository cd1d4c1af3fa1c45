"""`publish` and `label-studio setup`: a job's masks into a Label Studio project."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from db import results
from db.jobs import Job
from db.settings import settings
from db.states import ProcessKind
from orchestrator.cli.app import (
    JsonOption,
    OptionalJobArgument,
    app,
    database_url,
    deployment_engine,
    err,
    fail,
    job_number,
    label_studio_app,
    print_json,
    stop_on_signals,
)
from orchestrator.cli.options import LocalFilesOption
from orchestrator.label_studio.addresses import server_key
from orchestrator.label_studio.backend import Service
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import follow_project, publish_job
from orchestrator.label_studio.report import Report
from orchestrator.terminal.jobs import read_job
from orchestrator.terminal.progress import bars_on
from orchestrator.terminal.publish import print_report, report_as_json
from workers.allocator import keep_freed_memory
from workers.logs import log_to_stderr
from workers.paths import own_path
from workers.running.heart import Heart, own_beat


class RegionForm(StrEnum):
    AUTO = "auto"
    POLYGON = "polygon"
    BRUSH = "brush"
    RECTANGLE = "rectangle"


class TaskOrder(StrEnum):
    LISTING = "listing"
    SCORE = "score"
    DISAGREEMENT = "disagreement"


@app.command(epilog="Example: `maskfleet publish 12 --project 3`")
def publish(
    job: OptionalJobArgument = None,
    project: Annotated[int | None, typer.Option("--project", help="Label Studio's project, by number.")] = None,
    as_: Annotated[RegionForm, typer.Option("--as", help="How masks are drawn; auto: polygons, else brush.")] = (
        RegionForm.AUTO
    ),
    follow: Annotated[bool, typer.Option("--follow", help="Keep up until the job is over.")] = False,
    max_masks: Annotated[
        int, typer.Option("--max-masks", "--max-regions", min=1, help="Most masks on a task, the best first.")
    ] = 150,
    order: Annotated[
        TaskOrder,
        typer.Option("--order", help="Which assets become tasks first: listing, lowest score, or most disagreement."),
    ] = TaskOrder.LISTING,
    local_files: LocalFilesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a job's assets into a Label Studio project, with their masks as predictions.

    Without a job, --follow keeps up with all. You can run it again at any time. Nothing is sent twice; what was deleted
    there is sent again. Exits 1 when the project could not take some assets.
    """
    log_to_stderr()
    number = project_number(project)
    if job is None and not follow:
        fail("which job? `maskfleet jobs` lists them; without one, --follow keeps up with all")
    keep_freed_memory()
    engine = deployment_engine()
    counts = read_job(engine, job)[1] if job is not None else None
    total = counts.labeled - counts.without_prompts if counts is not None else None
    root = str(own_path(local_files).absolute()) if local_files else None
    options = Options(as_=as_.value, max_masks=max_masks, local_files=root, order=order.value)
    documents: dict[int, dict[str, Any]] = {}
    with connect_label_studio() as client, bars_on(err) as bars:
        bar = bars.bar(f"project {number}", total, unit="task")
        bar.show(0)

        def waiting() -> None:
            bar.say("another publisher is at work")

        def passed(job_of: Job, report: Report) -> None:
            documents[job_of.id] = report_as_json(job_of, client.url, number, report)
            print_report(err, job_of, report)

        if follow:
            stop = stop_on_signals()
            with Heart(database_url(), lambda: [own_beat(ProcessKind.PUBLISHER)]):
                follow_project(
                    engine, client, number, options, job_id=job, stop=stop, published_pass=passed, progress=bar.advance
                )
        else:
            found, _ = read_job(engine, job or 0)
            passed(found, publish_job(engine, client, found, number, options, progress=bar.advance, waiting=waiting))
        address = f"{client.url}/projects/{number}/data"
    if as_json:
        print_json([*documents.values()] if job is None else documents.get(job))
    err.print(address, markup=False, highlight=False)
    if any(document["refused"] for document in documents.values()):
        raise typer.Exit(1)


@label_studio_app.command(
    "setup", epilog='Example: `maskfleet label-studio setup --title "Street" --job 12 --label car --label "red bus"`'
)
def label_studio_setup(
    project: Annotated[int | None, typer.Option("--project", help="An existing project, by number.")] = None,
    title: Annotated[str, typer.Option("--title", help="Title of the project; it is made if there is none.")] = "",
    job: Annotated[
        int | None,
        typer.Option("--job", metavar="JOB", parser=job_number, help="Take labels and images from this job."),
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="A label to offer; repeatable.")] = None,
    smart: Annotated[
        bool, typer.Option("--smart", help="Add smart controls for clicks and boxes, as --assist does.")
    ] = False,
    assist: Annotated[
        str | None,
        typer.Option("--assist", metavar="URL", help="Let `maskfleet assist` at this address answer clicks."),
    ] = None,
    update_config: Annotated[
        bool, typer.Option("--update-config", help="Add what is missing to an existing project's labeling config.")
    ] = False,
    local_files: Annotated[
        bool, typer.Option("--local-files", help="Let Label Studio serve the job's folder; it must see that folder.")
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

    An existing labeling config is not changed. If it lacks something, the lines to add are printed and the exit status
    is 2.
    """
    from orchestrator.label_studio.setup import Wanted, make_project, set_up_project

    labels, source = list(label or []), None
    if job is not None:
        engine = deployment_engine()
        source = read_job(engine, job)[0].source
        with engine.begin() as db:
            own = results.labels_of(db, job_id=job)
            # Such masks are published as "object". Without that label the project would refuse their assets.
            own += [DEFAULT_LABEL] if results.has_masks_without_label(db, job_id=job) else []
            labels += [name for name in own if name not in labels]
    if project is None and not title:
        fail("which project? --project NUMBER, or --title of the one to make")
    wanted = Wanted(
        labels=labels,
        smart=smart,
        assist=None if assist is None else assist_service(assist),
        update_config=update_config,
        source=source,
        local_files=local_files,
        send_keys=send_keys,
        presign=presign,
    )
    with connect_label_studio() as client:
        if project is not None:
            set_up = set_up_project(client, client.get_project(project), wanted)
        else:
            set_up = make_project(client, title, wanted)
        url = f"{server_key(settings().label_studio_public_url or client.url)}/projects/{set_up.project.id}/data"
    if as_json:
        print_json(
            {"project": set_up.project.id, "url": url, "done": set_up.done, "missing_config_lines": set_up.missing}
        )
    else:
        print(set_up.project.id)
        for line in [*set_up.done, url]:
            err.print(line, markup=False, highlight=False)
    if set_up.missing:
        lines = "\n".join(set_up.missing)
        fail(f"the labeling config lacks these lines; add them, or run again with --update-config:\n{lines}")


def assist_service(url: str) -> Service:
    """The service at this address, with the deployment's user and password."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        fail(f"--assist {url!r}: expected an address that Label Studio's server reaches, such as http://assist:9090")
    password = settings().assist_password
    if password is None:
        fail("set MASKFLEET_ASSIST_PASSWORD to the password of `maskfleet assist`, at least 16 characters")
    return Service(url=url, user=settings().assist_user, password=password.get_secret_value())


def project_number(project: int | None) -> int:
    number = project or settings().label_studio_project
    if number is None:
        fail("which project? --project or MASKFLEET_LABEL_STUDIO_PROJECT; `maskfleet label-studio setup` makes one")
    return number


def connect_label_studio() -> LabelStudio:
    """The deployment's Label Studio. It was reached, and it accepted the token."""
    url, key = settings().label_studio_url, settings().label_studio_api_key
    if url is None or key is None:
        fail(
            "set MASKFLEET_LABEL_STUDIO_URL, such as http://host:8080, and MASKFLEET_LABEL_STUDIO_API_KEY, a token "
            "from Account & Settings there"
        )
    client = LabelStudio(url, key.get_secret_value())
    client.check()
    return client
