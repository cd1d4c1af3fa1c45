"""A job's masks as Parquet: a row a mask, and beside them a row an asset, so that no asset is lost.

OUT/masks/part-00000.parquet     a row a mask
OUT/assets/part-00000.parquet    a row a labeled asset of the same part, also of one without masks
OUT/assets/failed.parquet        a row a failed asset, with error_kind and error; it has no size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from db.jobs import Job
from db.results import FailedAsset, LabeledAsset
from db.reviewed_masks import ReviewedAsset
from db.session import Connection
from orchestrator.export.files import beside, source_of
from orchestrator.export.mask_tables import GROUP_ROWS, MASKS, OF_ASSET, OF_JOB, SIZE, mask_tables
from orchestrator.export.selection import Selection
from workers.storage.asset import Source

ASSETS = pa.schema(
    [
        *OF_ASSET,
        *SIZE,
        ("mask_count", pa.int32()),
        ("reviewed", pa.bool_()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
        *OF_JOB,
    ]
)


def export_parquet(db: Connection, job: Job, selection: Selection, part: Path, assets: Iterable[LabeledAsset]) -> None:
    """Write assets and their masks as one part OUT/NAME.parquet: OUT/masks/NAME.parquet and OUT/assets/NAME.parquet.

    Each file appears when it is complete. counts is COCO's compressed RLE, exactly as stored; with width and height it
    is what pycocotools decodes.
    """
    source = source_of(job)
    with (
        _rows(part.parent / "assets" / part.name) as asset_rows,
        _writing(part.parent / "masks" / part.name, MASKS) as writer,
    ):
        for group in mask_tables(db, job, assets, selection):
            for asset, mask_count in zip(group.assets, group.mask_counts, strict=True):
                asset_rows.add(_asset_row(asset, mask_count, job, source))
            if group.masks.num_rows:
                writer.write_table(group.masks)


def export_failed(job: Job, out: Path, failed: Iterable[FailedAsset]) -> None:
    """Write a job's failed assets as OUT/assets/failed.parquet, with the columns of the other assets."""
    source = source_of(job)
    with _rows(out / "assets" / "failed.parquet") as rows:
        for a in failed:
            of_asset = (a.asset_id, a.key, source.uri(a.key))
            rows.add((*of_asset, None, None, 0, False, a.error_kind, a.error, job.id, job.model_version))


def _asset_row(asset: LabeledAsset, mask_count: int, job: Job, source: Source) -> tuple[Any, ...]:
    height, width = asset.size_hw
    of_asset = (asset.asset_id, asset.key, source.uri(asset.key), width, height)
    return (*of_asset, mask_count, isinstance(asset, ReviewedAsset), None, None, job.id, job.model_version)


class _Rows:
    """Rows of assets, held until they make a row group."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        self._rows.append(row)
        if len(self._rows) >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._writer.write_table(_table(list(zip(*self._rows, strict=True))))
            self._rows = []


@contextmanager
def _rows(out: Path) -> Iterator[_Rows]:
    with _writing(out, ASSETS) as writer:
        rows = _Rows(writer)
        yield rows
        rows.flush()


@contextmanager
def _writing(out: Path, schema: Any) -> Iterator[Any]:
    with beside(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        yield writer


def _table(columns: Sequence[Sequence[Any]]) -> Any:
    arrays = [pa.array(values, field.type) for values, field in zip(columns, ASSETS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ASSETS)
