"""A job is published exactly once while publishers die and answers are lost.

`tests.faults.publishing` is the same as a command, for longer runs.
"""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from tests.faults.publishing import publish_under_faults
from tests.label_studio.server import Server

pytestmark = [pytest.mark.integration, pytest.mark.label_studio, pytest.mark.faults]


def test_killed_publishers_lost_answers_and_late_requests_leave_everything_once(
    engine: Engine, database_url: str, label_studio: Server
) -> None:
    found = publish_under_faults(engine, database_url, label_studio, assets=200, kills=3, seed=1)

    assert found.exact, found
    assert found.spoiled > 0
