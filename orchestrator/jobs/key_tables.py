"""Keys in Parquet: a list of one's own, or a part of an S3 Inventory. Read in batches, so memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.jobs.named_keys import NamedKey, checked_etag, checked_key, own_key
from workers.errors import SourceError
from workers.storage.asset import SkipReason

_BATCH_ROWS = 5000
_MOST_GROUP_BYTES = 1 << 30  # of the columns that are read; usual row groups have a hundredth of it
_NAMES = {
    "key": ("key",),
    "size": ("size", "size_bytes"),
    "etag": ("etag", "e_tag"),
    "bucket": ("bucket",),
    "is_latest": ("is_latest",),
    "is_delete_marker": ("is_delete_marker",),
}


def read_key_table(
    file: IO[bytes], start: int, *, name: str, bucket: str | None, prefix: str, uri: str
) -> Iterator[NamedKey]:
    """The rows from number `start` on, in order. Positions are numbers of rows.

    A file with a column `bucket` holds whole keys, which begin with `prefix`. In any other file a key is relative to
    the source, or an address there, as `own_key` takes it. Raises SourceError, which names the file.
    """
    try:
        table = pq.ParquetFile(file)
        columns = _columns(table, name)
        row = 0
        for group in range(table.metadata.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            _check_group(table, group, list(columns.values()), name)
            batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns.values()))
            for batch in batches:
                values = {ours: batch.column(theirs).to_pylist() for ours, theirs in columns.items()}
                for i in range(batch.num_rows):
                    row += 1
                    if row > start:
                        one = {ours: column[i] for ours, column in values.items()}
                        yield _named(row, one, bucket=bucket, prefix=prefix, uri=uri)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{name}: cannot be read as Parquet: {str(error)[:200]}") from error


def _columns(table: Any, name: str) -> dict[str, str]:
    """Our name of each column that is used, with the file's."""
    found = {ours: there for ours, names in _NAMES.items() for there in names if there in table.schema_arrow.names}
    if twice := [there for there in found.values() if table.schema_arrow.names.count(there) > 1]:
        raise SourceError(f"{name}: has the column {twice[0]} twice")
    if "key" not in found:
        there = ", ".join(table.schema_arrow.names[:20]) or "none"
        raise SourceError(f"{name}: has no column `key`, only {there[:300]}")
    expected = {"key": pa.types.is_string, "etag": pa.types.is_string, "size": pa.types.is_integer}
    for ours, is_right in expected.items():
        if ours in found:
            kind = table.schema_arrow.field(found[ours]).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (is_right(kind) or (ours != "size" and pa.types.is_large_string(kind))):
                raise SourceError(f"{name}: the column {found[ours]} holds {kind}, expected {_EXPECTED[ours]}")
    return found


_EXPECTED = {"key": "strings", "etag": "strings", "size": "whole numbers"}


def _check_group(table: Any, group: int, columns: list[str], name: str) -> None:
    metadata = table.metadata.row_group(group)
    parts = [metadata.column(n) for n in range(metadata.num_columns)]
    held = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in columns)
    if held > _MOST_GROUP_BYTES:
        raise SourceError(
            f"{name}: row group {group} has {held:,} bytes of keys, at most {_MOST_GROUP_BYTES:,} are read at once: "
            "write it with smaller row groups"
        )


def _named(position: int, row: dict[str, Any], *, bucket: str | None, prefix: str, uri: str) -> NamedKey:
    if row.get("is_latest") is False or row.get("is_delete_marker") is True:
        return NamedKey(position=position, key=SkipReason.NOT_NEWEST)
    if "bucket" in row:
        key = checked_key(row["key"], prefix) if row["bucket"] == bucket else SkipReason.OUTSIDE_SOURCE
    else:
        key = own_key(row["key"], uri)
    size = row.get("size")
    return NamedKey(
        position=position,
        key=key,
        size_bytes=size if isinstance(size, int) and 0 <= size < 2**62 else None,
        etag=checked_etag(row.get("etag")),
    )
