"""Errors that an operator can act on become one line and exit 2; others show their trace."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from db.session import DatabaseNotReady, OperationalError
from orchestrator.assist.credential import AssistError
from orchestrator.cli.app import USAGE, err
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
)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print an error that an operator can fix as one line. Any other error is our fault and shows its trace."""
    try:
        yield
    except _FAILURES as error:
        message = str(error)
    except LookupError as error:
        if type(error) is not LookupError:
            raise
        message = str(error)
    except ValidationError as error:
        message = "; ".join(
            f"MASKFLEET_{str(e['loc'][0]).upper()}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
        )
    except OperationalError as error:
        message = f"Postgres did not answer: {error.orig}; `maskfleet doctor` says more"
    except BrokenPipeError:
        os._exit(0)
    else:
        return
    err.print(f"maskfleet: {redact(message)}", style="red", markup=False)
    sys.exit(USAGE)
