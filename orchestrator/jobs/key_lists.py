"""`--keys`: a source that is not listed, because a file says which of its keys are meant.

A text file (a key a line), Parquet (a column `key`), or the manifest.json of an S3 Inventory; on disk or s3://. The
content says which it is. It is read as a stream, and the cursor of the listing is a place in it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from orchestrator.jobs.inventory import MOST_MANIFEST_BYTES, parse_inventory, read_inventory
from orchestrator.jobs.named_keys import MOST_KEY_BYTES, NamedKey, own_key
from workers.errors import AssetError, SourceError
from workers.storage.asset import PAGE_SIZE, Listed, Page, SkipReason, Source
from workers.storage.objects import open_objects

_MOST_BYTES = 16 << 30  # of a list that is copied from a bucket
_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\xff\xfe": "text in UTF-16: save it in UTF-8",
    b"\xfe\xff": "text in UTF-16: save it in UTF-8",
    b"PK\3\4": "a zip archive, as spreadsheets are: save it as text",
}


class KeyList:
    """The assets of a source that a list names, in the order of the list. address: as `--keys` has it."""

    def __init__(self, source: Source, address: str) -> None:
        self._source, self._address = source, address
        self._uri = source.uri("")
        bucket, _, self._prefix = self._uri.removeprefix("s3://").partition("/")
        self._bucket = bucket if self._uri.startswith("s3://") else None

    def check(self) -> None:
        """Return if the list can be read. Raises SourceError or TransientError if not."""
        with self._opened(self._address) as file:
            next(self._entries(file, 0), None)

    def list(self, after: str = "") -> Iterator[Page]:
        """Pages of the assets behind a cursor, which is a place in the list and the first letters of its sha256.

        Raises SourceError when the list is another one than that of the cursor.
        """
        with self._opened(self._address) as file:
            digest = _digest(file)
            start = self._place(after, digest)
            objects: list[Listed] = []
            skipped: Counter[SkipReason] = Counter()
            for entry in self._entries(file, start):
                found = self._asset(entry)
                if isinstance(found, Listed):
                    objects.append(found)
                else:
                    skipped[found] += 1
                if len(objects) + skipped.total() >= PAGE_SIZE:
                    yield Page(objects=objects, cursor=f"{entry.position} {digest}", skipped=skipped)
                    objects, skipped = [], Counter()
            if objects or skipped:
                yield Page(objects=objects, cursor=f"{entry.position} {digest}", skipped=skipped)

    def _place(self, cursor: str, digest: str) -> int:
        place, _, listed_digest = cursor.partition(" ")
        if listed_digest and listed_digest != digest:
            raise SourceError(
                f"{self._address}: was changed while its keys were listed: its sha256 begins with {digest}, not with "
                f"{listed_digest}. Put the old file back and resume the job, or make a new job"
            )
        return int(place or 0)

    def _entries(self, file: IO[bytes], start: int) -> Iterator[NamedKey]:
        head = file.read(4096)
        file.seek(0)
        if head[:4] == b"PAR1":
            from orchestrator.jobs.key_tables import read_key_table  # here, because it loads pyarrow

            return read_key_table(
                file, start, name=self._address, bucket=self._bucket, prefix=self._prefix, uri=self._uri
            )
        if kind := next((kind for first, kind in _OTHER_KINDS.items() if head.startswith(first)), None):
            raise SourceError(f"{self._address}: is {kind}. Expected keys in UTF-8, Parquet or a manifest.json")
        if head.lstrip(_BYTE_ORDER_MARK + b" \t\r\n").startswith(b"{"):
            return self._inventory(file, start)
        return _read_lines(file, start, self._uri)

    def _inventory(self, file: IO[bytes], start: int) -> Iterator[NamedKey]:
        content = file.read(MOST_MANIFEST_BYTES + 1)
        if len(content) > MOST_MANIFEST_BYTES:
            raise SourceError(
                f"{self._address}: begins as a manifest.json, but has more than {MOST_MANIFEST_BYTES:,} bytes"
            )
        inventory = parse_inventory(content, name=self._address, bucket=self._bucket)
        return read_inventory(
            inventory, start, lambda key: self._opened(self._data(key)), bucket=self._bucket, prefix=self._prefix
        )

    def _data(self, key: str) -> str:
        """Where a file of an inventory is: in the manifest's bucket; on disk in `data` beside its folder."""
        if self._address.startswith("s3://"):
            return f"s3://{self._address.removeprefix('s3://').partition('/')[0]}/{key}"
        return str(Path(self._address).parents[1] / "data" / Path(key).name)

    def _asset(self, entry: NamedKey) -> Listed | SkipReason:
        if isinstance(entry.key, SkipReason):
            return entry.key
        return self._source.named(entry.key, entry.size_bytes, entry.etag)

    @contextmanager
    def _opened(self, address: str) -> Iterator[IO[bytes]]:
        """A file at the start. An object of a bucket is copied to this machine, for as long as it is read."""
        if not address.startswith("s3://"):
            path = Path(address)
            try:
                if path.exists() and not path.is_file():
                    raise SourceError(f"{address}: is no regular file")
                with path.open("rb") as file:
                    yield file
            except OSError as error:
                raise SourceError(
                    f"{address}: cannot be read here ({error.strerror}): the machine that lists the source reads it"
                ) from error
            return
        place, _, name = address.rpartition("/")
        if place in ("s3:", "s3:/") or not name:
            raise SourceError(f"{address}: expected s3://bucket/key of a list of keys")
        with TemporaryFile() as file:
            try:
                open_objects(place).copy(name, file, _MOST_BYTES)
            except AssetError as error:
                raise SourceError(f"{address}: this list of keys cannot be read: {error}") from error
            file.seek(0)
            yield file


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()[:12]


def _read_lines(file: IO[bytes], start: int, uri: str) -> Iterator[NamedKey]:
    """A text file. Positions are bytes. A line may end in a carriage return and a line feed; empty ones are ignored."""
    file.seek(start)
    position, most = start, 3 * MOST_KEY_BYTES + len(uri.encode()) + len(_BYTE_ORDER_MARK) + 2  # a URL has %C3
    while piece := file.readline(most):
        is_first, position = position == 0, position + len(piece)
        is_too_long = len(piece) == most and not piece.endswith(b"\n")
        rest = piece
        while is_too_long and not rest.endswith(b"\n") and (rest := file.readline(_BLOCK_BYTES)):
            position += len(rest)
        line = (piece.removeprefix(_BYTE_ORDER_MARK) if is_first else piece).rstrip(b"\r\n")
        if not line:
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = "\0"
        key = SkipReason.NOT_A_KEY if is_too_long else own_key(text, uri)
        yield NamedKey(position=position, key=key)
