"""docs/operations.md is held to what is there: its commands, its tests, its back-up; and logs in JSON."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, text

from db.session import open_engine, psycopg2_url
from orchestrator.local.postgres import _wheel
from tests.deployment import Deployment, draw_pictures, terminate
from tests.faults.test_faults import assert_nothing_lost
from tests.stub.stub_model import BROKEN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()


def test_every_symptom_of_the_runbook_names_a_test_that_provokes_it() -> None:
    table = PAGE.split("## Symptom")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "| symptom |" not in line]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert named, row
        assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_metric_of_the_runbook_is_one_that_the_code_exports_and_the_other_way_round() -> None:
    code = "".join((ROOT / path).read_text() for path in ("orchestrator/jobs/metrics.py", "workers/running/metrics.py"))
    exported = set(re.findall(r'"(maskfleet_\w+)"', code))
    table = PAGE.split("## Metrics")[1].split("\n## ")[0]

    assert {name.removesuffix("_total") for name in re.findall(r"`(maskfleet_\w+)`", table)} == exported


@pytest.mark.integration
def test_a_dump_of_a_job_half_done_goes_on_where_it_was_restored(deployment: Deployment, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.1", "MASKFLEET_LOG_FORMAT": "json"}
    deployment.settings["MASKFLEET_STUB_HOLD"] = str(hold)
    source = draw_pictures(tmp_path / "pictures", 60, special={"x\nERROR forged.png": BROKEN})
    dispatcher, worker = deployment.start("dispatch"), deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)
    deployment.wait_for_outcomes(job, 10)
    hold.touch()  # it must not be over when the dump begins

    programs = _wheel() / "pginstall18" / "bin"
    dump = tmp_path / "maskfleet.dump"
    subprocess.run([programs / "pg_dump", "--format=custom", f"--file={dump}", libpq(deployment)], check=True)
    hold.unlink()
    assert terminate(worker) == terminate(dispatcher) == 0
    done_in_the_old = deployment.read(job)[1].labeled
    restored = create_beside(deployment.database_url)
    old, deployment.database_url = deployment.database_url, restored
    subprocess.run(
        [programs / "pg_restore", "--no-owner", "--exit-on-error", f"--dbname={libpq(deployment)}", dump], check=True
    )
    deployment.engine = open_engine(restored)
    redis.Redis.from_url(deployment.broker_url).flushdb()
    try:
        half = deployment.read(job)[1]
        assert 10 <= half.labeled + half.failed <= done_in_the_old + 1
        assert half.pending > 0
        deployment.start("dispatch")
        deployment.start("worker", "--devices", "cpu")

        assert_nothing_lost(deployment.wait_until_done(job), listed=61, failed={"internal": 1})
        lines = [line for log in deployment.folder.glob("*.log") for line in log.read_text().splitlines()]
        entries = [json.loads(line) for line in lines]
        about = [entry for entry in entries if "a stub was asked to fail" in entry["event"]]
        assert about
        assert all({"job", "asset", "exception", "timestamp"} <= set(entry) for entry in about)
    finally:
        deployment.stop_all()
        deployment.engine.dispose()
        as_admin(old, f"DROP DATABASE {psycopg2_url(restored).database} WITH (FORCE)")


def create_beside(database_url: str) -> str:
    """The address of a fresh, empty database on the same server."""
    name = f"maskfleet_restored_{secrets.token_hex(4)}"
    as_admin(database_url, f"CREATE DATABASE {name}")
    return psycopg2_url(database_url).set(database=name).render_as_string(hide_password=False)


def as_admin(database_url: str, statement: str) -> None:
    admin = create_engine(psycopg2_url(database_url).set(database="template1"), isolation_level="AUTOCOMMIT")
    with admin.connect() as db:
        db.execute(text(statement))
    admin.dispose()


def libpq(deployment: Deployment) -> str:
    """The address as Postgres' own programs read it."""
    return deployment.database_url.replace("postgresql+psycopg2://", "postgresql://")
