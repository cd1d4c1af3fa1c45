"""Makes a Label Studio project ready for published jobs, or says what an existing one lacks.

It changes what people made only if asked to, and leaves everything that is there already. So it is safe to run it
again.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from db.settings import settings
from orchestrator.label_studio.answers import Project
from orchestrator.label_studio.backend import Service, other_backends, register
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import (
    ALL_KINDS,
    find_controls,
    label_config,
    merge_config,
    missing_lines,
)
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.label_studio.prompt_controls import add_prompt_controls
from workers.storage.client import keys_in_use
from workers.storage.source import open_source

SAMPLING = "Uncertainty sampling"  # lowest prediction score first: these tasks need a person most
VIEW_TITLE = "Lowest scores first"
_STORAGE_TITLE = "maskfleet"


class SetupError(LabelStudioError):
    """The project cannot be set up as asked. The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a project must hold.

    smart: controls for a reviewer's prompts. assist: the service that answers them; it needs these controls. source: a
    job's source; the project will show its images. None for no images.
    """

    labels: Sequence[str] = ()
    smart: bool = False
    assist: Service | None = None
    update_config: bool = False
    source: str | None = None
    local_files: bool = False
    send_keys: bool = False
    presign: bool = False


@dataclass(slots=True, kw_only=True)
class SetUp:
    """What was done to a project, and the lines that its labeling config lacks."""

    project: Project
    done: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def make_project(client: LabelStudio, title: str, wanted: Wanted) -> SetUp:
    """Make a project with this title, or take the existing one."""
    title = title.strip()  # as Label Studio stores it
    found = client.find_projects(title)
    if len(found) > 1:
        numbers = ", ".join(str(project.id) for project in found)
        raise SetupError(f"projects {numbers} are all called {title!r}: say which with --project")
    if found:
        return set_up_project(client, found[0], wanted)
    config = _new_config(wanted.labels)
    project = client.create_project(title=title, label_config=config, sampling=SAMPLING)
    set_up = set_up_project(client, project, wanted)
    set_up.done.insert(0, f"made project {project.id}, {title!r}")
    return set_up


def set_up_project(client: LabelStudio, project: Project, wanted: Wanted) -> SetUp:
    """Check an existing project's labeling config, and add the storage and the tab that it lacks."""
    set_up = SetUp(project=project)
    _set_up_config(client, set_up, wanted)
    if wanted.assist is not None:
        _set_up_assist(client, set_up, wanted.assist)
    if wanted.source is not None:
        _set_up_storage(client, set_up, wanted.source, wanted)
    if all(view["data"].get("title") != VIEW_TITLE for view in client.list_views(project.id)):
        view = {"title": VIEW_TITLE, "ordering": ["tasks:predictions_score"]}
        client.create_view(project.id, {"type": "list", "target": "tasks", **view})
        set_up.done.append(f"added the tab {VIEW_TITLE!r}")
    if project.sampling != SAMPLING:
        if wanted.update_config:
            client.update_project(project.id, sampling=SAMPLING)
            set_up.done.append("set uncertainty sampling")
        else:
            set_up.done.append(f"left its sampling at {project.sampling!r}; --update-config sets {SAMPLING!r}")
    return set_up


def _set_up_config(client: LabelStudio, set_up: SetUp, wanted: Wanted) -> None:
    project = set_up.project
    labels = list(wanted.labels) or [DEFAULT_LABEL]
    if _is_empty(project.label_config):
        config = _new_config(labels)
        set_up.done.append("wrote its labeling config, which was empty")
    else:
        lines = missing_lines(find_controls(project.label_config), kinds=ALL_KINDS, labels=labels)
        if lines and not wanted.update_config:
            set_up.missing = lines
            return
        config = project.label_config
        if lines:
            config = merge_config(config, kinds=ALL_KINDS, labels=labels)
            set_up.done.append("added to its labeling config: " + "; ".join(line.strip() for line in lines))
    if wanted.smart or wanted.assist is not None:
        config = _with_prompt_controls(set_up, config, labels)
    if config != project.label_config:
        set_up.project = client.update_project(project.id, label_config=config)


def _with_prompt_controls(set_up: SetUp, config: str, labels: Sequence[str]) -> str:
    try:
        smart = add_prompt_controls(config, labels, image_name=find_controls(config).image_name)
    except ValueError as error:
        raise SetupError(str(error)) from error
    if smart != config:
        set_up.done.append("added the smart controls click, box and pick, with its labels")
    return smart


def _set_up_assist(client: LabelStudio, set_up: SetUp, service: Service) -> None:
    set_up.done.append(register(client, set_up.project.id, service))
    if others := other_backends(client, set_up.project.id, service):
        set_up.done.append(
            f"the project has other interactive backends, and the editor asks only one: {', '.join(others)}"
        )


def _new_config(labels: Sequence[str]) -> str:
    try:
        return label_config(labels)
    except ValueError as error:
        raise SetupError(str(error)) from error


def _is_empty(config: str) -> bool:
    """Whether it is Label Studio's default for a project that was made without a config."""
    return "".join(config.split()) in ("", "<View></View>", "<View/>")


def _set_up_storage(client: LabelStudio, set_up: SetUp, source: str, wanted: Wanted) -> None:
    """Let the project show the images of a source. The storage only resolves addresses and never adds tasks."""
    if source.startswith("s3://"):
        _set_up_bucket(client, set_up, source, wanted)
    elif wanted.local_files:
        # In a plain path %41 is no escape; in an address it is. So a plain path is quoted.
        folder = posixpath.normpath(unquote(open_source(source).uri("").removeprefix("file://")))
        if any(storage["path"] == folder for storage in client.list_storages("localfiles", set_up.project.id)):
            return
        client.create_storage("localfiles", set_up.project.id, title=_STORAGE_TITLE, path=folder)
        set_up.done.append(f"added local files below {folder}")
    else:
        set_up.done.append(f"left out the images of {source}: Label Studio sees local files only with --local-files")


def _set_up_bucket(client: LabelStudio, set_up: SetUp, source: str, wanted: Wanted) -> None:
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    for storage in client.list_storages("s3", set_up.project.id):
        if storage["bucket"] == bucket:  # the server compares only the bucket
            if storage.get("synchronizable", True):
                set_up.done.append(
                    f"storage {storage['id']} of bucket {bucket} can be synchronized, which would add a second task "
                    "for each published image: do not press Sync"
                )
            return
    keys = _keys() if wanted.send_keys else {}
    client.create_storage(
        "s3", set_up.project.id, title=_STORAGE_TITLE, bucket=bucket, prefix=prefix, presign=wanted.presign, **keys
    )
    set_up.done.append(f"added bucket {bucket} as a storage that only resolves addresses")


def _keys() -> dict[str, str]:
    keys = keys_in_use()
    if not keys:
        raise SetupError("--send-keys: there are none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    endpoint, region = settings().s3_endpoint, os.environ.get("AWS_DEFAULT_REGION")
    return keys | ({"s3_endpoint": endpoint} if endpoint else {}) | ({"region_name": region} if region else {})
