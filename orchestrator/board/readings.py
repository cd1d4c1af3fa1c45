"""What was read a moment ago, shared by all who look, so that ten viewers cost the database what one does."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

_TIMES_AS_LONG = 20  # at most a twentieth of a connection's time goes into one kind of reading

Read = TypeVar("Read")


@dataclass(slots=True)
class _Kept:
    lock: threading.Lock = field(default_factory=threading.Lock)
    fresh_until: float = 0.0
    value: Any = None
    error: Exception | None = None


class Readings:
    """Values by their key, the `most` newest. A value is read again when it is older than `fresh_seconds`, and than 20
    times as long as reading it took. What reading raised is kept in the same way."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, fresh_seconds: float, read: Callable[[], Read]) -> Read:
        """The value of this key. Only one caller at a time reads it; the others wait for what it reads."""
        with self._lock:
            kept = self._kept.setdefault(key, _Kept())
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        with kept.lock:
            if time.monotonic() >= kept.fresh_until:
                started = time.monotonic()
                try:
                    kept.value, kept.error = read(), None
                except Exception as error:  # noqa: BLE001  raised below, for every caller
                    kept.value, kept.error = None, error
                took = time.monotonic() - started
                kept.fresh_until = started + max(fresh_seconds, _TIMES_AS_LONG * took)
            if kept.error is not None:
                raise kept.error
            value: Read = kept.value
            return value
