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

from db import results
from db.jobs import Job
from db.results import LabeledAsset, StoredMask
from db.reviewed_masks import ReviewedAsset, ReviewedMask
from db.session import Connection
from orchestrator.export.files import json_text, mask_score, replacing, round_score, source_of
from orchestrator.label_studio.names import DEFAULT_LABEL
from workers.storage.asset import Source


def export_coco(
    db: Connection,
    job: Job,
    out: Path,
    assets: Iterable[LabeledAsset] | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a job's masks as COCO instances: exact, as compressed RLE.

    `images` are the labeled assets, also those without a mask. Failed ones are in the summary. Ids are Postgres's asset
    ids, so two exports of a job agree. file_name is the key, coco_url the asset's address. Masks without a label have
    the category "object". assets: written instead of the job's labeled ones; reviewed masks carry their verdict.
    labels: of the categories, in their order, instead of the job's.
    """
    labels = labels or results.labels_of(db, job_id=job.id) or [DEFAULT_LABEL]
    category_ids = {label: category_id for category_id, label in enumerate(labels, start=1)}
    source = source_of(job)
    with replacing(out) as file, tempfile.TemporaryFile("w+", encoding="utf-8", dir=out.resolve().parent) as images:
        file.write(f'{{"info":{json_text(_info(job))},\n"licenses":[],\n"annotations":[')
        written = 0
        for n, asset in enumerate(results.labeled_assets(db, job_id=job.id) if assets is None else assets):
            # One pass over the database: annotations go into the file at once, the much shorter images aside.
            images.write(f"{',' if n else ''}\n{json_text(_image(asset, source))}")
            annotations: list[str] = []
            for mask in asset.masks:
                # While the job still runs, a new label may appear.
                label = mask.label if mask.label is not None else DEFAULT_LABEL
                category_id = category_ids.setdefault(label, len(category_ids) + 1)
                annotation = _annotation(asset, mask, written + len(annotations) + 1, category_id)
                annotations.append(f"{',' if written or annotations else ''}\n{json_text(annotation)}")
            file.write("".join(annotations))
            written += len(annotations)
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


def _annotation(asset: LabeledAsset, mask: StoredMask, annotation_id: int, category_id: int) -> dict[str, Any]:
    annotation: dict[str, Any] = {
        "id": annotation_id,
        "image_id": asset.asset_id,
        "category_id": category_id,
        "segmentation": {"size": list(asset.size_hw), "counts": mask.counts},
        "area": mask.area_px,
        "bbox": list(mask.bbox_xywh),
        # 1 would make it a crowd, which evaluation ignores and training code drops. It does not mean "this is RLE":
        # readers see that from the dict (pycocotools, and supervision 0.31 with both values).
        "iscrowd": 0,
        "score": mask_score(mask),
        "predicted_iou": round_score(mask.predicted_iou),
        "stability_score": round_score(mask.stability_score),
    }
    if isinstance(mask, ReviewedMask):
        annotation["verdict"] = str(mask.verdict)  # predicted_iou is still the model's value
    return annotation if mask.prompt is None else {**annotation, "prompt": mask.prompt}
