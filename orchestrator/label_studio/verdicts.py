"""What a person did with each mask of a prediction: compares an annotation's regions with the prediction's.

Pure functions on Label Studio's JSON. Shown and returned regions are compared pixel by pixel. A region is kept if it
covers the same pixels under the same labels, even if the page changed its numbers or its `origin`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from db.annotations import RegionRow
from db.states import AnnotationStatus, Verdict
from db.texts import is_storable, storable
from orchestrator.label_studio.drawn import RegionError, mask_from_region
from orchestrator.label_studio.names import ANSWER_PREFIX, DEFAULT_LABEL
from orchestrator.label_studio.regions import mask_ordinal
from orchestrator.shapes.runs import edges_from_pixels, run_iou
from workers.masks import BoolMask, mask_from_pixels

_DRAWN = ("polygon", "brush", "rectangle", "ellipse", "magicwand")
# Types that are places on a picture for Label Studio's page, and that we do not read.
_NOT_READ = ("keypoint", "vector", "bitmask")
# Types that say something about a region or the whole picture. They repeat the region's id, and often its place.
_ATTRIBUTES = (
    "labels", "choices", "taxonomy", "textarea", "number", "datetime", "rating", "pairwise", "ranker", "relation",
)  # fmt: skip
# A page may write 33.3333 back as 33.33330001. 0.00001 percent of 100,000 pixels is 0.01 pixel.
_SAME_PERCENT = 1e-5
_MAX_ID_CHARS = 100

Region = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The masks of an annotation with their verdicts. unreadable: number of regions that are no masks, or damaged."""

    regions: tuple[RegionRow, ...]
    unreadable: int


def choose(annotations: Iterable[Mapping[str, Any]]) -> dict[int, AnnotationStatus]:
    """The status of a task's annotations, by their ids: which one counts, and what the others are.

    Skipped ones (was_cancelled) never count. Of each annotator's other annotations, the newest by updated_at counts;
    the rest is superseded. If several annotators remain, one marked as ground truth is chosen, else the newest. The
    others are other people's opinions: their time counts, their masks do not.
    """
    statuses = {a["id"]: AnnotationStatus.SKIPPED for a in annotations if a.get("was_cancelled")}
    standing = sorted((a for a in annotations if a["id"] not in statuses), key=_recency, reverse=True)
    seen: set[int | None] = set()
    newest = []
    for annotation in standing:
        person = annotator(annotation)
        statuses[annotation["id"]] = AnnotationStatus.SUPERSEDED if person in seen else AnnotationStatus.OTHER
        if person not in seen:
            newest.append(annotation)
        seen.add(person)
    if newest:
        chosen = max(newest, key=lambda a: (bool(a.get("ground_truth")), *_recency(a)))
        statuses[chosen["id"]] = AnnotationStatus.CHOSEN
    return statuses


def annotator(annotation: Mapping[str, Any]) -> int | None:
    """The id of Label Studio's user. Some answers of the server have an object instead of the id."""
    person = annotation.get("completed_by")
    found = person.get("id") if isinstance(person, Mapping) else person
    return None if found is None else int(found)


