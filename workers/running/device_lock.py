"""One supervisor a CUDA device: a lock on this machine that ends with its process, however it ends."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

_MOST_BYTES = 200  # of a note about the holder


class DeviceHeld(RuntimeError):
    """Another `maskfleet worker` of this machine works on the device. The message says which."""


@contextmanager
def hold_device(cuda_id: str) -> Iterator[None]:
    """Hold a CUDA device for this process while the block runs. Raises DeviceHeld.

    The kernel gives the lock up when the process ends, also after SIGKILL. The file stays; it means nothing without the
    lock. cuda_id: a UUID, or what CUDA_VISIBLE_DEVICES calls the device.
    """
    path = Path(tempfile.gettempdir()) / f"maskfleet-{''.join(c if c.isalnum() else '-' for c in cuda_id)}.lock"
    descriptor = _open(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, _MOST_BYTES).decode(errors="replace")
            who = holder if holder.isprintable() and holder else "another `maskfleet worker`"
            raise DeviceHeld(f"device {cuda_id} is held by {who}: stop it first, or name other --devices") from None
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock's file. In the temporary folder nobody may write to another user's file, but everyone may lock it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _sign(descriptor: int) -> None:
    """Write who holds it, for the next one's message. Another user's file cannot be written to, and stays as it is."""
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC".encode(), 0)
