"""Registers `maskfleet assist` at a project of Label Studio as its interactive ML backend.

Label Studio 1.23 may answer 403 and have made the backend all the same: the refusal is of a webhook that it makes
afterwards. So we look first, and after a refusal we look again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.errors import LabelStudioError, Refused

BACKEND_TITLE = "maskfleet assist"
_FORBIDDEN = 403


class BackendError(LabelStudioError):
    """The service could not be registered. The message says which switch or setting to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running `maskfleet assist`. url: as Label Studio's server reaches it."""

    url: str
    user: str
    password: str


def register(client: LabelStudio, project_id: int, service: Service) -> str:
    """Make the service the project's backend, or bring an existing entry up to date. Returns what was done.

    Label Studio calls the service before it answers. Raises BackendError when that fails.
    """
    found = _find(client, project_id, service)
    fields = {
        "url": service.url,
        "project": project_id,
        "title": BACKEND_TITLE,
        "is_interactive": True,
        "auth_method": "BASIC_AUTH",
        "basic_auth_user": service.user,
        "basic_auth_pass": service.password,
    }
    try:
        client.write_backend(None if found is None else found["id"], fields)
    except Refused as error:
        if error.status != _FORBIDDEN or _find(client, project_id, service) is None:
            raise BackendError(f"{error}; {_remedy(error, service)}", status=error.status) from error
    return f"registered {service.url} as its interactive backend" if found is None else f"checked backend {found['id']}"


def other_backends(client: LabelStudio, project_id: int, service: Service) -> list[str]:
    """Addresses of other interactive backends. The editor asks only the first one of a project."""
    return [b["url"] for b in client.list_backends(project_id) if b.get("is_interactive") and not _is(b, service)]


def _find(client: LabelStudio, project_id: int, service: Service) -> dict[str, Any] | None:
    return next((backend for backend in client.list_backends(project_id) if _is(backend, service)), None)


def _is(backend: dict[str, Any], service: Service) -> bool:
    return str(backend["url"]).rstrip("/") == service.url.rstrip("/")


def _remedy(error: Refused, service: Service) -> str:
    said = str(error)
    if error.status == _FORBIDDEN:
        return (
            f"Label Studio does not call private addresses such as {service.url}: start its server with "
            "ML_BLOCK_LOCAL_IP=false (SSRF_PROTECTION_ENABLED may stay on), then run this command again"
        )
    if "authentication" in said:
        return "give `maskfleet assist` and this command the same MASKFLEET_ASSIST_USER and MASKFLEET_ASSIST_PASSWORD"
    return (
        f"is `maskfleet assist` running, and does Label Studio's server reach {service.url}? In containers, "
        "127.0.0.1 is the container itself"
    )
