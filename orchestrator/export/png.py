"""A job's masks as PNG files. They are named by ids, because keys are not valid file names.

    OUT/index.json            one line for each asset: its id, key, size, and its masks with their values and scores
    OUT/<asset_id>.png        label map: 0 is background, n + 1 is mask n; where masks overlap, the smaller is on top
    OUT/<asset_id>/<n>.png    mask n alone and complete, one bit for each pixel

The files are encoded here. OpenCV cannot write palettes, and only workers.images may import Pillow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db import results
from db.jobs import Job
from db.results import LabeledAsset, StoredMask
from db.session import Connection
from orchestrator.export.files import new_folder, round_score
from orchestrator.export.png_file import VOC_PALETTE, encode_png
from orchestrator.shapes.runs import Crop, crop_edges, edges_from_counts

# Writing 100 masks of 12 MP takes a second or two. Pages are short because of the timeouts in `open_engine`.
_PAGE = 10


def export_png(db: Connection, job: Job, out: Path, assets: Iterable[LabeledAsset] | None = None) -> None:
    """Write a job's masks as PNG files into a new folder. It appears when all files are complete.

    assets: written instead of the job's labeled ones. A label map has 8 bits a pixel and the palette of PASCAL VOC.
    With more than 255 masks it has 16 bits of grey. Raises FileExistsError when `out` is a file or a non-empty folder.
    """
    with new_folder(out) as folder, (folder / "index.json").open("w", encoding="utf-8") as index:
        index.write("[")
        for i, asset in enumerate(results.labeled_assets(db, job_id=job.id, page=_PAGE) if assets is None else assets):
            _write_asset(asset, folder)
            entry = json.dumps(_entry(asset), ensure_ascii=False, separators=(",", ":"))
            index.write(f"{',' if i else ''}\n{entry}")
        index.write("\n]\n")


def _write_asset(asset: LabeledAsset, folder: Path) -> None:
    height, width = asset.size_hw
    crops = {mask.n: _crop(mask, asset.size_hw) for mask in asset.masks}
    values = np.uint8 if max(crops, default=0) < 255 else np.uint16

    # Paint the label map, large masks first.
    label_map = np.zeros((height, width), values)
    for mask in sorted(asset.masks, key=lambda mask: (-mask.area_px, -mask.n)):
        _paint(label_map, crops[mask.n], mask.n + 1)
    palette = VOC_PALETTE if values is np.uint8 else None
    (folder / f"{asset.asset_id}.png").write_bytes(encode_png(label_map, palette))

    # Write each mask completely.
    if crops:
        (folder / str(asset.asset_id)).mkdir()
    for n, crop in crops.items():
        alone = np.zeros((height, width), np.bool_)
        _paint(alone, crop, True)
        (folder / str(asset.asset_id) / f"{n}.png").write_bytes(encode_png(alone))


def _crop(mask: StoredMask, size_hw: tuple[int, int]) -> Crop | None:
    """The mask's pixels in its box. None for an empty mask, which has no box."""
    edges = edges_from_counts(mask.counts, size_hw)
    return crop_edges(edges, size_hw) if edges.size else None


def _paint(pixels: NDArray[Any], crop: Crop | None, value: int) -> None:
    if crop is not None:
        width, height = crop.columns.shape
        box = pixels[crop.top : crop.top + height, crop.left : crop.left + width]
        np.copyto(box, value, where=crop.columns.T.view(np.bool_))


def _entry(asset: LabeledAsset) -> dict[str, Any]:
    height, width = asset.size_hw
    masks = [
        {
            "n": mask.n,
            "value": mask.n + 1,
            "label": mask.label,
            "area": mask.area_px,
            "predicted_iou": round_score(mask.predicted_iou),
            "stability_score": round_score(mask.stability_score),
        }
        for mask in asset.masks
    ]
    return {"asset_id": asset.asset_id, "key": asset.key, "width": width, "height": height, "masks": masks}
