"""SQL of the commands that serve this deployment: each writes its row every few seconds, and others read who lives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, RowMapping, text

from db.states import ProcessKind

BEAT_SECONDS = 10.0
LIVE_SECONDS = 35.0  # three beats may be lost, as in a short outage of Postgres


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a process says about itself. name: of a worker as in `chunk.worker`. pid: of its command.

    failed_starts: how often in a row its worker ended soon after its start; last_error says why it last did.
    """

    kind: ProcessKind
    name: str
    host: str
    pid: int
    version: str
    device: str | None = None
    models: Sequence[str] = ()
    model: str | None = None
    failed_starts: int = 0
    last_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A row of `process`."""

    kind: ProcessKind
    name: str
    host: str
    pid: int
    version: str
    device: str | None
    models: list[str]
    model: str | None
    failed_starts: int
    last_error: str | None
    started_at: datetime
    seen_at: datetime

    @classmethod
    def from_row(cls, row: RowMapping) -> Process:
        return cls(**{**row, "kind": ProcessKind(row["kind"])})

    @property
    def trouble(self) -> str | None:
        """One line about a worker that does not come up. None for all others."""
        if not self.failed_starts:
            return None
        times = "once" if self.failed_starts == 1 else f"{self.failed_starts} times"
        return f"worker {self.name} failed to start {times}: {self.last_error or 'its log says why'}"


def beat(db: Connection, *, beats: Sequence[Beat]) -> None:
    """Write the rows of a command's processes, and remove rows that are older than a day."""
    statement = text(
        """INSERT INTO process (kind, name, host, pid, version, device, models, model, failed_starts, last_error)
           VALUES (:kind, :name, :host, :pid, :version, :device, CAST(:models AS jsonb), :model, :failed_starts,
                   :last_error)
           ON CONFLICT (kind, host, pid, name) DO UPDATE SET
               device = excluded.device, version = excluded.version, models = excluded.models, model = excluded.model,
               failed_starts = excluded.failed_starts, last_error = excluded.last_error, seen_at = now(),
               -- In a container every command is process 1: this row may be that of the one before.
               started_at = CASE WHEN process.seen_at < now() - make_interval(secs => :dead)
                   THEN now() ELSE process.started_at END"""
    )
    for one in beats:
        values = {name: getattr(one, name) for name in Beat.__dataclass_fields__}
        db.execute(statement, values | {"models": json.dumps(list(one.models)), "dead": LIVE_SECONDS})
    db.execute(text("DELETE FROM process WHERE seen_at < now() - interval '1 day'"))


def leave(db: Connection, *, beats: Sequence[Beat]) -> None:
    """Remove the rows of a command that ends."""
    for one in beats:
        db.execute(
            text("DELETE FROM process WHERE kind = :kind AND host = :host AND pid = :pid AND name = :name"),
            {"kind": one.kind, "host": one.host, "pid": one.pid, "name": one.name},
        )


def live(db: Connection) -> list[Process]:
    """The processes that were seen lately, workers first, by name."""
    statement = text(
        """SELECT kind, name, host, pid, version, device, models, model, failed_starts, last_error, started_at, seen_at
           FROM process WHERE seen_at > now() - make_interval(secs => :secs) ORDER BY kind DESC, name, pid"""
    )
    return [Process.from_row(row) for row in db.execute(statement, {"secs": LIVE_SECONDS}).mappings()]
