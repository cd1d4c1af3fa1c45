"""Ctrl-C, as often as it is pressed: the first ends the command in order, the second hurries it, the third leaves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code that shells give a command ended by Ctrl-C."""


class Interrupts:
    """The signals that this process heard. hurry: called at the second; it ends what the command waits for."""

    def __init__(self) -> None:
        self.heard = 0
        self.hurry: Callable[[], None] = lambda: None

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.heard += 1
        if self.heard == 1:
            raise KeyboardInterrupt
        if self.heard > 2:
            os._exit(INTERRUPTED)
        self.hurry()


@contextmanager
def heard_interrupts() -> Iterator[Interrupts]:
    """Hear SIGINT and SIGTERM during the block. An end in order is never broken off half-way by a second Ctrl-C.

    Only the main thread hears signals; elsewhere nothing changes.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    # A shell starts what it puts into the background deaf to Ctrl-C; it stays so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, interrupts.hear) for number in numbers}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
