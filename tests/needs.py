"""Things that tests need and that a machine may not have."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

# The shared test photos, which are not part of the project. A test that reads them has the fixture `testdata`.
TESTDATA = Path(os.environ.get("MASKFLEET_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))


def miss(what: str) -> NoReturn:
    """Skip the test because something is missing. With CI set, fail it: there everything must be present."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)
