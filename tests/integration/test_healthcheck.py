"""A container whose command stopped writing its heartbeat is unwell, and is started again after a while."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from db.states import ProcessKind
from infra.healthcheck import OLD_SECONDS, RESTART_SECONDS, stopped, unreachable

pytestmark = pytest.mark.integration


@pytest.fixture
def command() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def beat_before(engine: Engine, pid: int, seconds: float) -> None:
    with engine.begin() as db:
        db.execute(
            text(
                """INSERT INTO process (kind, name, host, pid, version, seen_at)
                   VALUES ('dispatcher', :name, :host, :pid, '0', now() - make_interval(secs => :age))"""
            ),
            {"name": f"dispatcher@{pid}", "host": socket.gethostname(), "pid": pid, "age": seconds},
        )


@pytest.mark.parametrize(
    ("age_seconds", "said", "lives"),
    [
        (OLD_SECONDS - 50, "", True),
        (OLD_SECONDS + 5, "the last heartbeat of the dispatcher is {} s old", True),
        (RESTART_SECONDS + 5, "the last heartbeat of the dispatcher is {} s old", False),
    ],
)
def test_a_command_is_well_while_its_heartbeat_is_young_and_killed_when_it_is_very_old(
    engine: Engine,
    database_url: str,
    command: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    age_seconds: float,
    said: str,
    lives: bool,
) -> None:
    monkeypatch.setenv("MASKFLEET_DATABASE_URL", database_url)
    beat_before(engine, command.pid, age_seconds)

    found = stopped(ProcessKind.DISPATCHER)
    later = range(int(age_seconds), int(age_seconds) + 100)  # a busy machine takes a while to ask
    assert found in ([[said.format(seconds)] for seconds in later] if said else [[]])

    if lives:
        assert command.poll() is None
    else:
        assert command.wait(60) != 0


def test_a_command_that_never_beat_and_a_database_that_is_away_are_said(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKFLEET_DATABASE_URL", database_url)
    assert stopped(ProcessKind.WORKER) == ["no heartbeat of a worker yet"]

    monkeypatch.setenv("MASKFLEET_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    assert stopped(ProcessKind.WORKER) == ["Postgres gives no answer about the heartbeat"]


def test_the_addresses_may_stand_in_files(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "database").write_text(f"{database_url}\n")
    (tmp_path / "broker").write_text("redis://:secret@127.0.0.1:1/0\n")
    monkeypatch.delenv("MASKFLEET_DATABASE_URL", raising=False)
    monkeypatch.setenv("MASKFLEET_DATABASE_URL_FILE", str(tmp_path / "database"))
    monkeypatch.delenv("MASKFLEET_BROKER_URL", raising=False)
    monkeypatch.setenv("MASKFLEET_BROKER_URL_FILE", str(tmp_path / "broker"))

    assert stopped(ProcessKind.WORKER) == ["no heartbeat of a worker yet"]
    [said] = [fault for fault in unreachable() if fault.startswith("MASKFLEET_BROKER_URL")]
    assert said.startswith("MASKFLEET_BROKER_URL: 127.0.0.1: ")
