"""Downloads weights from their authors' servers: resumes, checks the sha256, and puts only whole files in place."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import httpx

from workers.models.files import weights_path
from workers.models.folders import PATTERNS
from workers.models.loading import require_libraries
from workers.models.spec import ModelSpec, WeightsError
from workers.models.weights import kind_of, name_of, remedy, verify

log = logging.getLogger(__name__)

# Six attempts with pauses of 1, 2, 4, 8 and 16 s last longer than a router's restart. After a longer outage a person
# resumes with the same command.
ATTEMPTS = 6
DISK_MARGIN_BYTES = 64 << 20
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

# Called with the bytes on disk and the bytes of the whole file. The first may fall when a server makes us start again.
Progress = Callable[[int, int], None]


class _Retryable(Exception):
    """A fault of the network or the server. The next attempt may succeed."""


def pull(
    spec: ModelSpec,
    progress: Progress | None = None,
    *,
    plain_http_on_loopback: bool = False,
    backoff_seconds: float = 1.0,
) -> Path:
    """Download this model's weights, unless they are present, and return their path.

    Continues where an earlier pull of the same file stopped. The file gets its name only when its sha256 is the pinned
    one. It then replaces a wrong file there. A second pull of the same file waits for the first. After a fault of the
    network, 408, 429 or 5xx it pauses backoff_seconds, doubled each time, and tries again. Only https is allowed, also
    in redirects. plain_http_on_loopback is for tests.

    Raises WeightsError when the disk has no room, when the server refuses or has another file, or after ATTEMPTS failed
    attempts. The received bytes stay for the next pull, unless they are wrong.
    """
    path = weights_path(spec)
    verified = verify(spec)
    if verified.ok:
        return path
    if spec.hub is not None:
        return _pull_folder(spec, spec.hub, path)
    if spec.url is None:
        raise WeightsError(f"{path}: {verified.found}; {remedy(spec)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive_part(path) as part, _client(plain_http_on_loopback) as client:
            if verify(spec).ok:  # we waited for another pull, which downloaded it
                Path(part.name).unlink()
                return path
            _download(_Source(spec, spec.url, client, progress or _show_nothing), part, backoff_seconds)
            os.fsync(part.fileno())
            Path(part.name).replace(path)
            _etag_path(part).unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{spec.name}: cannot download {path}: {error}") from error
    return path


def _pull_folder(spec: ModelSpec, hub: str, folder: Path) -> Path:
    """Download a folder of the hub, with HF_TOKEN if it is gated. Continues where an earlier pull stopped."""
    require_libraries(f"models pull {spec.name}", ("huggingface_hub",))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        snapshot_download(hub, local_dir=folder, allow_patterns=list(PATTERNS))
    except GatedRepoError as error:
        raise WeightsError(
            f"{spec.name}: {hub} is only for people who accept its licence ({spec.licence}): accept it at "
            f"https://huggingface.co/{hub}, set HF_TOKEN to a token of that account, then {remedy(spec)} again"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{spec.name}: cannot download {hub}: {error}; {remedy(spec)} again, or copy its folder to {folder}"
        ) from error
    return folder


@contextmanager
def _exclusive_part(path: Path) -> Iterator[BufferedRandom]:
    """The unfinished download beside `path`, open for appending and locked against other pulls of the same file.

    The lock is on the file itself. So it ends with its process and leaves no lock file behind.
    """
    part_path = path.with_name(f"{path.name}.part")
    while True:
        with part_path.open("a+b") as part:
            _lock(part)
            # While we waited, the holder may have renamed or removed the file. Then our lock protects nothing.
            if _still_at(part_path, part):
                yield part
                return


def _lock(part: BufferedRandom) -> None:
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("%s: another pull is downloading this file; waiting for it", part.name)
        fcntl.flock(part, fcntl.LOCK_EX)


def _still_at(path: Path, file: BufferedRandom) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the bytes come from, and the function that is told how many arrived."""

    spec: ModelSpec
    url: str
    client: httpx.Client
    progress: Progress


def _client(plain_http_on_loopback: bool) -> httpx.Client:
    def refuse_plain_http(request: httpx.Request) -> None:
        on_loopback = plain_http_on_loopback and request.url.host in LOOPBACK_HOSTS
        if request.url.scheme != "https" and not on_loopback:
            raise WeightsError(f"refusing {request.url}: weights are downloaded over https only")

    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(30, connect=10),
        # In a compressed answer, byte ranges would have another meaning.
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [refuse_plain_http]},
    )


