"""A job's masks as two YOLO datasets, segmentation and detection, with splits and data.yaml.

    OUT/segment/data.yaml                     the classes, and where the splits are
    OUT/segment/labels/SPLIT/<asset_id>.txt   a mask a line: class x y x y …, 0..1 of width and height
    OUT/segment/images/SPLIT/                 the images, with `images`; else put them there, with these names
    OUT/detect/…                              the same with boxes: class x-centre y-centre width height
    OUT/images.jsonl                          a line an image: its file, key and address

Names are asset ids, because two keys may have the same file name. An asset's split depends only on its key, so it
stays when others come: about 80 % train, 10 % val, 10 % test. YOLO has one outline for a mask. So holes and parts are
joined to it by lines without width. The outline has an IoU of 0.98 or more if 400 points are enough. Only COCO keeps
masks exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from db import results
from db.jobs import Job
from db.results import LabeledAsset, StoredMask
from db.session import Connection
from db.settings import settings
from orchestrator.export.files import new_folder
from orchestrator.export.yolo_images import file_name, has_known_suffix, read_image, write_image
from orchestrator.label_studio.names import DEFAULT_LABEL
from orchestrator.shapes.polygons import Polygons, fit_polygons
from orchestrator.shapes.rasterise import Ring
from orchestrator.shapes.runs import edges_of_masks
from workers.storage.source import open_source

_SETS = ("segment", "detect")
_SPLITS = ("train", "val", "test")
_PAGE = 20
_MIN_IOU = 0.98  # an outline below this has lost more than 2 % of its mask


@dataclass(slots=True)
class _Told:
    """What outlines and images lost in the export, for the notes at the end."""

    masks: int = 0
    empty: int = 0  # masks without a pixel
    poor: int = 0  # outlines under _MIN_IOU, and boxes in place of an outline
    boxes: int = 0
    converted: int = 0  # images that became PNG or got another suffix
    unread: int = 0  # images that trainers do not read, because of their names

    def notes(self, *, images: bool) -> list[str]:
        notes = []
        if self.poor:
            boxes = f", {self.boxes:,} of them a box, for there is no outline" if self.boxes else ""
            notes.append(
                f"{self.poor:,} of {self.masks:,} outlines lost more than 2 % of their mask (IoU under {_MIN_IOU})"
                f"{boxes}: YOLO knows one outline a mask, --format coco keeps masks exactly"
            )
        if self.empty:
            notes.append(f"{self.empty:,} masks without a single pixel are not in it")
        if self.converted:
            notes.append(f"{self.converted:,} images got a name or a format that trainers read; images.jsonl has both")
        if self.unread:
            remedy = "they are no pictures any more" if images else "--images writes them so that they are read"
            notes.append(f"{self.unread:,} images have names without a suffix that trainers know: {remedy}")
        return notes


def export_yolo(
    db: Connection,
    job: Job,
    out: Path,
    assets: Iterable[LabeledAsset] | None = None,
    *,
    images: bool = False,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """Write both datasets into a new folder. It appears when all is there. assets: instead of the labeled ones.

    An asset without masks has an empty file; YOLO takes it as background. images: copy the images too, unchanged if
    trainers can read them. Readers must apply EXIF's orientation, as OpenCV and Pillow's exif_transpose do; where
    OpenCV does not, the copy is an upright PNG.
    labels: of the classes, in their order, instead of the job's.
    Returns notes for people about the dataset. Raises FileExistsError if `out` is not new or empty, and AssetError for
    an image that is gone.
    """
    source = open_source(job.source, s3_endpoint=settings().s3_endpoint)
    labels = labels or results.labels_of(db, job_id=job.id) or [DEFAULT_LABEL]
    classes = {label: n for n, label in enumerate(labels)}
    used: set[str] = set()
    told = _Told()
    with new_folder(out) as folder, (folder / "images.jsonl").open("w", encoding="utf-8") as index:
        for kind in ("labels", "images"):
            for name in _SETS:
                for part in _SPLITS:
                    (folder / name / kind / part).mkdir(parents=True)
        for asset in results.labeled_assets(db, job_id=job.id, page=_PAGE) if assets is None else assets:
            part = split(asset.key)
            used.add(part)
            _write_labels(asset, folder, part, classes, told)
            name = file_name(asset.asset_id, asset.key)
            if images:
                data, suffix = read_image(source, asset.key)
                own, name = name, f"{asset.asset_id}{suffix}"
                told.converted += name != own
                write_image(data, [folder / kind / "images" / part / name for kind in _SETS])
            told.unread += not has_known_suffix(name)
            line = {"file": f"images/{part}/{name}", "key": asset.key, "uri": source.uri(asset.key)}
            index.write(json.dumps(line, ensure_ascii=False) + "\n")
        for name in _SETS:
            (folder / name / "data.yaml").write_text(_data_yaml(list(classes), used), encoding="utf-8")
    return told.notes(images=images)


def split(key: str) -> str:
    """The part of the dataset for a key: train, val or test. It never changes."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 10
    return "val" if place == 8 else "test" if place == 9 else "train"


