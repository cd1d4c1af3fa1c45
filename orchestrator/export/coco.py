"""A job's results as files: COCO, Label Studio tasks, the summary. PNG files are `png`'s, the page is `gallery`'s.

Everything streams, so that a hundred thousand assets take no more memory than a page of them, and appears under its
name only when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection

from db import jobs as queries
from db.annotations import ReviewedAsset, ReviewedMask
from db.jobs import Job, LabeledAsset, StoredMask
from db.settings import settings
from orchestrator.export.png import export_png as export_png
from orchestrator.label_studio.client import asset_uid
from orchestrator.label_studio.regions import DEFAULT_LABEL, prediction_task, regions_for
from orchestrator.terminal.jobs import detector_report, prompts_report, text_report
from workers.masks import Mask
from workers.storage.source import Source, open_source

# Between two pages nobody talks to the database, which ends sessions that idle in a transaction for a minute: finding
# regions takes up to a second an asset (100 masks on 12 MP).
_SLOW_PAGE = 20
_NO_LIMIT = 1_000_000


@contextmanager
def replacing(out: Path) -> Iterator[IO[str]]:
    """Open a text file beside `out` that takes its place when the block ends well, and disappears when it does not.

    A reader sees the old file or the whole new one. Raises FileExistsError where `out` is a folder or a device.
    """
    target = out.resolve()
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{out}: expected the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.{target.name[-200:]}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def export_coco(db: Connection, job: Job, out: Path, assets: Iterable[LabeledAsset] | None = None) -> None:
    """Write a job's masks as COCO instances, exact, as compressed RLE.

    `images` are the labeled assets, those without a mask too; failed ones are in the summary. Ids are Postgres's asset
    ids, so two exports of a job agree; file_name is the key, coco_url the asset's address. Masks without a label are of
    the category "object". assets: instead of the job's labeled ones; what people reviewed says so.
    """
    labels = queries.labels_of(db, job_id=job.id) or [DEFAULT_LABEL]
    category_ids = {label: category_id for category_id, label in enumerate(labels, start=1)}
    source = _source(job)
    with replacing(out) as file, tempfile.TemporaryFile("w+", encoding="utf-8", dir=out.resolve().parent) as images:
        file.write(f'{{"info":{_json(_info(job))},\n"licenses":[],\n"annotations":[')
        annotation_id = 0
        for n, asset in enumerate(queries.labeled_assets(db, job_id=job.id) if assets is None else assets):
            # One pass over the database: annotations straight away, the much shorter images aside.
            images.write(f"{',' if n else ''}\n{_json(_image(asset, source))}")
            for mask in asset.masks:
                file.write(",\n" if annotation_id else "\n")
                annotation_id += 1
                # A label may come up that was not there a moment ago, while the job still runs.
                label = mask.label if mask.label is not None else DEFAULT_LABEL
                category_id = category_ids.setdefault(label, len(category_ids) + 1)
                file.write(_json(_annotation(asset, mask, annotation_id, category_id)))
        categories = [{"id": i, "name": label, "supercategory": ""} for label, i in category_ids.items()]
        file.write(f'\n],\n"categories":{_json(categories)},\n"images":[')
        images.seek(0)
        shutil.copyfileobj(images, file, 2**20)
        file.write("\n]}\n")


def export_label_studio(db: Connection, job: Job, out: Path, assets: Iterable[LabeledAsset] | None = None) -> None:
    """Write a job's labeled assets as a JSON list of Label Studio tasks, each with its masks as one prediction.

    assets: instead of the job's labeled ones; what people reviewed becomes an annotation, with every mask.
    """
    source = _source(job)
    with replacing(out) as file:
        file.write("[")
        for n, asset in enumerate(
            queries.labeled_assets(db, job_id=job.id, page=_SLOW_PAGE) if assets is None else assets
        ):
            masks = [mask_of_row(mask, asset.size_hw) for mask in asset.masks]
            reviewed = isinstance(asset, ReviewedAsset)
            shown = (
                regions_for(masks, asset_id=asset.asset_id, max_regions=_NO_LIMIT, max_brush=_NO_LIMIT)
                if reviewed
                else regions_for(masks, asset_id=asset.asset_id)
            )
            task = prediction_task(
                image=source.uri(asset.key),
                asset_id=asset_uid(source.uri(asset.key)),  # as `publish` names it, so that it adopts what was imported
                size_hw=asset.size_hw,
                model_version=job.model_version,
                regions=shown,
            )
            if reviewed:
                (prediction,) = task.pop("predictions")
                task["annotations"] = [{"result": prediction["result"]}]
            file.write(f"{',' if n else ''}\n{_json(task)}")
        file.write("\n]\n")


def write_summary(db: Connection, job: Job, out: Path, seconds: float) -> dict[str, Any]:
    """Write what became of a job as one JSON document, and return it. seconds: how long the caller took for it."""
    counts = queries.count_job(db, job_id=job.id)
    failed = queries.failed_assets(db, job_id=job.id)
    busy = queries.busy_share(db, job_id=job.id)
    summary = {
        "job": job.id,
        "name": job.name,
        "state": str(job.state),
        "source": job.source,
        "model": job.model,
        "model_version": job.model_version,
        "assets": {"listed": counts.listed, "labeled": counts.labeled, "failed": counts.failed},
        "pending": counts.pending,
        "answered_from_stored": counts.reused,
        "without_prompts": counts.without_prompts,
        "prompts": prompts_report(db, job),
        "detector": detector_report(db, job),
        "text": text_report(db, job),
        "skipped": job.skipped,
        "masks": counts.masks,
        "failed_by_kind": counts.failed_by_kind,
        "failed": [{"key": a.key, "error_kind": a.error_kind, "error": a.error} for a in failed],
        "seconds": round(seconds, 3),
        "model_busy_share": None if busy is None else round(busy, 3),
    }
    with replacing(out) as file:
        json.dump(summary, file, ensure_ascii=False, indent=1)
        file.write("\n")
    return summary


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
        # Not what says "this is RLE": readers see that by the dict (pycocotools, supervision 0.31 with either value).
        # 1 would make it a crowd, which evaluation ignores and training code drops.
        "iscrowd": 0,
        # SAM's estimate may exceed 1, which is no score.
        "score": min(1.0, max(0.0, _number(mask.predicted_iou) or 0.0)),
        "predicted_iou": _number(mask.predicted_iou),
        "stability_score": _number(mask.stability_score),
    }
    if isinstance(mask, ReviewedMask):
        # A person vouches for it; predicted_iou is still what the model said of a mask of its own.
        annotation |= {"score": 1.0, "verdict": str(mask.verdict)}
    return annotation if mask.prompt is None else {**annotation, "prompt": mask.prompt}


def mask_of_row(mask: StoredMask, size_hw: tuple[int, int]) -> Mask:
    """A stored mask in the frame of its asset, which its row does not repeat."""
    return Mask(
        counts=mask.counts,
        size_hw=size_hw,
        bbox_xywh=mask.bbox_xywh,
        area_px=mask.area_px,
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        label=mask.label,
        prompt=mask.prompt,
    )


def _source(job: Job) -> Source:
    """For addresses alone: nothing is read."""
    return open_source(job.source, s3_endpoint=settings().s3_endpoint)


def _number(value: float | None) -> float | None:
    """JSON has no NaN, and what a model says may be one."""
    return value if value is not None and math.isfinite(value) else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
