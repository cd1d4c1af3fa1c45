"""Errors that an operator can act on become one line and exit 2; others show their trace."""

from __future__ import annotations

import errno

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import SettingsError

from db.session import DatabaseNotReady, OperationalError
from orchestrator.assist.credential import AssistError
from orchestrator.board.password import BoardError
from orchestrator.export.errors import ExportError
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.local.folder import NoFolderError
from orchestrator.local.postgres import PostgresFailed
from orchestrator.local.run import RunError
from orchestrator.pages.choice import ChoiceError
from workers.errors import SourceError, TransientError, printable, redact
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
    BoardError,
    ChoiceError,
    ExportError,
    SettingsError,
)


def as_message(error: Exception) -> str | None:
    """What is said of an error that an operator can fix, without secrets. None for any other: it is our fault.

    It may name keys of objects and texts of servers, which are foreign. No terminal obeys them.
    """
    said = _said(error)
    return None if said is None else "\n".join(printable(line.expandtabs(4)) for line in said.split("\n"))


def _said(error: Exception) -> str | None:
    if isinstance(error, _FAILURES) or type(error) is LookupError:
        return redact(str(error))
    if isinstance(error, ValidationError):
        return redact("; ".join(map(_setting, error.errors())))
    if isinstance(error, OperationalError):
        return redact(f"Postgres did not answer: {error.orig}; `maskfleet doctor` says more")
    return _of_a_file(error) if isinstance(error, OSError) else None


def _of_a_file(error: OSError) -> str | None:
    """A path that cannot be used, or a full disk. None for what the network says: only its caller knows of whom."""
    if error.filename is not None:
        return redact(printable(f"{error.filename}: {error.strerror}"))
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return redact(printable(str(error))) if is_full or error.errno is None else None


# What each of the validator's findings means; {ge} and the like are the bound that did not hold.
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a number that is not infinite",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
}


def _setting(error: ErrorDetails) -> str:
    """A setting that is wrong, in our words. Its value is shown where no secret can be in it."""
    variable = f"MASKFLEET_{str(error['loc'][0]).upper()}"
    if error["type"] not in _EXPECTED:  # our own checks
        return f"{variable}: {error['msg'].removeprefix('Value error, ')}"
    expected = _EXPECTED[error["type"]].format(**error.get("ctx", {})).replace("'", "")
    return f"{variable}={error['input']!r}: expected {expected}"
