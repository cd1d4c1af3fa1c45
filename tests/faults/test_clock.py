"""All times of leases are the database's: a worker whose clock is an hour off changes nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deployment import Deployment, draw_pictures
from tests.faults.kinds import clock_library, clock_off_by
from tests.faults.test_faults import assert_nothing_lost
from tests.needs import miss

pytestmark = [pytest.mark.integration, pytest.mark.faults]


@pytest.fixture(autouse=True)
def library() -> None:
    if clock_library() is None:
        miss("no C compiler (cc) for a clock that is off")


@pytest.mark.parametrize("seconds", ["+3600", "-3600"])
def test_the_clock_of_a_process_is_off(seconds: str) -> None:
    program = "import time, datetime; print(time.time(), datetime.datetime.now().timestamp()); time.sleep(0.01)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=clock_off_by(seconds), capture_output=True, text=True, check=True
    )

    for found in done.stdout.split():
        assert abs(float(found) - time.time() - int(seconds)) < 600


@pytest.mark.parametrize("seconds", ["+3600", "-3600"])
def test_a_worker_whose_clock_is_an_hour_off_keeps_its_leases_and_no_other_loses_its_own(
    deployment: Deployment, tmp_path: Path, seconds: str
) -> None:
    deployment.settings |= {"MASKFLEET_STUB_SECONDS": "0.1", "MASKFLEET_STUB_CALLS": str(tmp_path / "calls")}
    deployment.settings["MASKFLEET_LEASE_SECONDS"] = "60"  # far below an hour; none ends early on a busy machine
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu", **clock_off_by(seconds))
    deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(draw_pictures(tmp_path / "pictures", 64))

    assert_nothing_lost(deployment.wait_until_done(job), listed=64)

    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 64  # nothing was computed twice, so no lease ended early
    assert "lease was lost" not in deployment.logs()
