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
from db.results import FailedAsset, LabeledAsset, StoredMask
from db.reviewed_masks import ReviewedAsset, ReviewedMask
from orchestrator.export.files import beside, json_text, mask_score, round_score, source_of

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
GROUP_ROWS = 20_000
_GROUP_CHARS = 1 << 24


def export_parquet(job: Job, part: Path, assets: Iterable[LabeledAsset]) -> None:
    """Write assets and their masks as one part OUT/NAME.parquet: OUT/masks/NAME.parquet and OUT/assets/NAME.parquet.

    Each file appears when it is complete. counts is COCO's compressed RLE, exactly as stored; with width and height it
    is what pycocotools decodes. NaN scores are null.
    """
    source = source_of(job)
    with (
        _columns(part.parent / "assets" / part.name, ASSETS) as of_assets,
        _columns(part.parent / "masks" / part.name, MASKS) as of_masks,
    ):
        for asset in assets:
            height, width = asset.size_hw
            of_asset = (asset.asset_id, asset.key, source.uri(asset.key), width, height)
            is_reviewed = isinstance(asset, ReviewedAsset)
            of_assets.add_row((*of_asset, len(asset.masks), is_reviewed, None, None, job.id, job.model_version))
            of_masks.add(
                [
                    *([value] * len(asset.masks) for value in of_asset),
                    *_of_masks(asset.masks),
                    *([value] * len(asset.masks) for value in (job.id, job.model_version)),
                ],
                chars=sum([len(mask.counts) for mask in asset.masks]),
            )


def _of_masks(masks: Sequence[StoredMask]) -> list[list[Any]]:
    """The columns from n to verdict. By columns, because a call for each mask takes longer than all else here."""
    return [
        [mask.n for mask in masks],
        [mask.counts for mask in masks],
        [mask.bbox_xywh for mask in masks],
        [mask.area_px for mask in masks],
        [mask_score(mask) for mask in masks],
        [round_score(mask.predicted_iou) for mask in masks],
        [round_score(mask.stability_score) for mask in masks],
        [mask.label for mask in masks],
        [None if mask.prompt is None else json_text(mask.prompt) for mask in masks],
        [str(mask.verdict) if isinstance(mask, ReviewedMask) else None for mask in masks],
    ]


def export_failed(job: Job, out: Path, failed: Iterable[FailedAsset]) -> None:
    """Write a job's failed assets as OUT/assets/failed.parquet, with the columns of the other assets."""
    source = source_of(job)
    with _columns(out / "assets" / "failed.parquet", ASSETS) as columns:
        for a in failed:
            of_asset = (a.asset_id, a.key, source.uri(a.key))
            columns.add_row((*of_asset, None, None, 0, False, a.error_kind, a.error, job.id, job.model_version))


class _Columns:
    """The columns of one file, held until they make a row group."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema
        self._clear()

    def _clear(self) -> None:
        self._columns: list[list[Any]] = [[] for _ in self._schema]
        self._chars = 0

    def add(self, columns: Sequence[Sequence[Any]], *, chars: int) -> None:
        for held, new in zip(self._columns, columns, strict=True):
            held.extend(new)
        self._chars += chars
        if len(self._columns[0]) >= GROUP_ROWS or self._chars >= _GROUP_CHARS:
            self.flush()

    def add_row(self, row: Sequence[Any]) -> None:
        self.add([[value] for value in row], chars=0)

    def flush(self) -> None:
        if not self._columns[0]:
            return
        arrays = [pa.array(values, field.type) for values, field in zip(self._columns, self._schema, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._clear()


@contextmanager
def _columns(out: Path, schema: Any) -> Iterator[_Columns]:
    with beside(out) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        columns = _Columns(writer, schema)
        yield columns
        columns.flush()
