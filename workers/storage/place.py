"""What a place for objects can do, a folder or an S3 prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """name: relative to the place, with slashes. changed_at: seconds since 1970, on the store's clock."""

    name: str
    size_bytes: int
    changed_at: float


class Objects(Protocol):
    """A place for objects. Several threads and processes may use it at once.

    Every call raises TransientError when the place does not answer or is full. It raises AssetError (not_found,
    forbidden, too_large) about one object, SourceError about the whole place.
    """

    def read(self, key: str, max_bytes: int) -> bytes: ...

    def write(self, key: str, content: bytes) -> None: ...

    def copy(
        self, key: str, into: IO[bytes], max_bytes: int, progress: Callable[[int], object] = lambda done_bytes: None
    ) -> None:
        """Fill a file with an object, in bounded memory. progress: called with the bytes that are written."""
        ...

    def write_file(self, key: str, path: Path) -> None:
        """`write` of a file of any size, in bounded memory."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object. It is no error when it is gone."""
        ...

    def stored(self) -> Iterator[StoredObject]:
        """Every object of the place, also what a killed writer left."""
        ...
