"""A job's masks as Parquet: a row a mask, and beside them a row an asset, so that no asset is lost.

OUT/masks/part-00000.parquet     a row a mask
OUT/assets/part-00000.parquet    a row a labeled asset of the same part, also of one without masks
OUT/assets/failed.parquet        a row a failed asset, with error_kind and error; it has no size
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from db.jobs import Job
from db.results import FailedAsset, LabeledAsset, StoredMask
from db.reviewed_masks import ReviewedAsset, ReviewedMask
from orchestrator.export.files import beside, json_text, mask_score, round_score, source_of
from workers.storage.asset import Source

_OF_ASSET = [("asset_id", pa.int64()), ("key", pa.string()), ("uri", pa.string())]
_SIZE = [("width", pa.int32()), ("height", pa.int32())]
_OF_JOB = [("job_id", pa.int64()), ("model_version", pa.string())]
MASKS = pa.schema(
    [
        *_OF_ASSET,
        *_SIZE,
        ("n", pa.int32()),
        ("counts", pa.string()),
        ("box_xywh", pa.list_(pa.int32(), 4)),
        ("area_px", pa.int64()),
        ("score", pa.float64()),
        ("predicted_iou", pa.float64()),
        ("stability_score", pa.float64()),
        ("label", pa.string()),
        ("prompt", pa.string()),
        ("verdict", pa.string()),
        *_OF_JOB,
    ]
)
ASSETS = pa.schema(
    [
        *_OF_ASSET,
        *_SIZE,
        ("mask_count", pa.int32()),
        ("reviewed", pa.bool_()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
        *_OF_JOB,
    ]
)
# A row group is written when one of these is reached. So memory does not grow with the job.
_GROUP_ROWS = 20_000
_GROUP_CHARS = 1 << 24


def export_parquet(job: Job, part: Path, assets: Iterable[LabeledAsset]) -> None:
    """Write assets and their masks as one part OUT/NAME.parquet: OUT/masks/NAME.parquet and OUT/assets/NAME.parquet.

    Each file appears when it is complete. counts is COCO's compressed RLE, exactly as stored; with width and height it
    is what pycocotools decodes. NaN scores are null.
    """
    source = source_of(job)
    with (
        _rows(part.parent / "assets" / part.name, ASSETS) as asset_rows,
        _rows(part.parent / "masks" / part.name, MASKS) as mask_rows,
    ):
        for asset in assets:
            asset_rows.add(_asset_row(asset, job, source))
            for mask in asset.masks:
                mask_rows.add(_mask_row(asset, mask, job, source), len(mask.counts))


def export_failed(job: Job, out: Path, failed: Iterable[FailedAsset]) -> None:
    """Write a job's failed assets as OUT/assets/failed.parquet, with the columns of the other assets."""
    source = source_of(job)
    with _rows(out / "assets" / "failed.parquet", ASSETS) as rows:
        for a in failed:
            of_asset = (a.asset_id, a.key, source.uri(a.key))
            rows.add((*of_asset, None, None, 0, False, a.error_kind, a.error, job.id, job.model_version))


class _Rows:
    """Rows of one file, held until they make a row group."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._chars = 0

    def add(self, row: tuple[Any, ...], chars: int = 0) -> None:
        self._rows.append(row)
        self._chars += chars
        if len(self._rows) >= _GROUP_ROWS or self._chars >= _GROUP_CHARS:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows, self._chars = [], 0


@contextmanager
def _rows(out: Path, schema: Any) -> Iterator[_Rows]:
    with beside(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        rows = _Rows(writer, schema)
        yield rows
        rows.flush()


def _asset_row(asset: LabeledAsset, job: Job, source: Source) -> tuple[Any, ...]:
    height, width = asset.size_hw
    of_asset = (asset.asset_id, asset.key, source.uri(asset.key), width, height)
    return (*of_asset, len(asset.masks), isinstance(asset, ReviewedAsset), None, None, job.id, job.model_version)


def _mask_row(asset: LabeledAsset, mask: StoredMask, job: Job, source: Source) -> tuple[Any, ...]:
    height, width = asset.size_hw
    return (
        asset.asset_id,
        asset.key,
        source.uri(asset.key),
        width,
        height,
        mask.n,
        mask.counts,
        mask.bbox_xywh,
        mask.area_px,
        mask_score(mask),
        round_score(mask.predicted_iou),
        round_score(mask.stability_score),
        mask.label,
        None if mask.prompt is None else json_text(mask.prompt),
        str(mask.verdict) if isinstance(mask, ReviewedMask) else None,
        job.id,
        job.model_version,
    )
