"""The masks of an export as Arrow tables, for the formats that are written by columns.

Postgres writes CSV and Arrow reads it, so that no mask becomes Python values: those took most of an export's time. What
people left comes as Python values, for each of its masks is looked at. It gets the same columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from db.jobs import Job
from db.results import MASK_CSV_COLUMNS, BareAsset, LabeledAsset, masks_csv
from db.reviewed_masks import ReviewedMask
from db.session import Connection
from orchestrator.export.files import json_text, source_of
from orchestrator.export.parts import Counted
from orchestrator.export.selection import Selection
from orchestrator.label_studio.names import DEFAULT_LABEL

OF_ASSET = [("asset_id", pa.int64()), ("key", pa.string()), ("uri", pa.string())]
SIZE = [("width", pa.int32()), ("height", pa.int32())]
OF_JOB = [("job_id", pa.int64()), ("model_version", pa.string())]
MASKS = pa.schema(
    [
        *OF_ASSET,
        *SIZE,
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
        *OF_JOB,
    ]
)
# A table ends with the asset that reaches one of these. So memory does not grow with the job.
GROUP_ROWS = 20_000
_GROUP_CHARS = 1 << 24
_CHARS_A_COLUMN = 3  # of a mask's counts: an object has two runs in most columns of pixels, of one or two characters
_MOST_BLOCK_BYTES = 2**31 - 1  # of Arrow's CSV reader, which has 32 bits for it
_TYPES = {field.name: field.type for field in MASKS}
_CSV_TYPES = {name: _TYPES.get(name, pa.int32()) for name in MASK_CSV_COLUMNS}  # the box is in four columns there
_FOUND = pa.schema([("place", pa.int32()), *(MASKS.field(name) for name in MASKS.names[5:9] + MASKS.names[10:15])])


@dataclass(frozen=True, slots=True)
class MaskTable:
    """Some assets of an export. masks: their masks as MASKS, in their order; NaN scores are null. mask_counts: of each
    asset.
    """

    assets: Sequence[LabeledAsset]
    masks: Any
    mask_counts: Sequence[int]


def mask_tables(
    db: Connection, job: Job, assets: Iterable[LabeledAsset], selection: Selection, *, rows: int = GROUP_ROWS
) -> Iterator[MaskTable]:
    """The assets in groups of about so many masks. Bare ones get their masks here, as `selection` wants them, and a
    `Counted` is told how many.

    While one table is used, a thread reads the next one. So until the end `db` and `assets` are for this alone.
    """
    tables = _tables(db, job, assets, selection, rows)
    with ThreadPoolExecutor(1, thread_name_prefix="masks") as reading:
        ahead = reading.submit(next, tables, None)
        while (table := ahead.result()) is not None:
            ahead = reading.submit(next, tables, None)
            yield table


def _tables(
    db: Connection, job: Job, assets: Iterable[LabeledAsset], selection: Selection, rows: int
) -> Iterator[MaskTable]:
    source = source_of(job)
    for group in _groups(assets, rows):
        bare = [asset for asset in group if isinstance(asset, BareAsset)]
        found = _wanted(_read(db, job, bare), selection) if bare else _given(group)
        if bare and isinstance(assets, Counted):
            assets.masks += found.num_rows
        place = found["place"]
        of_asset = [(asset.asset_id, asset.key, source.uri(asset.key), *reversed(asset.size_hw)) for asset in group]
        by_asset = zip(MASKS.names[:5], zip(*of_asset, strict=True), strict=True)
        columns = {
            **{name: pa.array(values, _TYPES[name]).take(place) for name, values in by_asset},
            **{name: found[name] for name in _FOUND.names[1:]},
            "score": _score(found["predicted_iou"], found["verdict"]),
            "predicted_iou": _finite(found["predicted_iou"]),
            "stability_score": _finite(found["stability_score"]),
            "job_id": pa.repeat(pa.scalar(job.id, pa.int64()), found.num_rows),
            "model_version": pa.repeat(job.model_version, found.num_rows),
        }
        masks = pa.table([columns[name] for name in MASKS.names], schema=MASKS)
        yield MaskTable(group, masks, np.bincount(place.to_numpy(), minlength=len(group)).tolist())


def _groups(assets: Iterable[LabeledAsset], rows: int) -> Iterator[list[LabeledAsset]]:
    group: list[LabeledAsset] = []
    masks = chars = 0
    for asset in assets:
        group.append(asset)
        if isinstance(asset, BareAsset):
            masks += asset.mask_count
            chars += asset.mask_count * asset.size_hw[1] * _CHARS_A_COLUMN
        else:
            masks += len(asset.masks)
            chars += sum([len(mask.counts) for mask in asset.masks])
        if masks >= rows or chars >= _GROUP_CHARS or len(group) >= rows:
            yield group
            group, masks, chars = [], 0, 0
    if group:
        yield group


def _read(db: Connection, job: Job, assets: Sequence[BareAsset]) -> Any:
    """The stored masks of assets as _FOUND. place: of the mask's asset among them."""
    ids = [asset.asset_id for asset in assets]
    content = masks_csv(db, job_id=job.id, asset_ids=ids)
    if not content:
        return _FOUND.empty_table()
    # One block: a row of more than two blocks would be an error, and counts have no limit.
    block_size = min(len(content), _MOST_BLOCK_BYTES)
    rows = csv.read_csv(
        pa.BufferReader(content),
        read_options=csv.ReadOptions(column_names=list(MASK_CSV_COLUMNS), block_size=block_size),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=_CSV_TYPES, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    ).combine_chunks()
    boxes = np.stack([rows[name].to_numpy() for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")], axis=1)
    columns = {
        **{name: rows[name] for name in MASK_CSV_COLUMNS},
        "place": pc.index_in(rows["asset_id"], value_set=pa.array(ids, pa.int64())),
        "box_xywh": pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4),
        "verdict": pa.nulls(rows.num_rows, pa.string()),
    }
    found = pa.table([columns[name] for name in _FOUND.names], schema=_FOUND)
    is_in_order = ids == sorted(ids)  # of keys, which assets have; those of a sharded listing do not
    return found if is_in_order else found.take(pc.sort_indices(found["place"]))


def _given(assets: Sequence[LabeledAsset]) -> Any:
    """Masks that are Python values, as _FOUND."""
    masks = [mask for asset in assets for mask in asset.masks]
    columns = [
        [place for place, asset in enumerate(assets) for _ in asset.masks],
        [mask.n for mask in masks],
        [mask.counts for mask in masks],
        [mask.bbox_xywh for mask in masks],
        [mask.area_px for mask in masks],
        [mask.predicted_iou for mask in masks],
        [mask.stability_score for mask in masks],
        [mask.label for mask in masks],
        [None if mask.prompt is None else json_text(mask.prompt) for mask in masks],
        [str(mask.verdict) if isinstance(mask, ReviewedMask) else None for mask in masks],
    ]
    return pa.table([pa.array(v, field.type) for v, field in zip(columns, _FOUND, strict=True)], schema=_FOUND)


def _wanted(found: Any, selection: Selection) -> Any:
    """The masks that an export is asked for, as `Selection.assets` chooses them."""
    if selection.min_score is not None:
        found = found.filter(pc.greater_equal(found["predicted_iou"], selection.min_score))
    if selection.min_area_px > 0:
        found = found.filter(pc.greater_equal(found["area_px"], selection.min_area_px))
    if selection.labels:
        labels = pa.array(sorted(selection.labels), pa.string())
        found = found.filter(pc.is_in(pc.fill_null(found["label"], DEFAULT_LABEL), value_set=labels))
    return found


def _score(predicted_iou: Any, verdict: Any) -> Any:
    """0..1. 1 for a mask that a person confirmed; else the predicted IoU, SAM's estimate, which may exceed 1."""
    in_range = pc.and_(pc.greater(predicted_iou, 0.0), pc.less_equal(predicted_iou, 1.0))
    above = pc.and_(pc.greater(predicted_iou, 1.0), pc.is_finite(predicted_iou))
    of_model = pc.if_else(in_range, predicted_iou, pc.cast(above, pa.float64()))
    return pc.if_else(pc.is_valid(verdict), 1.0, of_model)


def _finite(score: Any) -> Any:
    return pc.if_else(pc.is_finite(score), score, pa.scalar(None, pa.float64()))