def base_prediction(
    annotation: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The prediction that an annotation began from: the one it names, else the one that shares most region ids.

    None for an annotation that was drawn from nothing.
    """
    parent = annotation.get("parent_prediction")
    for prediction in predictions:
        if parent is not None and prediction["id"] == parent:
            return prediction
    ids = _region_ids(annotation)
    shared = [len(ids & _region_ids(prediction)) for prediction in predictions]
    best = int(np.argmax(shared)) if shared else 0
    return predictions[best] if shared and shared[best] > 0 else None


def _region_ids(made: Mapping[str, Any]) -> set[str]:
    return {str(region.get("id")) for region in made.get("result") or () if isinstance(region, Mapping)}


def without_prompts(result: Sequence[Any], prompt_controls: Collection[str]) -> list[Any]:
    """The results of an annotation without a reviewer's prompts: key points and boxes of smart controls, their labels.

    prompt_controls: the names of the project's smart controls, and of their row of labels. A label of that row on a
    drawn region stays: the editor gives it to every region that is drawn while it is chosen.
    """

    def name(region: Any) -> str:
        return str(region.get("from_name")) if isinstance(region, Mapping) else ""

    prompts = {str(r.get("id")) for r in result if name(r) in prompt_controls and r.get("type") != "labels"}
    return [r for r in result if not isinstance(r, Mapping) or str(r.get("id")) not in prompts]


def compare(
    before: Sequence[Region], after: Sequence[Region], *, asset_id: int | None, size_hw: tuple[int, int] | None
) -> Comparison:
    """Judge an annotation's regions, `after`, by the prediction's, `before`.

    asset_id: the asset in the prediction's region ids. None: the prediction is not ours, so all in `after` is added.
    size_hw: the asset's frame. None: not known, so each region's own frame is used.
    A mask's parts belong together. Removing one of two parts is an edit; so is drawing a part with the mask's region
    as its parent. Every other region with pixels was added, together with its children. A mask has one label: the first
    of its region's labels. A second label or a lost label is an edit.
    """
    before, results = [r for r in before if isinstance(r, Mapping)], [r for r in after if isinstance(r, Mapping)]
    shown = _by_mask([r for r in before if _is_drawn(r)], asset_id)
    kept_ids = {str(region.get("id")): n for n, parts in shown.items() for region in parts}
    returned, drawn = _sort(results, kept_ids)
    labels_before, labels = _labels(before), _labels(results)
    rows: list[RegionRow] = []
    unreadable = len(after) - len(results) + _count_unreadable(results)

    # Judge the predicted masks, one by one.
    for n, parts in shown.items():
        row, damaged = _judge(n, _Side(parts, labels_before), _Side(returned.get(n, []), labels), size_hw)
        rows.append(row)
        unreadable += damaged

    # Add the drawn masks.
    for parts in drawn:
        pixels, damaged = _union(parts, size_hw)
        unreadable += damaged
        if pixels is not None and pixels.any():
            row = _drawn_row(Verdict.ADDED, None, _Side(parts, labels).label, pixels, None)
            rows.append(replace(row, region_id=_answer_id(parts[0])))
    return Comparison(regions=tuple(rows), unreadable=unreadable)


@dataclass(frozen=True, slots=True)
class _Side:
    """One mask's regions, as shown or as returned. labels_of: the labels of each region id."""

    regions: Sequence[Region]
    labels_of: Mapping[str, tuple[str, ...]]

    @property
    def label(self) -> str:
        """The mask's own label: the first label of its first region."""
        return next(iter(self.labels_of.get(str(self.regions[0].get("id")), ())), DEFAULT_LABEL)

    @property
    def labels(self) -> set[str]:
        """The labels of all its regions. A region without a label has an empty name."""
        return {label for r in self.regions for label in self.labels_of.get(str(r.get("id"))) or ("",)}


def _judge(n: int, before: _Side, after: _Side, size_hw: tuple[int, int] | None) -> tuple[RegionRow, int]:
    """The verdict on one mask, and how many of its regions could not be read."""
    if not after.regions:
        return RegionRow(verdict=Verdict.DELETED, mask_n=n, label=before.label), 0
    same_labels = before.labels == after.labels
    unmoved = RegionRow(
        verdict=Verdict.KEPT if same_labels else Verdict.EDITED,
        mask_n=n,
        label=after.label,
        iou=None if same_labels else 1.0,
    )
    if _same_regions(before.regions, after.regions):
        return unmoved, 0
    pixels, damaged = _union(after.regions, size_hw)
    if pixels is None:
        # Changed, but not readable. The model's mask stays, and the region is counted as unreadable.
        return RegionRow(verdict=Verdict.EDITED, mask_n=n, label=after.label), damaged
    if not pixels.any():
        return RegionRow(verdict=Verdict.DELETED, mask_n=n, label=before.label), damaged
    shown, _ = _union(before.regions, size_hw)
    iou = run_iou(edges_from_pixels(shown), edges_from_pixels(pixels)) if shown is not None else 0.0
    if iou == 1.0:
        return unmoved, damaged
    return _drawn_row(Verdict.EDITED, n, after.label, pixels, iou), damaged


def _drawn_row(verdict: Verdict, n: int | None, label: str, pixels: BoolMask, iou: float | None) -> RegionRow:
    mask = mask_from_pixels(pixels, predicted_iou=0.0)
    x, y, w, h = (int(side) for side in mask.bbox_xywh)
    return RegionRow(
        verdict=verdict,
        mask_n=n,
        label=label,
        iou=iou,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
    )


def _answer_id(region: Region) -> str | None:
    """The id of a region that began as an answer to a click. None for one that a person drew."""
    own = str(region.get("id"))
    return own if own.startswith(ANSWER_PREFIX) and len(own) <= _MAX_ID_CHARS and is_storable(own) else None


def _by_mask(regions: Sequence[Region], asset_id: int | None) -> dict[int, list[Region]]:
    found: dict[int, list[Region]] = {}
    for region in regions:
        n = None if asset_id is None else mask_ordinal(str(region.get("id", "")), asset_id)
        if n is not None:
            found.setdefault(n, []).append(region)
    return found


def _sort(after: Sequence[Region], mask_of_id: Mapping[str, int]) -> tuple[dict[int, list[Region]], list[list[Region]]]:
    """The annotation's regions by their predicted mask, and the drawn regions, each with its children."""
    returned: dict[int, list[Region]] = {}
    drawn: dict[str, list[Region]] = {}
    regions = [region for region in after if _is_drawn(region)]
    parents = {str(r.get("id")): str(r["parentID"]) for r in regions if r.get("parentID")}
    ids = {str(region.get("id")) for region in regions}
    for region in sorted(regions, key=lambda r: str(r.get("id")) in parents):
        own = root = str(region.get("id"))
        for _ in range(len(parents)):
            if root in mask_of_id or parents.get(root) not in ids | mask_of_id.keys():
                break
            root = parents[root]
        n = mask_of_id.get(own, mask_of_id.get(root))
        if n is not None:
            returned.setdefault(n, []).append(region)
        else:
            drawn.setdefault(root, []).append(region)
    return returned, list(drawn.values())


def _labels(regions: Sequence[Region]) -> dict[str, tuple[str, ...]]:
    """The labels of each region id, in the order found, from all results of the region."""
    labels: dict[str, tuple[str, ...]] = {}
    for region in regions:
        value, kind = region.get("value"), str(region.get("type"))
        if isinstance(value, Mapping) and kind.endswith("labels"):
            names = value.get(kind)
            found = [storable(str(name)) for name in names] if isinstance(names, list) else []
            own = str(region.get("id"))
            labels[own] = tuple(dict.fromkeys([*labels.get(own, ()), *found]))
    return labels


def _is_drawn(region: Region) -> bool:
    return str(region.get("type")).removesuffix("labels") in _DRAWN


def _count_unreadable(regions: Sequence[Region]) -> int:
    """How many regions are places on the picture without a mask. Texts about a drawn region do not count."""
    drawn = {str(region.get("id")) for region in regions if _is_drawn(region)}
    found = [region for region in regions if str(region.get("id")) not in drawn and _has_place(region)]
    return len({str(region.get("id", n)) for n, region in enumerate(found)})


def _has_place(region: Region) -> bool:
    kind = str(region.get("type"))
    return kind.removesuffix("labels") in _NOT_READ or ("original_width" in region and kind not in _ATTRIBUTES)


def _union(regions: Sequence[Region], size_hw: tuple[int, int] | None) -> tuple[BoolMask | None, int]:
    """The pixels of several regions together (None if none could be read), and how many could not be read."""
    pixels: BoolMask | None = None
    damaged = 0
    for region in regions:
        try:
            part = mask_from_region(region, size_hw=size_hw)
        except RegionError:
            damaged += 1
            continue
        pixels = part if pixels is None else pixels | part
    return pixels, damaged


def _same_regions(before: Sequence[Region], after: Sequence[Region]) -> bool:
    values = {str(region.get("id")): _shape(region) for region in before}
    others = {str(region.get("id")): _shape(region) for region in after}
    return values.keys() == others.keys() and all(_same(values[i], others[i]) for i in values)


def _shape(region: Region) -> dict[str, Any]:
    """The parts of a region that decide its pixels."""
    value = region.get("value") if isinstance(region.get("value"), Mapping) else {}
    assert isinstance(value, Mapping)
    kind = str(region.get("type")).removesuffix("labels")
    names = ("rle", "points", "x", "y", "width", "height", "radiusX", "radiusY", "rotation")
    frame = (region.get("original_width"), region.get("original_height"), region.get("image_rotation", 0))
    return {"kind": kind, "frame": frame, **{name: value[name] for name in names if name in value}}


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two shapes are equal. Percents may differ by the small errors of a page's arithmetic."""
    if a.keys() != b.keys() or a["kind"] != b["kind"] or a["frame"] != b["frame"]:
        return False
    for name in a.keys() - {"kind", "frame"}:
        if a[name] == b[name]:
            continue
        if name == "rle":
            return False
        try:
            one, other = np.array(a[name], np.float64), np.array(b[name], np.float64)
        except (ValueError, TypeError, OverflowError):
            return False
        if one.shape != other.shape or not (np.abs(one - other) <= _SAME_PERCENT).all():
            return False
    return True


def _recency(annotation: Mapping[str, Any]) -> tuple[datetime, int]:
    return datetime.fromisoformat(annotation["updated_at"]), int(annotation["id"])
