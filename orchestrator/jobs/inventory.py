"""S3 Inventory: a manifest.json that names CSV or Parquet files, in which the store has listed a bucket."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any
from urllib.parse import unquote_plus

from orchestrator.jobs.named_keys import NamedKey, checked_etag, checked_key
from workers.errors import SourceError
from workers.storage.asset import SkipReason

MOST_MANIFEST_BYTES = 64 << 20
_MOST_LINE_BYTES = 1 << 16
_FILE_BITS = 40  # a position is the number of the file, and the row in it
_BLOCK_BYTES = 1 << 20

OpenFile = Callable[[str], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A manifest. files: keys in the bucket that holds the inventory, with the MD5 of each. columns: of CSV files."""

    name: str
    file_format: str
    columns: list[str]
    files: list[tuple[str, str]]


def parse_inventory(content: bytes, *, name: str, bucket: str | None) -> Inventory:
    """Raises SourceError for what is no manifest, or that of another bucket than `bucket`."""
    try:
        document = json.loads(content)
        source_bucket, file_format = document["sourceBucket"], document["fileFormat"]
        columns = [column.strip() for column in document["fileSchema"].split(",")] if file_format == "CSV" else []
        files = [(str(one["key"]), str(one["MD5checksum"])) for one in document["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{name}: is no manifest.json of S3 Inventory ({type(error).__name__}: {str(error)[:100]}); expected "
            "sourceBucket, fileFormat, fileSchema and files with key and MD5checksum"
        ) from error
    if file_format not in ("CSV", "Parquet"):
        raise SourceError(f"{name}: its files are {str(file_format)[:20]}, expected CSV or Parquet")
    if file_format == "CSV" and not {"Bucket", "Key"} <= set(columns):
        raise SourceError(f"{name}: fileSchema is {', '.join(columns)[:200]}, expected Bucket and Key among them")
    if any("\0" in key for key, _ in files):
        raise SourceError(f"{name}: names a file with a NUL, which no store has")
    if source_bucket != bucket:
        raise SourceError(f"{name}: lists the bucket {str(source_bucket)[:100]}, the job's is {bucket or 'a folder'}")
    return Inventory(name=name, file_format=file_format, columns=columns, files=files)


def read_inventory(
    inventory: Inventory, start: int, open_file: OpenFile, *, bucket: str | None, prefix: str
) -> Iterator[NamedKey]:
    """The entries from a position on, file by file. Raises SourceError, which names the file."""
    first, row = divmod(start, 1 << _FILE_BITS)
    for number, (key, md5) in islice(enumerate(inventory.files), first, None):
        with open_file(key) as file:
            _check_md5(file, key, md5)
            if inventory.file_format == "CSV":
                entries = _read_csv(file, row, inventory.columns, name=key, bucket=bucket, prefix=prefix)
            else:
                from orchestrator.jobs.key_tables import read_key_table  # here, because it loads pyarrow

                entries = read_key_table(file, row, name=key, bucket=bucket, prefix=prefix, uri="")
            for entry in entries:
                position = (number << _FILE_BITS) + entry.position
                yield NamedKey(position=position, key=entry.key, size_bytes=entry.size_bytes, etag=entry.etag)
        row = 0


def _check_md5(file: IO[bytes], key: str, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    file.seek(0)
    if digest.hexdigest() != md5.lower():
        raise SourceError(f"{key}: its MD5 is {digest.hexdigest()}, its manifest says {md5[:32]}")


def _read_csv(
    file: IO[bytes], start: int, columns: list[str], *, name: str, bucket: str | None, prefix: str
) -> Iterator[NamedKey]:
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            for row, line in enumerate(_lines(unpacked, name), start=1):
                if row > start:
                    [fields] = csv.reader([line.decode()], strict=True)
                    if len(fields) != len(columns):
                        raise SourceError(f"{name}: row {row} has {len(fields)} fields, expected {len(columns)}")
                    yield _named(row, dict(zip(columns, fields, strict=True)), bucket=bucket, prefix=prefix)
    except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
        raise SourceError(f"{name}: cannot be read as gzipped CSV: {str(error)[:200]}") from error


def _lines(file: IO[bytes] | gzip.GzipFile, name: str) -> Iterator[bytes]:
    while line := file.readline(_MOST_LINE_BYTES):
        if len(line) == _MOST_LINE_BYTES:
            raise SourceError(f"{name}: has a line of more than {_MOST_LINE_BYTES:,} bytes")
        if line.strip():
            yield line


def _named(position: int, row: dict[str, Any], *, bucket: str | None, prefix: str) -> NamedKey:
    if row.get("IsLatest", "true") == "false" or row.get("IsDeleteMarker", "false") == "true":
        return NamedKey(position=position, key=SkipReason.NOT_NEWEST)
    key = checked_key(unquote_plus(row["Key"]), prefix) if row["Bucket"] == bucket else SkipReason.OUTSIDE_SOURCE
    size = row.get("Size", "")
    return NamedKey(
        position=position,
        key=key,
        size_bytes=int(size) if size.isdecimal() and len(size) < 19 else None,
        etag=checked_etag(row.get("ETag")),
    )
