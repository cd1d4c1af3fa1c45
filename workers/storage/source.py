"""Lists and reads the assets of a source, a folder or an S3 prefix: the one door to boto3 and to people's folders.

A source has folder semantics (`s3://bucket/photos` is `photos/…`, never `photos2/…`) and keys are relative to it.
Listing goes in the binary order of the keys' UTF-8, so a listing that was killed goes on after its last cursor.
"""
# ruff: noqa: PTH116, PTH117, PTH118, PTH123
# File names are bytes here, so that one which is not UTF-8 can be told; pathlib knows only str.

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import IO, Any, Protocol

import boto3
import botocore.client
import botocore.exceptions
import botocore.parsers
import urllib3.exceptions

from workers.errors import AssetError, ErrorKind, SourceError, TransientError, redact

PAGE_SIZE = 1000  # S3's own limit for a ListObjectsV2 page; folders follow it
ATTEMPTS = 5  # tries of one request, the first included; back-off up to 15 s in all (botocore "standard")
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 30  # without a single byte
MAX_POOL_CONNECTIONS = 32  # at least as many as threads that fetch in one process

# These log whole requests, Authorization and all, for anyone who sets the root logger to DEBUG.
for _name in ("boto3", "botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class SkipReason(StrEnum):
    """Why something in a source is not an asset. Each is counted, none fails the listing."""

    FOLDER_MARKER = "folder_marker"  # zero-byte "…/" objects that consoles leave
    NOT_A_FILE = "not_a_file"  # FIFO, socket, device, dangling link, or a link to a folder or out of the source
    UNSTORABLE_NAME = "unstorable_name"  # not UTF-8, or holds NUL, which Postgres cannot store
    UNREADABLE_FOLDER = "unreadable_folder"  # a subfolder we may not look into (lost+found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One asset as the listing saw it.

    key: relative to the source. etag: S3's, without quotes; for a file "<size>-<mtime_ns>", which changes when the
    file is written.
    """

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Up to PAGE_SIZE consecutive entries of a listing; `list(after=cursor)` goes on behind them."""

    objects: list[Listed]
    cursor: str
    skipped: Mapping[SkipReason, int]


class Source(Protocol):
    """A place with assets. Both kinds may be used from several threads at once."""

    def uri(self, key: str) -> str:
        """The asset's address for people and for Label Studio: `s3://bucket/key` as is, or a `file://` URL."""
        ...

    def check(self) -> None:
        """Return if the source can be listed; raise SourceError saying what to mend if not."""
        ...

    def list(self, after: str = "") -> Iterator[Page]:
        """Yield pages of the keys behind `after` in binary order. Raises SourceError and TransientError."""
        ...

    def read(self, key: str, max_bytes: int) -> bytes:
        """The asset's bytes. Raises AssetError (not_found, forbidden, too_large before the body is read) or
        TransientError."""
        ...


def open_source(source: str, *, s3_endpoint: str | None = None) -> Source:
    """Make a source of `s3://bucket/prefix`, of an absolute path, or of a `file://` URL. Reaches for nothing yet.

    s3_endpoint: of an S3-compatible store; None is AWS. Raises SourceError for anything else, saying what is expected.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Folder(source)
    if scheme == "s3":
        return Bucket(rest, endpoint=s3_endpoint)
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host in ("", "localhost") and slash:
            return Folder("/" + urllib.parse.unquote(path))
    raise SourceError(f"{redact(source)}: expected s3://bucket/prefix, an absolute folder, or file:///folder")


class Folder:
    """Files below one directory. Nothing outside of it is listed or read, whatever a key or a link says."""

    def __init__(self, root: str) -> None:
        if not os.path.isabs(root) or "\0" in root:
            raise SourceError(f"{root!r}: expected an absolute path: workers do not run in your folder")
        self._root = os.fsencode(os.path.normpath(root))

    def uri(self, key: str) -> str:
        return "file://" + urllib.parse.quote(os.path.join(self._root, key.encode()))

    def check(self) -> None:
        _scan(self._root)

    def list(self, after: str = "") -> Iterator[Page]:
        real_root = os.path.realpath(self._root)
        objects: list[Listed] = []
        skipped: Counter[SkipReason] = Counter()
        cursor = after
        for found in _walk(self._root, after.encode()):
            if isinstance(found, SkipReason):
                skipped[found] += 1
            else:
                entry = _stat_file(self._root, real_root, found)
                if isinstance(entry, Listed):
                    objects.append(entry)
                    cursor = entry.key
                elif entry:
                    skipped[entry] += 1
            if len(objects) + skipped.total() >= PAGE_SIZE:
                yield Page(objects=objects, cursor=cursor, skipped=skipped)
                objects, skipped = [], Counter()
        if objects or skipped:
            yield Page(objects=objects, cursor=cursor, skipped=skipped)

    def read(self, key: str, max_bytes: int) -> bytes:
        path = os.path.join(self._root, key.encode())
        if "\0" in key or not _is_inside(path, os.path.realpath(self._root)):
            raise AssetError(ErrorKind.FORBIDDEN, f"{key!r}: leads out of the folder {os.fsdecode(self._root)}")
        try:
            # A FIFO that took the file's place would block an open without O_NONBLOCK for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise AssetError(ErrorKind.NOT_FOUND, f"{key}: is no longer a regular file")
                _check_size(key, status.st_size, max_bytes)
                content = file.read(max_bytes + 1)
        except OSError as error:
            raise _file_error(key, error) from error
        _check_size(key, len(content), max_bytes)  # it may have grown since
        return content


class Bucket:
    """Objects of an S3 bucket whose keys start with a prefix. A key is a name, not a path: `..` in it means nothing."""

    def __init__(self, address: str, *, endpoint: str | None) -> None:
        """address: `bucket` or `bucket/prefix`; a slash is added to the prefix where it has none."""
        self._bucket, _, prefix = address.partition("/")
        if not self._bucket:
            raise SourceError(f"s3://{address}: no bucket; expected s3://bucket/prefix")
        self._prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        self._endpoint = endpoint or None

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def check(self) -> None:
        try:
            # Two tries, not five: a person is waiting, and a wrong address stays wrong.
            self._request(2, "list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except TransientError as error:
            where = redact(self._endpoint or "AWS")
            raise SourceError(
                f"{self.uri('')}: {where} does not answer as an S3 API ({error}); is MASKFLEET_S3_ENDPOINT right?"
            ) from error

    def list(self, after: str = "") -> Iterator[Page]:
        # The token continues this listing; StartAfter is for one that a dead process began.
        where: dict[str, str] = {"StartAfter": self._prefix + after} if after else {}
        cursor = after
        while True:
            answer = self._request(ATTEMPTS, "list_objects_v2", Prefix=self._prefix, MaxKeys=PAGE_SIZE, **where)
            page = self._page(answer.get("Contents", []), cursor)
            if page.objects or page.skipped:
                yield page
            cursor = page.cursor
            if not answer.get("IsTruncated"):
                return
            where = {"ContinuationToken": answer["NextContinuationToken"]}

    def read(self, key: str, max_bytes: int) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._read_once(key, max_bytes)
            except (botocore.exceptions.HTTPClientError, urllib3.exceptions.HTTPError, OSError) as error:
                # botocore retries requests, but not a body that breaks off.
                if attempt == ATTEMPTS:
                    raise TransientError(f"{key}: the body broke off {attempt} times: {redact(str(error))}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def copy(self, key: str, into: IO[bytes]) -> None:
        """Write an object of any size into a file, in bounded memory. Raises what `read` raises but too_large."""
        for attempt in range(1, ATTEMPTS + 1):
            into.seek(0)
            into.truncate()
            try:
                _client(self._endpoint, ATTEMPTS).download_fileobj(self._bucket, self._prefix + key, into)
                return
            except _VENDOR_ERRORS as error:
                raise self._asset_error(key, error) from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if attempt == ATTEMPTS:
                    raise TransientError(f"{key}: the body broke off {attempt} times: {redact(str(error))}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))

    def _page(self, contents: Iterable[Mapping[str, Any]], cursor: str) -> Page:
        objects: list[Listed] = []
        skipped: Counter[SkipReason] = Counter()
        for entry in contents:
            key = entry["Key"].removeprefix(self._prefix)
            if not _is_storable(key):
                skipped[SkipReason.UNSTORABLE_NAME] += 1
                continue  # it cannot be the cursor either: that is stored too
            cursor = key
            if entry["Size"] == 0 and (not key or key.endswith("/")):
                skipped[SkipReason.FOLDER_MARKER] += 1
            else:
                objects.append(Listed(key=key, size_bytes=entry["Size"], etag=entry.get("ETag", "").strip('"')))
        return Page(objects=objects, cursor=cursor, skipped=skipped)

    def _read_once(self, key: str, max_bytes: int) -> bytes:
        try:
            answer = _client(self._endpoint, ATTEMPTS).get_object(Bucket=self._bucket, Key=self._prefix + key)
        except _VENDOR_ERRORS as error:
            raise self._asset_error(key, error) from error
        with answer["Body"] as body:
            expected = answer["ContentLength"]
            _check_size(key, expected, max_bytes)
            content: bytes = body.read()
        if len(content) != expected:
            raise urllib3.exceptions.IncompleteRead(len(content), expected - len(content))
        return content

    def _request(self, attempts: int, operation: str, **arguments: object) -> Any:
        """One call about the bucket as a whole. Raises TransientError, or SourceError with the remedy."""
        try:
            return getattr(_client(self._endpoint, attempts), operation)(Bucket=self._bucket, **arguments)
        except _VENDOR_ERRORS as error:
            raise self._source_error(error) from error

    def _asset_error(self, key: str, error: Exception) -> Exception:
        """What a failed get_object says about the asset: its verdict, or that nothing is known."""
        reason = redact(str(error))
        if isinstance(error, botocore.exceptions.ClientError):
            status, code = _status_and_code(error)
            if status == 404:
                return AssetError(ErrorKind.NOT_FOUND, f"{key}: no longer in s3://{self._bucket} ({code})")
            if status >= 500 or code in _PASSING_CODES:
                return TransientError(f"{key}: {reason}")
            return AssetError(ErrorKind.FORBIDDEN, f"{key}: s3://{self._bucket} refuses it ({status}): {reason}")
        if isinstance(error, _NETWORK_ERRORS):
            return TransientError(f"{key}: {reason}")
        return AssetError(ErrorKind.FORBIDDEN, f"{key}: cannot ask s3://{self._bucket}: {reason}; {_CREDENTIALS}")

    def _source_error(self, error: Exception) -> Exception:
        """What a failed request about the bucket means for the whole source, and what to do."""
        reason = redact(str(error))
        if isinstance(error, botocore.exceptions.ClientError):
            status, code = _status_and_code(error)
            if status >= 500 or code in _PASSING_CODES:
                return TransientError(f"{self.uri('')}: {reason}")
            remedy = _REMEDIES.get(code) or _REMEDIES.get(str(status), "see what the store says")
        elif isinstance(error, _NETWORK_ERRORS):
            return TransientError(f"{self.uri('')}: {reason}")
        elif isinstance(error, botocore.exceptions.ParamValidationError):
            remedy = "check the bucket's name"
        elif isinstance(error, ValueError):  # "Invalid endpoint: …"
            remedy = "check MASKFLEET_S3_ENDPOINT, expected http(s)://host[:port]"
        else:
            remedy = _CREDENTIALS
        return SourceError(f"{self.uri('')}: {reason}; {remedy}")


_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in this process's environment"
_REMEDIES = {
    "NoSuchBucket": "check the bucket's name, and MASKFLEET_S3_ENDPOINT where it is not on AWS",
    "InvalidAccessKeyId": "the store does not know this access key: " + _CREDENTIALS,
    "SignatureDoesNotMatch": "the secret key does not fit the access key: " + _CREDENTIALS,
    "AccessDenied": "the credentials need s3:ListBucket and s3:GetObject on it",
    "301": "the bucket is in another region: set AWS_DEFAULT_REGION to it",
    "401": _CREDENTIALS,
    "403": "the credentials need s3:ListBucket and s3:GetObject on it",
    "404": "check the bucket's name, and MASKFLEET_S3_ENDPOINT where it is not on AWS",
}
# Not about the asset: the store is busy, or this worker's session or clock has run out, which other workers' have not.
_PASSING_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException", "429"}
    | {"RequestTimeout", "InternalError", "ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed"}
)
# ResponseParserError: a proxy or a web server answered in HTML.
_NETWORK_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
)
_VENDOR_ERRORS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
    ValueError,
)

_clients: dict[tuple[int, str | None, int], Any] = {}
_clients_lock = threading.Lock()


def _client(endpoint: str | None, attempts: int) -> Any:
    """The process's client for an endpoint. Clients may be shared between threads; making one may not, nor may a
    connection pool be inherited through a fork, hence the lock and the pid."""
    with _clients_lock:
        known = (os.getpid(), endpoint, attempts)
        if known not in _clients:
            # A session of our own: boto3's default one is shared state, and creating from it is not thread-safe.
            session = boto3.session.Session()
            _clients[known] = session.client(
                "s3",
                endpoint_url=endpoint,
                region_name=session.region_name or "us-east-1",
                config=botocore.client.Config(
                    connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    read_timeout=READ_TIMEOUT_SECONDS,
                    max_pool_connections=MAX_POOL_CONNECTIONS,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    # Stores of other makers have no DNS name a bucket, and not all know the newer checksums.
                    s3={"addressing_style": "path" if endpoint else "auto"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        return _clients[known]


def _status_and_code(error: Any) -> tuple[int, str]:
    """HTTP status and S3's code word of a botocore ClientError."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"]), str(error.response["Error"].get("Code", ""))


def _check_size(key: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise AssetError(ErrorKind.TOO_LARGE, f"{key}: {size_bytes:,} bytes; at most {max_bytes:,} are read")


def _is_storable(key: str) -> bool:
    """True if Postgres can keep the key: no NUL, and no lone surrogate, which UTF-8 cannot say."""
    return "\0" not in key and not any("\ud800" <= character <= "\udfff" for character in key)


def _walk(root: bytes, after: bytes) -> Iterator[bytes | SkipReason]:
    """Yield keys of the files below `root` behind `after`, in binary order, and a reason for each folder left out.

    A folder sorts as its name with a slash, as it does inside whole keys: "a.jpg" < "a/b" < "a0". Holds the names of
    the folders on the way to where it is, and no more.
    """
    on_the_way = [(b"", iter(sorted(_scan(root))))]
    while on_the_way:
        prefix, names = on_the_way[-1]
        name = next(names, None)
        if name is None:
            on_the_way.pop()
            continue
        key = prefix + name
        if not key.endswith(b"/"):
            if key > after:
                yield key
        elif key > after or after.startswith(key):
            try:
                on_the_way.append((key, iter(sorted(_scan(os.path.join(root, key))))))
            except SourceError:
                if os.path.lexists(os.path.join(root, key)):  # else it was removed while we walked
                    yield SkipReason.UNREADABLE_FOLDER


def _scan(directory: bytes) -> list[bytes]:
    """Names in a directory, folders with a slash at the end. Raises SourceError saying why it cannot be read."""
    shown = os.fsdecode(directory)
    try:
        with os.scandir(directory) as entries:
            return [entry.name + b"/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
    except FileNotFoundError as error:
        raise SourceError(f"{shown}: no such folder; check the path, and that it is mounted on this machine") from error
    except NotADirectoryError as error:
        raise SourceError(f"{shown}: is a file; give the folder that holds it") from error
    except OSError as error:
        raise SourceError(f"{shown}: cannot be listed ({error.strerror}); may this user read and enter it?") from error


def _stat_file(root: bytes, real_root: bytes, key: bytes) -> Listed | SkipReason | None:
    """What the entry at `key` is; None if it vanished since its folder was read."""
    path = os.path.join(root, key)
    try:
        name = key.decode()
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            status = os.stat(path)
            if not _is_inside(path, real_root):
                return SkipReason.NOT_A_FILE
    except UnicodeDecodeError:
        return SkipReason.UNSTORABLE_NAME
    except FileNotFoundError:
        return SkipReason.NOT_A_FILE if os.path.lexists(path) else None
    except OSError:
        return SkipReason.NOT_A_FILE  # a link in a circle, or into a folder we may not enter
    if not stat.S_ISREG(status.st_mode):
        return SkipReason.NOT_A_FILE
    return Listed(key=name, size_bytes=status.st_size, etag=f"{status.st_size}-{status.st_mtime_ns}")


def _is_inside(path: bytes, real_root: bytes) -> bool:
    """True if the path, all links followed, is below the root (itself already free of links)."""
    return os.path.realpath(path).startswith(real_root.rstrip(b"/") + b"/")


def _file_error(key: str, error: OSError) -> Exception:
    """What a failed open or read says about the asset; all but "gone" and "forbidden" is the disk's, and may pass."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
        return AssetError(ErrorKind.NOT_FOUND, f"{key}: no longer in the folder ({error.strerror})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return AssetError(ErrorKind.FORBIDDEN, f"{key}: this user may not read the file ({error.strerror})")
    return TransientError(f"{key}: {error.strerror}")
