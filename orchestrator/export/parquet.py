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
GROUP_ROWS = 20_000
_GROUP_CHARS = 1 << 24


def export_parquet(job: Job, part: Path, assets: Iterable[LabeledAsset]) -> None:
    """Write assets and their masks as one part OUT/NAME.parquet: OUT/masks/NAME.parquet and OUT/assets/NAME.parquet.

    Each file appears when it is complete. counts is COCO's compressed RLE, exactly as stored; with width and height it
    is what pycocotools decodes. NaN scores are null.
    """
    source = source_of(job)
    with (
        _rows(part.parent / "assets" / part.name) as asset_rows,
        _writing(part.parent / "masks" / part.name, MASKS) as writer,
    ):
        for group in _groups(assets):
            for asset in group:
                asset_rows.add(_asset_row(asset, job, source))
            if any(asset.masks for asset in group):
                writer.write_table(_mask_table(group, job, source))


def _groups(assets: Iterable[LabeledAsset]) -> Iterator[list[LabeledAsset]]:
    """Assets with as many masks as a row group has. So memory does not grow with the job."""
    group: list[LabeledAsset] = []
    masks = chars = 0
    for asset in assets:
        group.append(asset)
        masks += len(asset.masks)
        chars += sum([len(mask.counts) for mask in asset.masks])
        if masks >= GROUP_ROWS or chars >= _GROUP_CHARS or len(group) >= GROUP_ROWS:
            yield group
            group, masks, chars = [], 0, 0
    if group:
        yield group


def _mask_table(assets: Sequence[LabeledAsset], job: Job, source: Source) -> Any:
    """The masks of assets, by columns: to make a row of each mask takes longer than all else here."""
    masks = [mask for asset in assets for mask in asset.masks]
    of_assets = [(asset.asset_id, asset.key, source.uri(asset.key), *reversed(asset.size_hw)) for asset in assets]
    repeats = [of_asset for of_asset, asset in zip(of_assets, assets, strict=True) for _ in asset.masks]
    columns = [
        *(list(column) for column in zip(*repeats, strict=True)),
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
        [job.id] * len(masks),
        [job.model_version] * len(masks),
    ]
    return _table(columns, MASKS)


def export_failed(job: Job, out: Path, failed: Iterable[FailedAsset]) -> None:
    """Write a job's failed assets as OUT/assets/failed.parquet, with the columns of the other assets."""
    source = source_of(job)
    with _rows(out / "assets" / "failed.parquet") as rows:
        for a in failed:
            of_asset = (a.asset_id, a.key, source.uri(a.key))
            rows.add((*of_asset, None, None, 0, False, a.error_kind, a.error, job.id, job.model_version))


def _asset_row(asset: LabeledAsset, job: Job, source: Source) -> tuple[Any, ...]:
    height, width = asset.size_hw
    of_asset = (asset.asset_id, asset.key, source.uri(asset.key), width, height)
    return (*of_asset, len(asset.masks), isinstance(asset, ReviewedAsset), None, None, job.id, job.model_version)


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
            self._writer.write_table(_table(list(zip(*self._rows, strict=True)), ASSETS))
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


def _table(columns: Sequence[Sequence[Any]], schema: Any) -> Any:
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)
