"""A job's masks as a COCO file.

The export streams: a hundred thousand assets take no more memory than a page of them. The file gets its name only when
it is complete.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from db import results
from db.jobs import Job
from db.results import LabeledAsset
from db.reviewed_masks import ReviewedAsset
from db.session import Connection
from orchestrator.export.files import json_text, replacing, source_of
from orchestrator.export.mask_tables import mask_tables
from orchestrator.export.selection import Selection
from orchestrator.label_studio.names import DEFAULT_LABEL
from workers.storage.asset import Source

_GROUP_ROWS = 4000  # masks that are text at once


def export_coco(
    db: Connection,
    job: Job,
    out: Path,
    assets: Iterable[LabeledAsset] | None = None,
    *,
    labels: Sequence[str] | None = None,
    selection: Selection | None = None,
) -> None:
    """Write a job's masks as COCO instances: exact, as compressed RLE.

    `images` are the labeled assets, also those without a mask. Failed ones are in the summary. Ids are Postgres's asset
    ids, so two exports of a job agree. file_name is the key, coco_url the asset's address. Masks without a label have
    the category "object". assets: written instead of the job's labeled ones; reviewed masks carry their verdict.
    labels: of the categories, in their order, instead of the job's. selection: which masks of bare assets.
    """
    labels = labels or results.labels_of(db, job_id=job.id) or [DEFAULT_LABEL]
    category_ids = {label: category_id for category_id, label in enumerate(labels, start=1)}
    source = source_of(job)
    with replacing(out) as file, tempfile.TemporaryFile("w+", encoding="utf-8", dir=out.resolve().parent) as images:
        file.write(f'{{"info":{json_text(_info(job))},\n"licenses":[],\n"annotations":[')
        written = images_written = 0
        assets = results.bare_assets(db, job_id=job.id) if assets is None else assets
        for group in mask_tables(db, job, assets, selection or Selection(), rows=_GROUP_ROWS):
            # One pass over the database: annotations go into the file at once, the much shorter images aside.
            images.write(_lines([json_text(_image(asset, source)) for asset in group.assets], images_written))
            images_written += len(group.assets)
            file.write(_lines(_annotations(group.masks, category_ids, written + 1), written))
            written += group.masks.num_rows
        categories = [{"id": i, "name": label, "supercategory": ""} for label, i in category_ids.items()]
        file.write(f'\n],\n"categories":{json_text(categories)},\n"images":[')
        images.seek(0)
        shutil.copyfileobj(images, file, 2**20)
        file.write("\n]}\n")


def _info(job: Job) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "description": f"Masks of job {job.id}, {job.name}",
        "version": version("maskfleet"),
        "contributor": "maskfleet",
        "year": now.year,
        "date_created": now.isoformat(timespec="seconds"),
        "url": "",
        "job": job.id,
        "job_name": job.name,
        "source": job.source,
        "model": job.model,
        "model_version": job.model_version,
    }


def _image(asset: LabeledAsset, source: Source) -> dict[str, Any]:
    height, width = asset.size_hw
    uri = source.uri(asset.key)
    image = {"id": asset.asset_id, "file_name": asset.key, "width": width, "height": height, "coco_url": uri}
    return {**image, "reviewed": True} if isinstance(asset, ReviewedAsset) else image


def _lines(objects: Sequence[str], written: int) -> str:
    """Objects of a JSON list in which so many are written."""
    return f"{',' if written and objects else ''}\n" + ",\n".join(objects) if objects else ""


def _annotations(masks: Any, category_ids: dict[str, int], first_id: int) -> list[str]:
    """The annotations of a table of masks, as JSON. New labels, as while the job still runs, get new categories."""
    labels = pc.fill_null(masks["label"], DEFAULT_LABEL).combine_chunks().dictionary_encode()
    of_label = [category_ids.setdefault(label, len(category_ids) + 1) for label in labels.dictionary.to_pylist()]
    box_xywh = [pc.list_element(masks["box_xywh"], i) for i in range(4)]
    members: list[tuple[str, Any]] = [
        ('{"id":', pa.array(range(first_id, first_id + masks.num_rows), pa.int64())),
        (',"image_id":', masks["asset_id"]),
        (',"category_id":', pa.array(of_label, pa.int64()).take(labels.indices)),
        (',"segmentation":{"size":[', masks["height"]),
        (",", masks["width"]),
        ('],"counts":"', pc.replace_substring(masks["counts"], "\\", "\\\\")),  # the one special character in them
        ('"},"area":', masks["area_px"]),
        *zip((',"bbox":[', ",", ",", ","), box_xywh, strict=True),
        # 1 would make it a crowd, which evaluation ignores and training code drops. It does not mean "this is RLE":
        # readers see that from the dict (pycocotools, and supervision 0.31 with both values).
        ('],"iscrowd":0,"score":', _decimal(masks["score"])),
        (',"predicted_iou":', _decimal(masks["predicted_iou"])),
        (',"stability_score":', _decimal(masks["stability_score"])),
    ]
    texts = [part for name, values in members for part in (name, pc.fill_null(pc.cast(values, pa.string()), "null"))]
    # predicted_iou is still the model's value where a person left the mask
    verdict = _or_nothing(',"verdict":"', masks["verdict"], '"')
    prompt = _or_nothing(',"prompt":', masks["prompt"])
    lines: list[str] = pc.binary_join_element_wise(*texts, verdict, prompt, "}", "").to_pylist()
    return lines


def _decimal(scores: Any) -> Any:
    """Scores as JSON numbers. Arrow writes 1.0 as 1, which a strict reader takes for another type."""
    texts = pc.cast(scores, pa.string())
    is_whole = pc.invert(pc.match_substring_regex(texts, "[.e]"))
    return pc.if_else(is_whole, pc.binary_join_element_wise(texts, "0", "."), texts)


def _or_nothing(before: str, values: Any, after: str = "") -> Any:
    """Text around each value, and nothing where there is none."""
    return pc.fill_null(pc.binary_join_element_wise(before, values, after, ""), "")
