"""Freed memory stays with a process that asks for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from workers.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for n in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(50_000_000, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Of five arrays of 50 MB, one after the other, in a process that had five such before."""
    return int(subprocess.run([sys.executable, "-P", "-c", PROGRAM, how], capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_arrays_of_the_same_size_get_the_same_memory_again() -> None:
    assert page_faults("keep") * 10 < page_faults("as it is")
