from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.deployment import Deployment


@pytest.fixture
def deployment(
    database_url: str, engine: Engine, redis_url: str, redis: object, tmp_path: Path
) -> Iterator[Deployment]:
    """Real Postgres and an empty Redis, no process of ours yet."""
    logs = tmp_path / "logs"
    logs.mkdir()
    made = Deployment(database_url=database_url, broker_url=redis_url, folder=logs, engine=engine)
    yield made
    made.stop_all()
