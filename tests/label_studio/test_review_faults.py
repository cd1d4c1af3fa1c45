"""Review and clicks come out right, also when commands were killed and answers were lost meanwhile.

`tests.faults.reviewing` and `tests.faults.assisting` are the same as commands, for longer runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.faults.assisting import assist_under_faults
from tests.faults.reviewing import review_under_faults
from tests.label_studio.server import Server

pytestmark = [pytest.mark.integration, pytest.mark.label_studio, pytest.mark.faults]


def test_killed_reviewers_lost_answers_and_ended_connections_change_no_number(
    engine: Engine, database_url: str, label_studio: Server
) -> None:
    found = review_under_faults(engine, database_url, label_studio, assets=80, kills=4)

    assert found.said == found.expected
    assert found.spoiled > 0


def test_killed_services_decoders_and_connections_lose_no_click_and_change_no_answer(
    engine: Engine, database_url: str, label_studio: Server, tmp_path: Path
) -> None:
    found = assist_under_faults(engine, database_url, label_studio, tmp_path, clicks=30, kills=2)

    assert found.exact, found
