"""Downloads a file of weights over https: resumes, bounds what is read, and checks the sha256."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import httpx

from workers.models.part_file import Progress, Wanted, etag_path, require_room, size_of
from workers.models.spec import WeightsError
from workers.models.weights import kind_of, name_of

# Six attempts with pauses of 1, 2, 4, 8 and 16 s last longer than a router's restart. After a longer outage a person
# resumes with the same command.
ATTEMPTS = 6
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a download is tried. plain_http_on_loopback: for tests; everything else is https."""

    backoff_seconds: float = 1.0
    plain_http_on_loopback: bool = False


class AbsentThere(WeightsError):
    """The server answered that it has no such file (404 or 410)."""


class _Retryable(Exception):
    """A fault of the network or the server. The next attempt may succeed."""


def download(wanted: Wanted, url: str, part: BufferedRandom, progress: Progress, manner: Manner) -> None:
    """Fill `part` with the wanted bytes from this address, in at most ATTEMPTS attempts. Goes on after what it holds.

    After a fault of the network, 408, 429 or 5xx it pauses backoff_seconds, doubled each time, and tries again. Only
    https is allowed, also in redirects. Raises AbsentThere for a 404. Raises WeightsError when the disk has no room,
    when the server refuses or has another file, or after ATTEMPTS failed attempts.
    """
    with _client(manner) as client:
        source = _Source(wanted, url, client, progress)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(manner.backoff_seconds * 2 ** (attempt - 1))
            try:
                _fetch_rest(source, part)
                return
            except (_Retryable, httpx.TransportError) as error:
                fault = str(error) or type(error).__name__
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise WeightsError(f"{wanted.name}: {url}: {error}") from error
    raise WeightsError(
        f"{wanted.name}: {url}: {fault}; {ATTEMPTS} attempts failed, {size_of(part):,} of {wanted.expected} are kept: "
        f"{wanted.remedy}"
    )


def read_small(url: str, *, name: str, max_bytes: int, manner: Manner) -> bytes:
    """The bytes at an address, one try. Raises AbsentThere for a 404, WeightsError for anything else and for more."""
    content = b""
    try:
        with _client(manner) as client, client.stream("GET", url) as response:
            _require_file(response, name, url)
            for block in response.iter_raw():
                content += block
                if len(content) > max_bytes:
                    raise WeightsError(f"{name}: {url} sent more than {max_bytes:,} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise WeightsError(f"{name}: {url}: {str(error) or type(error).__name__}") from error
    return content


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the bytes come from, and the function that is told how many arrived."""

    wanted: Wanted
    url: str
    client: httpx.Client
    progress: Progress


def _client(manner: Manner) -> httpx.Client:
    def refuse_plain_http(request: httpx.Request) -> None:
        on_loopback = manner.plain_http_on_loopback and request.url.host in LOOPBACK_HOSTS
        if request.url.scheme != "https" and not on_loopback:
            raise WeightsError(f"refusing {request.url}: weights are downloaded over https only")

    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(30, connect=10),
        # In a compressed answer, byte ranges would have another meaning.
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [refuse_plain_http]},
    )


def _fetch_rest(source: _Source, part: BufferedRandom) -> None:
    """Append the missing bytes, and check the whole file."""
    wanted = source.wanted
    have = size_of(part)
    require_room(wanted, Path(part.name).parent, have)
    is_whole = wanted.is_exact and have >= wanted.max_bytes
    began_at = have if is_whole else _request_rest(source, part, have)

    part.seek(0)
    sha256 = hashlib.file_digest(part, "sha256").hexdigest()
    if sha256 == wanted.sha256:
        return
    part.truncate(0)
    if began_at > 0:
        raise _Retryable("the bytes of an earlier attempt were not the beginning of this file")
    raise WeightsError(f"{wanted.name}: {source.url} sent {name_of(sha256)}; expected sha256 {wanted.sha256}")


def _request_rest(source: _Source, part: BufferedRandom, have: int) -> int:
    """Request the bytes after the first `have` and append them. Returns the offset at which the answer began."""
    headers = {}
    if have > 0:
        headers["Range"] = f"bytes={have}-"
        # With If-Range, a server sends the whole file if the file has changed, instead of the tail of a new file.
        if etag := _recall_etag(part):
            headers["If-Range"] = etag
    wanted = source.wanted
    with source.client.stream("GET", source.url, headers=headers) as response:
        began_at, total = _accept(source, part, have, response)
        done = began_at
        source.progress(done, total or wanted.max_bytes)
        for block in response.iter_raw():
            part.write(block)
            done += len(block)
            if done > wanted.max_bytes:
                part.truncate(0)
                raise WeightsError(f"{wanted.name}: {source.url} sent more than the {wanted.expected} expected")
            source.progress(done, total or wanted.max_bytes)
    if total is not None and done < total:
        raise _Retryable(f"the connection ended after {done:,} of {total:,} bytes")
    return began_at


def _require_file(response: httpx.Response, name: str, url: str) -> None:
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    if response.status_code in (404, 410):
        raise AbsentThere(f"{name}: {url}: {status}")
    if response.status_code not in (200, 206, 416):
        raise WeightsError(f"{name}: {url}: {status}")


def _accept(source: _Source, part: BufferedRandom, have: int, response: httpx.Response) -> tuple[int, int | None]:
    """Check an answer's head. Returns the offset at which its body begins, and the whole file's size if it is known.

    The offset is `have`, or 0 after emptying `part`. Raises _Retryable or WeightsError for an answer that is not the
    file.
    """
    wanted = source.wanted
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _Retryable(status)
    _require_file(response, wanted.name, source.url)
    content_range = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
    if response.status_code == 200:
        began_at, declared = 0, response.headers.get("Content-Length", "*")
    elif content_range and int(content_range[1]) == have:
        began_at, declared = have, content_range[2]
    else:
        part.truncate(0)
        raise _Retryable(f"{status} does not continue at byte {have:,}")
    total = int(declared) if declared != "*" else None
    if total is not None and (total > wanted.max_bytes or (wanted.is_exact and total != wanted.max_bytes)):
        head = next(response.iter_raw(), b"")
        found = kind_of(head) if began_at == 0 else "another file"
        raise WeightsError(f"{wanted.name}: {source.url} has {found} of {total:,} bytes, expected {wanted.expected}")
    if began_at == 0:
        part.truncate(0)
        _remember_etag(part, response)
    return began_at, wanted.max_bytes if wanted.is_exact else total


def _remember_etag(part: BufferedRandom, response: httpx.Response) -> None:
    etag_path(part).write_text(response.headers.get("ETag", ""))


def _recall_etag(part: BufferedRandom) -> str | None:
    path = etag_path(part)
    etag = path.read_text(errors="replace") if path.exists() else ""
    # If-Range allows only strong tags (RFC 9110, 13.1.5). The pattern has the characters that they may hold.
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else None
