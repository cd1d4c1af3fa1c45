"""Makes glibc's allocator keep freed memory in this process."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> None:
    """Keep memory for the next array of the same size, instead of giving it back to the system after each image.

    Otherwise the system clears each page again when it is next touched: the demo on a CPU took 15 s of system time
    instead of 3 s. The process stays at the size of its largest image. Does nothing without glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
