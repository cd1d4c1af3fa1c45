"""Errors that an operator can act on become one line and exit 2; others show their trace."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from db.session import DatabaseNotReady, OperationalError
from orchestrator.assist.credential import AssistError
from orchestrator.export.errors import ExportError
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.local.folder import NoFolderError
from orchestrator.local.postgres import PostgresFailed
from orchestrator.local.run import RunError
from workers.errors import SourceError, TransientError, redact
from workers.models.spec import ModelError
from workers.params import ParamError
from workers.prompts import PromptError

_FAILURES = (
    SourceError,
    PromptError,
    TransientError,
    ParamError,
    ModelError,
    DatabaseNotReady,
    RunError,
    PostgresFailed,
    NoFolderError,
    LabelStudioError,
    AssistError,
    ExportError,
    SettingsError,
)


def as_message(error: Exception) -> str | None:
    """The line for an error that an operator can fix, without secrets. None for any other: it is our fault."""
    if isinstance(error, _FAILURES) or type(error) is LookupError:
        return redact(str(error))
    if isinstance(error, ValidationError):
        lines = (
            f"MASKFLEET_{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
        return redact("; ".join(lines))
    if isinstance(error, OperationalError):
        return redact(f"Postgres did not answer: {error.orig}; `maskfleet doctor` says more")
    return None


def _setting(error: ErrorDetails) -> str:
    return f"MASKFLEET_{str(error['loc'][0]).upper()}: {error['msg'].removeprefix('Value error, ')}"