def _download(source: _Source, part: BufferedRandom, backoff_seconds: float) -> None:
    """Fill `part` with the pinned bytes, in at most ATTEMPTS attempts."""
    spec = source.spec
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(backoff_seconds * 2 ** (attempt - 1))
        try:
            _fetch_rest(source, part)
            return
        except (_Retryable, httpx.TransportError) as error:
            fault = str(error) or type(error).__name__
        except httpx.HTTPError as error:
            raise WeightsError(f"{spec.name}: {source.url}: {error}") from error
    raise WeightsError(
        f"{spec.name}: {source.url}: {fault}; {ATTEMPTS} attempts failed, {_size(part):,} of {spec.size_bytes:,} bytes "
        f"are kept: {remedy(spec)} again to continue, or copy the file to {weights_path(spec)}"
    )


def _fetch_rest(source: _Source, part: BufferedRandom) -> None:
    """Append the missing bytes, and check the whole file."""
    spec = source.spec
    have = _size(part)
    _require_room(spec, Path(part.name).parent, have)
    began_at = _request_rest(source, part, have) if have < spec.size_bytes else have

    part.seek(0)
    sha256 = hashlib.file_digest(part, "sha256").hexdigest()
    if sha256 == spec.sha256:
        return
    part.truncate(0)
    if began_at > 0:
        raise _Retryable("the bytes of an earlier attempt were not the beginning of this file")
    raise WeightsError(f"{spec.name}: {source.url} sent {name_of(sha256)}; expected sha256 {spec.sha256}")


def _request_rest(source: _Source, part: BufferedRandom, have: int) -> int:
    """Request the bytes after the first `have` and append them. Returns the offset at which the answer began."""
    headers = {}
    if have > 0:
        headers["Range"] = f"bytes={have}-"
        # With If-Range, a server sends the whole file if the file has changed, instead of the tail of a new file.
        if etag := _recall_etag(part):
            headers["If-Range"] = etag
    size_bytes = source.spec.size_bytes
    with source.client.stream("GET", source.url, headers=headers) as response:
        began_at = done = _accept(source, part, have, response)
        source.progress(done, size_bytes)
        for block in response.iter_raw():
            part.write(block)
            done += len(block)
            if done > size_bytes:
                part.truncate(0)
                raise WeightsError(f"{source.spec.name}: {source.url} sent more than the {size_bytes:,} bytes expected")
            source.progress(done, size_bytes)
    if done < size_bytes:
        raise _Retryable(f"the connection ended after {done:,} of {size_bytes:,} bytes")
    return began_at


def _accept(source: _Source, part: BufferedRandom, have: int, response: httpx.Response) -> int:
    """Check an answer's head. Returns the offset at which its body begins: `have`, or 0 after emptying `part`.

    Raises _Retryable or WeightsError for an answer that is not the file.
    """
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise _Retryable(status)
    if response.status_code not in (200, 206, 416):
        raise WeightsError(f"{source.spec.name}: {source.url}: {status}")
    content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status_code == 200:
        began_at, declared = 0, response.headers.get("Content-Length", "*")
    elif content_range and int(content_range[1]) == have:
        began_at, declared = have, content_range[2]
    else:
        part.truncate(0)
        raise _Retryable(f"{status} does not continue at byte {have:,}")
    if declared not in ("*", str(source.spec.size_bytes)):
        head = next(response.iter_raw(), b"")
        found = kind_of(head) if began_at == 0 else "another file"
        raise WeightsError(
            f"{source.spec.name}: {source.url} has {found} of {int(declared):,} bytes, "
            f"expected {source.spec.size_bytes:,} bytes"
        )
    if began_at == 0:
        part.truncate(0)
        _remember_etag(part, response)
    return began_at


def _remember_etag(part: BufferedRandom, response: httpx.Response) -> None:
    _etag_path(part).write_text(response.headers.get("ETag", ""))


def _recall_etag(part: BufferedRandom) -> str | None:
    path = _etag_path(part)
    etag = path.read_text(errors="replace") if path.exists() else ""
    # If-Range allows only strong tags (RFC 9110, 13.1.5). The pattern has the characters that they may hold.
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else None


def _etag_path(part: BufferedRandom) -> Path:
    return Path(f"{part.name}.etag")


def _size(part: BufferedRandom) -> int:
    part.flush()
    return os.fstat(part.fileno()).st_size


def _show_nothing(done_bytes: int, total_bytes: int) -> None:
    pass


def _require_room(spec: ModelSpec, folder: Path, have_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = spec.size_bytes - have_bytes + DISK_MARGIN_BYTES
    if free < needed:
        raise WeightsError(
            f"{spec.name}: {needed / 1e9:.1f} GB must be free in {folder}, but only {free / 1e9:.1f} GB are; "
            "make room, or set MASKFLEET_WEIGHTS_DIR to a folder on a larger disk"
        )
