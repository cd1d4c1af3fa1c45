"""An S3 prefix as a source of assets: the one door to boto3."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import boto3
import botocore.client
import botocore.exceptions
import botocore.parsers
import urllib3
import urllib3.exceptions

from db.texts import is_storable
from workers.errors import AssetError, ErrorKind, SourceError, TransientError, redact
from workers.storage.asset import PAGE_SIZE, Listed, Page, SkipReason, check_size

ATTEMPTS = 5  # tries of one request, the first included; back-off up to 15 s in all (botocore "standard")
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 30  # without a single byte
MAX_POOL_CONNECTIONS = 32  # at least as many as threads that fetch in one process


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
            if not is_storable(key):
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
            check_size(key, expected, max_bytes)
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


def has_credentials() -> bool:
    """Whether the environment or a profile names keys for S3."""
    return boto3.Session().get_credentials() is not None


def endpoint_error(endpoint: str) -> str | None:
    """Why nobody answers at the address of an S3-compatible store; None where somebody does, whatever the answer."""
    try:
        urllib3.request("GET", endpoint, timeout=5, retries=False)
    except urllib3.exceptions.HTTPError as error:
        return str(error)
    return None
