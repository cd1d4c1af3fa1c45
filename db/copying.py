"""Rows written with COPY, which is several times faster than INSERT."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

COPY_ROWS = 5000
_READ_BYTES = 1 << 16
_SPECIAL = re.compile(r"[\\\t\n\r]")
_ESCAPES = {ord("\\"): "\\\\", ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}


def copy_rows(db: Connection, into: str, rows: Iterable[Sequence[Any]]) -> None:
    """COPY rows into a table. Measured with mask rows, this is 6 times as fast as INSERT."""
    lines = "".join(["\t".join(map(_copy_field, row)) + "\n" for row in rows])
    if lines:
        copy_in(db, f"COPY {into} FROM STDIN", lines.encode())


def copy_in(db: Connection, statement: str, content: bytes) -> None:
    """Run a COPY FROM STDIN. Raises DBAPIError like every other statement."""
    _copy(db, statement, io.BytesIO(content))


def copy_out(db: Connection, statement: str) -> bytes:
    """Run a COPY TO STDOUT. Raises DBAPIError like every other statement."""
    found = io.BytesIO()
    _copy(db, statement, found)
    return found.getvalue()


def _copy(db: Connection, statement: str, file: io.BytesIO) -> None:
    cursor: Any = db.connection.cursor()
    driver_error = db.dialect.loaded_dbapi.Error
    try:
        cursor.copy_expert(statement, file, _READ_BYTES)
    except driver_error as error:  # SQLAlchemy does not see the errors of a bare cursor
        raise DBAPIError.instance(statement, None, error, driver_error, dialect=db.dialect) from error
    finally:
        cursor.close()


def _copy_field(value: Any) -> str:
    """One field in COPY's text format. Keys may hold anything except NUL."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return value.translate(_ESCAPES) if _SPECIAL.search(value) else value
    return str(value)
