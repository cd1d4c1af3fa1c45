"""An S3 prefix as a source of assets."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

import botocore.exceptions
import urllib3.exceptions
from s3transfer.exceptions import RetriesExceededError

from db.settings import settings
from db.texts import is_storable_key
from workers.errors import SourceError, TransientError, redact
from workers.storage.asset import PAGE_SIZE, Content, Counted, Listed, Page, SkipReason, check_size
from workers.storage.client import s3_client, store_of_settings
from workers.storage.refusals import SESSION_ERRORS, VENDOR_ERRORS, asset_error, no_answer, source_error

ATTEMPTS = 5  # tries of one request, with the first; pauses up to 15 s in all (botocore "standard")

_MOST_KEY_BYTES = 1024  # S3's own limit


class Bucket:
    """Objects of an S3 bucket whose keys start with a prefix. A key is a name, not a path: `..` has no meaning."""

    def __init__(self, address: str, *, endpoint: str | None) -> None:
        """address: `bucket` or `bucket/prefix`; a slash is added to the prefix if it has none."""
        self._bucket, _, prefix = address.partition("/")
        if not self._bucket:
            raise SourceError(f"s3://{address}: no bucket; expected s3://bucket/prefix")
        self._prefix = prefix if not prefix or prefix.endswith("/") else prefix + "/"
        self._store = store_of_settings(endpoint)
        payer = settings().s3_request_payer
        self._payer = {"RequestPayer": payer} if payer else {}

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def check(self) -> None:
        try:
            # Two tries, not five: a person waits, and a wrong address stays wrong.
            self._request(2, "list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except TransientError as error:
            raise no_answer(self.uri(""), redact(self._store.endpoint or "AWS"), error) from error

    def list(self, after: str = "", *, upto: str | None = None) -> Iterator[Page]:
        """`Source.list`, of the keys up to `upto` alone; None is no bound."""
        # The token continues this listing. StartAfter continues a listing that a dead process began.
        where: dict[str, str] = {"StartAfter": self._prefix + after} if after else {}
        cursor = after
        while True:
            answer = self._request(ATTEMPTS, "list_objects_v2", Prefix=self._prefix, MaxKeys=PAGE_SIZE, **where)
            contents = answer.get("Contents", [])
            if any("Key" not in entry or "Size" not in entry for entry in contents):
                raise SourceError(f"{self.uri('')}: the store lists an object without a key or a size")
            wanted = contents if upto is None else [one for one in contents if one["Key"] <= self._prefix + upto]
            page = self._page(wanted, cursor)
            if page.objects or page.skipped:
                yield page
            cursor = page.cursor
            if not answer.get("IsTruncated") or len(wanted) < len(contents):
                return
            if not (token := answer.get("NextContinuationToken")):
                raise SourceError(
                    f"{self.uri('')}: the store says that its listing goes on after {cursor!r}, but not how"
                )
            where = {"ContinuationToken": token}

    def named(self, key: str, size_bytes: int | None, etag: str | None) -> Listed | SkipReason:
        if len((self._prefix + key).encode()) > _MOST_KEY_BYTES:
            return SkipReason.NOT_A_KEY
        if key.endswith("/") and not size_bytes:
            return SkipReason.FOLDER_MARKER
        return Listed(key=key, size_bytes=size_bytes or 0, etag=etag or "")

    def read(self, key: str, max_bytes: int) -> bytes:
        return self.read_with_etag(key, max_bytes).content

    def read_with_etag(self, key: str, max_bytes: int) -> Content:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._read_once(key, max_bytes)
            except (botocore.exceptions.HTTPClientError, urllib3.exceptions.HTTPError, OSError) as error:
                # botocore repeats requests, but not a body that breaks off.
                if attempt == ATTEMPTS:
                    raise TransientError(f"{key}: the body broke off {attempt} times: {redact(str(error))}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def copy(
        self,
        key: str,
        into: IO[bytes],
        max_bytes: int = sys.maxsize,
        progress: Callable[[int], object] = lambda done_bytes: None,
    ) -> None:
        """Write an object into a file, in bounded memory. Raises what `read` raises, and what `progress` raises.

        progress: called with the bytes that are written. After a body that broke off they start again at 0.
        """
        for attempt in range(1, ATTEMPTS + 1):
            into.seek(0)
            into.truncate()
            try:
                client = s3_client(self._store, ATTEMPTS)
                counted = Counted(key, into, max_bytes, progress)
                client.download_fileobj(self._bucket, self._prefix + key, counted, ExtraArgs=self._payer)
                return
            except (*VENDOR_ERRORS, *SESSION_ERRORS) as error:
                if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
                    raise  # of `progress`, such as a lease that is lost
                raise asset_error(key, self._bucket, error) from error
            except RetriesExceededError as error:  # boto3's own tries; its text does not say why
                reason = redact(str(error.last_exception))
                raise TransientError(f"{key}: the body broke off in each try: {reason}") from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if attempt == ATTEMPTS:
                    raise TransientError(f"{key}: the body broke off {attempt} times: {redact(str(error))}") from error
            time.sleep(random.uniform(0, 0.1 * 2**attempt))

    def _page(self, contents: Iterable[Mapping[str, Any]], cursor: str) -> Page:
        objects: list[Listed] = []
        skipped: Counter[SkipReason] = Counter()
        for entry in contents:
            key = entry["Key"].removeprefix(self._prefix)
            if not is_storable_key(key):
                skipped[SkipReason.UNSTORABLE_NAME] += 1
                continue  # it cannot be the cursor either, because the cursor is stored too
            cursor = key
            if not key or (entry["Size"] == 0 and key.endswith("/")):  # the prefix itself is no name of an asset
                skipped[SkipReason.FOLDER_MARKER] += 1
            else:
                objects.append(Listed(key=key, size_bytes=entry["Size"], etag=_bare_etag(entry.get("ETag"))))
        return Page(objects=objects, cursor=cursor, skipped=skipped)

    def _read_once(self, key: str, max_bytes: int) -> Content:
        try:
            client = s3_client(self._store, ATTEMPTS)
            answer = client.get_object(Bucket=self._bucket, Key=self._prefix + key, **self._payer)
        except (*VENDOR_ERRORS, *SESSION_ERRORS) as error:
            raise asset_error(key, self._bucket, error) from error
        with answer["Body"] as body:
            expected = answer.get("ContentLength")  # a proxy that sends the body in chunks does not say it
            check_size(key, expected or 0, max_bytes)
            content: bytes = body.read() if expected is not None else body.read(max_bytes + 1)
        check_size(key, len(content), max_bytes)
        if expected is not None and len(content) != expected:
            raise urllib3.exceptions.IncompleteRead(len(content), expected - len(content))
        return Content(content=content, etag=_bare_etag(answer.get("ETag")) or None)

    def _request(self, attempts: int, operation: str, **arguments: object) -> Any:
        """One call about the bucket as a whole. Raises TransientError, or SourceError with the remedy."""
        try:
            return getattr(s3_client(self._store, attempts), operation)(Bucket=self._bucket, **self._payer, **arguments)
        except (*VENDOR_ERRORS, *SESSION_ERRORS) as error:
            raise source_error(self.uri(""), error, anonymous=self._store.anonymous) from error


def _bare_etag(etag: str | None) -> str:
    """An entity tag without its quotes, and without the mark that some gateways set when they compress (RFC 9110)."""
    return (etag or "").removeprefix("W/").strip('"')
