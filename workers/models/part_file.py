"""A file of weights on its way: what is wanted, and the unfinished file, which one process at a time fills."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from workers.models.files import weights_path
from workers.models.spec import ModelSpec, WeightsError
from workers.models.weights import remedy

DISK_MARGIN_BYTES = 64 << 20
_POLL_SECONDS = 0.2

# Called with the bytes on disk and the bytes of the whole file. The first may fall when a server makes us start again.
Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file that is on its way. name: of the model, for messages. sha256: 64 hex digits, of the whole file.

    max_bytes: its size, or the most that it may have when is_exact is false. remedy: what to do when it does not come.
    """

    name: str
    sha256: str
    max_bytes: int
    remedy: str
    is_exact: bool = True

    @property
    def expected(self) -> str:
        return f"{'' if self.is_exact else 'at most '}{self.max_bytes:,} bytes"


def wanted_of(spec: ModelSpec) -> Wanted:
    """The weights of a model with a pinned size and sha256."""
    again = f"{remedy(spec)} again to continue, or copy the file to {weights_path(spec)}"
    return Wanted(name=spec.name, sha256=spec.sha256, max_bytes=spec.size_bytes, remedy=again)


@contextmanager
def exclusive_part(path: Path, while_waiting: Callable[[], object] = lambda: None) -> Iterator[BufferedRandom]:
    """The unfinished file beside `path`, open for appending and locked against other processes and threads.

    The lock is on the file itself. So it ends with its process and leaves no lock file behind. while_waiting: called a
    few times a second while another process has the lock; what it raises ends the wait.
    """
    part_path = path.with_name(f"{path.name}.part")
    while True:
        with part_path.open("a+b") as part:
            _lock(part, while_waiting)
            # While we waited, the holder may have renamed or removed the file. Then our lock protects nothing.
            if _still_at(part_path, part):
                yield part
                return


def put_in_place(part: BufferedRandom, path: Path) -> None:
    """Give the finished file its name. It replaces what is there. Its bytes are on the disk before."""
    part.flush()
    os.fsync(part.fileno())
    Path(part.name).replace(path)
    etag_path(part).unlink(missing_ok=True)


def drop(part: BufferedRandom) -> None:
    """Remove an unfinished file that nobody needs. Its lock is held."""
    Path(part.name).unlink()
    etag_path(part).unlink(missing_ok=True)


def etag_path(part: BufferedRandom) -> Path:
    """Where a download keeps the server's etag of an unfinished file."""
    return Path(f"{part.name}.etag")


def size_of(part: BufferedRandom) -> int:
    part.flush()
    return os.fstat(part.fileno()).st_size


def require_room(wanted: Wanted, folder: Path, have_bytes: int) -> None:
    """Raise WeightsError when the disk has no room for the rest of an exactly known file."""
    free = shutil.disk_usage(folder).free
    needed = (wanted.max_bytes - have_bytes if wanted.is_exact else 0) + DISK_MARGIN_BYTES
    if free < needed:
        raise WeightsError(
            f"{wanted.name}: {needed / 1e9:.1f} GB must be free in {folder}, but only {free / 1e9:.1f} GB are; "
            "make room, or set MASKFLEET_WEIGHTS_DIR to a folder on a larger disk"
        )


def _lock(part: BufferedRandom, while_waiting: Callable[[], object]) -> None:
    is_said = False
    while True:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not is_said:
                log.warning("%s: another process is bringing this file; waiting for it", part.name)
            is_said = True
            while_waiting()
            time.sleep(_POLL_SECONDS)


def _still_at(path: Path, file: BufferedRandom) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
