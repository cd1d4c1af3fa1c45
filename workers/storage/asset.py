"""What a source of assets is: pages of listed assets, and one asset's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Protocol

from workers.errors import AssetError, ErrorKind

PAGE_SIZE = 1000  # S3's own limit for a ListObjectsV2 page; the same for folders


class SkipReason(StrEnum):
    """Why something in a source is not an asset. These are counted, and do not fail the listing."""

    FOLDER_MARKER = "folder_marker"  # zero-byte "…/" objects that S3 consoles make
    NOT_A_FILE = "not_a_file"  # FIFO, socket, device, dangling link, or a link to a folder
    LINK_OUT = "link_out_of_source"  # a link to a file or folder outside of the source's folder
    UNSTORABLE_NAME = "unstorable_name"  # not UTF-8, has a NUL, or is too long: Postgres cannot store it
    UNREADABLE_FOLDER = "unreadable_folder"  # a subfolder we may not look into (lost+found)
    NOT_A_KEY = "not_a_key"  # of a list of keys: a line that can be no key of the source
    NOT_FOUND = "not_found"  # of a list of keys: a folder has no such file; a bucket is not asked
    DUPLICATE_KEY = "duplicate_key"  # of a list of keys: it is in the job already
    OUTSIDE_SOURCE = "outside_source"  # of a list: an address elsewhere; of an inventory: without the prefix
    NOT_NEWEST = "not_newest_version"  # of an inventory: an older version, or a mark that the object is deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One asset as the listing saw it.

    key: relative to the source. etag: S3's, without quotes. For a file it is "<size>-<mtime_ns>", which changes when
    the file is written.
    """

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Up to PAGE_SIZE consecutive entries of a listing. `list(after=cursor)` goes on after them."""

    objects: list[Listed]
    cursor: str
    skipped: Mapping[SkipReason, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What one asset's bytes are now. etag: as in `Listed`, of exactly these bytes; None when the store gives none."""

    content: bytes
    etag: str | None


class Source(Protocol):
    """A place with assets, a folder or an S3 prefix. Several threads may use it at once."""

    def uri(self, key: str) -> str:
        """The asset's address for people and for Label Studio: `s3://bucket/key` unchanged, or a `file://` URL."""
        ...

    def check(self) -> None:
        """Return if the source can be listed. Raise SourceError, which says what to fix, if not."""
        ...

    def list(self, after: str = "") -> Iterator[Page]:
        """Yield pages of the keys after `after`, in binary order. Raises SourceError and TransientError."""
        ...

    def named(self, key: str, size_bytes: int | None, etag: str | None) -> Listed | SkipReason:
        """The asset that a list of keys names, or why it is none. A folder looks; a bucket believes the list."""
        ...

    def read(self, key: str, max_bytes: int) -> bytes:
        """The asset's bytes. Raises AssetError (not_found, forbidden, too_large before the body is read) or
        TransientError."""
        ...

    def read_with_etag(self, key: str, max_bytes: int) -> Content:
        """`read`, with the etag of what was read: the object may have changed since it was listed."""
        ...


class Counted:
    """A file that takes at most max_bytes, and tells `progress` how many it has. It can only be written."""

    def __init__(self, key: str, file: IO[bytes], max_bytes: int, progress: Callable[[int], object]) -> None:
        self._key, self._file, self._max_bytes, self._progress = key, file, max_bytes, progress
        self._done_bytes = 0

    def write(self, content: bytes) -> int:
        """Raises AssetError (too_large) before anything above the limit is written."""
        self._done_bytes += len(content)
        check_size(self._key, self._done_bytes, self._max_bytes)
        self._file.write(content)
        self._progress(self._done_bytes)
        return len(content)


def check_size(key: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise AssetError(ErrorKind.TOO_LARGE, f"{key}: {size_bytes:,} bytes; at most {max_bytes:,} are read")
