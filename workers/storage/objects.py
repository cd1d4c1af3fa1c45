"""Objects that maskfleet writes itself, in a folder or under an S3 prefix. A source of assets is never written.

An object is replaced as a whole: a reader sees the old bytes or the new ones, whatever kills the writer.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from db.settings import settings
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.paths import own_path
from workers.storage.asset import Counted
from workers.storage.folder import Folder, file_error
from workers.storage.place import Objects, StoredObject

_BLOCK_BYTES = 1 << 20


def open_objects(place: str) -> Objects:
    """The place at `s3://bucket/prefix` or in a folder of this machine. Does not connect or create it yet.

    Raises SourceError for anything else.
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        return FolderObjects(own_path(place).absolute())
    if scheme == "s3":
        from workers.storage.bucket_objects import BucketObjects  # here, because it loads boto3

        return BucketObjects(rest, endpoint=settings().s3_endpoint)
    raise SourceError(f"{place}: expected s3://bucket/prefix or a folder")


class FolderObjects:
    """Files below one directory, which is made at the first write."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = Folder(str(root))

    def read(self, key: str, max_bytes: int) -> bytes:
        return self._files.read(key, max_bytes)

    def copy(
        self, key: str, into: IO[bytes], max_bytes: int, progress: Callable[[int], object] = lambda done_bytes: None
    ) -> None:
        into.seek(0)
        into.truncate()
        path = self._root / key
        try:
            if path.exists() and not path.is_file():
                raise AssetError(ErrorKind.NOT_FOUND, f"{path}: is no regular file")
            with path.open("rb") as file:
                shutil.copyfileobj(file, Counted(key, into, max_bytes, progress), _BLOCK_BYTES)
        except OSError as error:
            raise file_error(key, error) from error

    def write(self, key: str, content: bytes) -> None:
        self._replace(key, lambda temporary: temporary.write_bytes(content))

    def write_file(self, key: str, path: Path) -> None:
        self._replace(key, lambda temporary: shutil.copyfile(path, temporary))

    def _replace(self, key: str, write: Callable[[Path], object]) -> None:
        path = self._root / key
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(temporary)
                temporary.replace(path)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            raise TransientError(f"{path}: cannot be written ({error.strerror})") from error

    def delete(self, key: str) -> None:
        try:
            (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise TransientError(f"{self._root / key}: cannot be deleted ({error.strerror})") from error

    def stored(self) -> Iterator[StoredObject]:
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # deleted in the meantime
                    status = path.lstat()
                    key = path.relative_to(self._root).as_posix()
                    yield StoredObject(name=key, size_bytes=status.st_size, changed_at=status.st_mtime)
