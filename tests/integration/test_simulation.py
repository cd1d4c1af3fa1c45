"""A short run of the simulation: many workers share connections, and the books are exact."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from tests.benchmarks.simulation import Level, Load, judge, simulate

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_twelve_workers_claim_beat_and_record_and_each_asset_has_one_outcome(engine: Engine, database_url: str) -> None:
    levels = simulate(database_url, [Load(workers=n, rate=20.0, masks=3, seconds=4) for n in (2, 12)])

    assert [level.workers for level in levels] == [2, 12]
    assert all(level.reached > 0 and level.commits > 0 for level in levels)
    assert all(level.says for level in levels)
    with engine.begin() as db:
        assert db.execute(text("SELECT count(DISTINCT worker) FROM outcome")).scalar_one() > 2


def test_what_saturates_is_said_by_what_was_seen() -> None:
    seen = {"workers": 8, "wanted": 16.0, "claim_ms": 1.0, "record_ms": 1.0, "heartbeat_ms": 1.0, "wal_mb": 1.0}
    seen |= {"client_cores": 0.1, "commits": 1.0, "says": ""}

    def said(reached: float, cores: float, waits: dict[str, float]) -> str:
        return judge(Level(**seen, reached=reached, postgres_cores=cores, waits=waits), cores=2)  # type: ignore[arg-type]

    assert said(15.0, 1.9, {"Lock:tuple": 1.0}) == "keeps up"
    assert said(9.0, 1.8, {"Lock:tuple": 1.0}) == "the machine's 2 cores (1.8 by Postgres)"
    assert said(9.0, 0.5, {"Lock:tuple": 0.2, "Lock:transactionid": 0.2}) == "locks between workers"
    assert said(9.0, 0.5, {"LWLock:WALWrite": 0.3, "IO:WalSync": 0.2}).startswith("the disk")
    assert said(9.0, 0.5, {"on a core": 1.0}).startswith("nothing seen here")
