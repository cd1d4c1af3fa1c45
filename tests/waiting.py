"""Waits for conditions in other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Engine, text

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = 300, *, logs: Callable[[], str] = str) -> T:
    """Check the condition until it is truthy, and return it. After `seconds` fail with `what` and the logs.

    The default is long, because there may be only two busy cores. A condition that holds is seen at once.
    """
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"after {seconds:g} s still waiting for {what}\n{logs()}"
        time.sleep(0.05)
    return found


def wait_for_lock(engine: Engine) -> None:
    """Return when a connection waits for a lock of another one, in this database."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        wait_for(lambda: db.execute(text(waiting)).scalars().first(), "a connection that waits for a lock")