def _write_labels(asset: LabeledAsset, folder: Path, part: str, classes: dict[str, int], told: _Told) -> None:
    masks = [mask for mask in asset.masks if mask.area_px > 0]
    told.masks += len(masks)
    told.empty += len(asset.masks) - len(masks)
    height, width = asset.size_hw
    segments, boxes = [], []
    for mask, polygons in zip(masks, _outlines(masks, asset.size_hw), strict=True):
        label = mask.label if mask.label is not None else DEFAULT_LABEL
        number = classes.setdefault(label, len(classes))
        x, y, w, h = mask.bbox_xywh
        boxes.append(_line(number, [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]))
        told.poor += polygons is None or polygons.iou < _MIN_IOU
        told.boxes += polygons is None
        if polygons is None:
            ring = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) * (100 / width, 100 / height)
        else:
            ring = _joined(polygons.rings)
        segments.append(_line(number, (ring.clip(0, 100) / 100).ravel().tolist()))
    for name, lines in zip(_SETS, (segments, boxes), strict=True):
        (folder / name / "labels" / part / f"{asset.asset_id}.txt").write_text("".join(lines))


def _outlines(masks: Sequence[StoredMask], size_hw: tuple[int, int]) -> list[Polygons | None]:
    """Polygons of each mask. None for noise without a polygon."""
    return fit_polygons(edges_of_masks([mask.counts for mask in masks], size_hw), size_hw) if masks else []


def _joined(rings: Sequence[Ring]) -> Ring:
    """The rings as one ring. Each is joined at its point nearest to the rings before it."""
    joined = rings[0]
    for ring in rings[1:]:
        gaps = ((joined[:, None, :] - ring[None, :, :]) ** 2).sum(axis=2)
        here, there = np.unravel_index(int(gaps.argmin()), gaps.shape)
        detour = np.concatenate((np.roll(ring, -int(there), axis=0), ring[there : there + 1], joined[here : here + 1]))
        joined = np.concatenate((joined[: here + 1], detour, joined[here + 1 :]))
    return joined


def _line(number: int, values: Sequence[float]) -> str:
    return f"{number} " + " ".join(f"{value:.6f}" for value in values) + "\n"


def _data_yaml(names: Sequence[str], used: set[str]) -> str:
    """There is no `path`, so the splits are beside the file, and the folder can be moved."""
    stand_in = next((part for part in _SPLITS if part in used), _SPLITS[0])
    lines = [f"{part}: images/{part if part in used else stand_in}" for part in _SPLITS]
    if len(used) < len(_SPLITS):
        lines.insert(0, f"# With so few images a split is empty: {stand_in} stands in for it.")
    classes = yaml.safe_dump({"names": dict(enumerate(names))}, allow_unicode=True, width=math.inf)
    return "\n".join([*lines, classes])
