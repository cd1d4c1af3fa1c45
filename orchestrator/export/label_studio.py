"""A job's masks as Label Studio tasks with predictions, ready to import."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from db import results
from db.jobs import Job
from db.results import LabeledAsset
from db.reviewed_masks import ReviewedAsset
from db.session import Connection
from orchestrator.export.files import json_text, replacing, source_of
from orchestrator.label_studio.addresses import asset_uid
from orchestrator.label_studio.regions import prediction_task, regions_for
from workers.stored_masks import mask_of_row

# Between two pages nobody talks to the database, which ends sessions that idle in a transaction for a minute: finding
# regions takes up to a second an asset (100 masks on 12 MP).
_SLOW_PAGE = 20
_NO_LIMIT = 1_000_000


def export_label_studio(db: Connection, job: Job, out: Path, assets: Iterable[LabeledAsset] | None = None) -> None:
    """Write a job's labeled assets as a JSON list of Label Studio tasks, each with its masks as one prediction.

    assets: instead of the job's labeled ones; what people reviewed becomes an annotation, with every mask.
    """
    source = source_of(job)
    with replacing(out) as file:
        file.write("[")
        for n, asset in enumerate(
            results.labeled_assets(db, job_id=job.id, page=_SLOW_PAGE) if assets is None else assets
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
            file.write(f"{',' if n else ''}\n{json_text(task)}")
        file.write("\n]\n")
