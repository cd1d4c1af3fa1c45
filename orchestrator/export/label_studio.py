"""A job's masks as Label Studio tasks with predictions, ready to import."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from db import results
from db.jobs import Job
from db.results import LabeledAsset
from db.reviewed_masks import ReviewedAsset
from db.session import Connection
from orchestrator.export.files import json_text, replacing, source_of
from orchestrator.label_studio.addresses import address_faults, asset_uid, image_address
from orchestrator.label_studio.regions import prediction_task, regions_for
from workers.stored_masks import mask_of_row

_PAGE = 20  # assets whose masks are in memory at once


def export_label_studio(
    db: Connection, job: Job, out: Path, assets: Iterable[LabeledAsset] | None = None, *, local_files: str | None = None
) -> list[str]:
    """Write a job's labeled assets as a JSON list of Label Studio tasks, each with every mask in one prediction.

    assets: instead of the job's labeled ones; reviewed masks become an annotation. local_files: for jobs over a folder,
    Label Studio's LOCAL_FILES_DOCUMENT_ROOT as a path on this machine. Returns notes for people: masks that are not in
    the file, images that Label Studio would not show. Raises PublishError for an image that is not below local_files.
    """
    source = source_of(job)
    masks_left_out = 0
    cut: list[str] = []
    with replacing(out) as file:
        file.write("[")
        for n, asset in enumerate(results.labeled_assets(db, job_id=job.id, page=_PAGE) if assets is None else assets):
            masks = [mask_of_row(mask, asset.size_hw) for mask in asset.masks]
            uri = source.uri(asset.key)
            address = uri if local_files is None else image_address(uri, local_files)
            # `review` finds the stored mask by the region's id. What people left counts anew, so its ids say nothing.
            prefix = "left" if isinstance(asset, ReviewedAsset) else ""
            shown = regions_for(masks, asset_id=f"{prefix}{asset.asset_id}", numbers=[mask.n for mask in asset.masks])
            masks_left_out += shown.left_out
            cut += [asset.key] if address_faults(address) else []
            task = prediction_task(
                image=address,
                asset_id=asset_uid(uri),  # the same id as in `publish`, so that it adopts imported tasks
                size_hw=asset.size_hw,
                model_version=job.model_version,
                regions=shown,
            )
            if isinstance(asset, ReviewedAsset):
                (prediction,) = task.pop("predictions")
                task["annotations"] = [{"result": prediction["result"]}]
            file.write(f"{',' if n else ''}\n{json_text(task)}")
        file.write("\n]\n")
    return _notes(source.uri(""), out.name, local_files, masks_left_out, cut)


def _notes(source: str, name: str, local_files: str | None, masks_left_out: int, cut: Sequence[str]) -> list[str]:
    notes = []
    if source.startswith("file://") and local_files is None:
        notes.append(
            f"{name} names the images by path, which Label Studio cannot show: write it with --local-files ROOT, "
            "the LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT of a server with LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true"
        )
    if source.startswith("file://") and local_files is not None:
        folder = unquote(source.removeprefix("file://")).rstrip("/")
        notes.append(
            f"{name}: the project also needs the images' folder as a source storage of the type Local files "
            f"(Settings, Cloud Storage, Absolute local path {folder}); do not sync it"
        )
    if masks_left_out:
        notes.append(f"{name}: {masks_left_out:,} masks without a single pixel are not in it")
    if cut:
        notes.append(
            f"{name}: Label Studio cannot show {len(cut):,} images, for it cuts addresses at ?, tabs and line ends: "
            f"give the objects other keys; the first is {cut[0]!r}"
        )
    return notes
