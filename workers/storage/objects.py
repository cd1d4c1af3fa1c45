"""Objects that maskfleet writes itself, in a folder or under an S3 prefix. A source of assets is never written.

An object is replaced as a whole: a reader sees the old bytes or the new ones, whatever kills the writer.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import boto3.exceptions
from botocore.exceptions import ClientError

from db.settings import settings
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.storage.asset import PAGE_SIZE, Counted
from workers.storage.bucket import ATTEMPTS, Bucket
from workers.storage.client import s3_client
from workers.storage.folder import Folder, file_error
from workers.storage.refusals import VENDOR_ERRORS, asset_error

_BLOCK_BYTES = 1 << 20


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


def open_objects(place: str) -> Objects:
    """The place at `s3://bucket/prefix` or in a folder of this machine. Does not connect or create it yet.

    Raises SourceError for anything else.
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        return FolderObjects(Path(place).expanduser().absolute())
    if scheme == "s3":
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


class BucketObjects(Bucket):
    """Objects under an S3 prefix. S3 itself replaces an object as a whole."""

    def write(self, key: str, content: bytes) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content, **self._payer)
        except VENDOR_ERRORS as error:
            raise asset_error(key, self._bucket, error) from error

    def write_file(self, key: str, path: Path) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.upload_file(str(path), self._bucket, self._prefix + key, ExtraArgs=self._payer)
        except (*VENDOR_ERRORS, boto3.exceptions.S3UploadFailedError) as error:
            cause = error.__context__ if isinstance(error, boto3.exceptions.S3UploadFailedError) else error
            raise asset_error(key, self._bucket, cause if isinstance(cause, Exception) else error) from error

    def delete(self, key: str) -> None:
        try:
            client = s3_client(self._store, ATTEMPTS)
            client.delete_object(Bucket=self._bucket, Key=self._prefix + key, **self._payer)
        except VENDOR_ERRORS as error:
            if isinstance(error, ClientError) and error.response["Error"].get("Code") == "NoSuchKey":
                return  # AWS says nothing then, some other stores do
            raise asset_error(key, self._bucket, error) from error

    def stored(self) -> Iterator[StoredObject]:
        where: dict[str, str] = {}
        while True:
            answer = self._request(ATTEMPTS, "list_objects_v2", Prefix=self._prefix, MaxKeys=PAGE_SIZE, **where)
            for entry in answer.get("Contents", []):
                name = entry["Key"].removeprefix(self._prefix)
                changed_at = entry["LastModified"].timestamp()
                yield StoredObject(name=name, size_bytes=entry["Size"], changed_at=changed_at)
            if not answer.get("IsTruncated"):
                return
            where = {"ContinuationToken": answer["NextContinuationToken"]}
