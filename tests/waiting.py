"""Waiting for conditions of other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = 300, *, logs: Callable[[], str] = str) -> T:
    """Ask until the condition is truthy and return it; fail, naming `what` and showing logs, when it takes too long.

    The default is long because two busy cores may be all there is; a condition that holds is seen at once.
    """
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"waited {seconds:g} s in vain for {what}\n{logs()}"
        time.sleep(0.05)
    return found
