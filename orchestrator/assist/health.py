"""What `maskfleet doctor` says of the assist service: is it registered, does Label Studio reach it, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any

from db.embeddings import Totals, totals
from db.session import Engine
from orchestrator.label_studio.backend import BACKEND_TITLE
from orchestrator.label_studio.client import LabelStudio

_CONNECTED = "CO"  # Label Studio's word for a backend that answered


def kept_embeddings(engine: Engine) -> str:
    """The embeddings in one line: how many, their bytes, the one unused for longest, how many are wanted or failed."""
    with engine.begin() as db:
        found = totals(db)
    return _line(found)


def backend_faults(client: LabelStudio, project_id: int) -> list[str]:
    """Why the project's reviewers get no masks for their clicks. Empty if they do."""
    backends = client.list_backends(project_id)
    ours = next((backend for backend in backends if backend.get("title") == BACKEND_TITLE), None)
    if ours is None:
        return [f"project {project_id} has no {BACKEND_TITLE!r} among its backends"]
    faults = []
    if not ours.get("is_interactive"):
        faults.append(f"backend {ours['id']} is not interactive")
    if ours.get("state") != _CONNECTED:
        faults.append(f"Label Studio does not reach {ours['url']}: {_said(ours)}")
    others = [backend["url"] for backend in _before(backends, ours) if backend.get("is_interactive")]
    if others:
        faults.append(f"the editor asks {others[0]} instead, the project's first interactive backend")
    return faults


def _before(backends: Sequence[dict[str, Any]], ours: dict[str, Any]) -> list[dict[str, Any]]:
    return [backend for backend in backends if backend["id"] < ours["id"]]


def _said(backend: dict[str, Any]) -> str:
    return " ".join(str(backend.get("error_message") or "no reason given").split())[:200]


def _line(found: Totals) -> str:
    parts = [f"{found.stored:,} embeddings, {found.size_bytes / 1e6:,.0f} MB"]
    if found.oldest is not None:
        parts.append(f"the oldest used {found.oldest.astimezone(UTC):%Y-%m-%d %H:%M} UTC")
    parts += [f"{count:,} {what}" for count, what in ((found.wanted, "wanted"), (found.failed, "failed")) if count]
    return ", ".join(parts)
