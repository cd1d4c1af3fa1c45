"""The thresholds of automatic masks that fit a tuned decoder, chosen on images that teach.

A tuned decoder predicts lower IoUs than its base, because they are nearer to the truth. By its base's thresholds most
of its masks would be dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.promptable import Promptable
from workers.engine.suppression import Suppression
from workers.masks import BoolMask
from workers.params import AutomaticParams
from workers.tuning.gathering import Embeddings, Gathered
from workers.tuning.judging import FOUND_IOU, search
from workers.tuning.outcome import Counted

# What is tried beside the base's own settings. Grids only where they are finer than its own: SAM's 32 is the finest,
# because each later job pays for its points.
POINTS_PER_SIDE = (24, 32)
PREDICTED_IOUS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88)
STABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FEWEST_IMAGES, MOST_IMAGES = 2, 20
_SHARE = 0.25  # of the training's seconds
EQUALLY_GOOD = 0.01  # a difference in F1 that says nothing: two objects of 200


Image = tuple[Tensor, Sequence[BoolMask]]  # its embedding, and the masks (H, W) that people left: at least one


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Three of AutomaticParams, by their names. In order: what costs most comes first."""

    points_per_side: int
    pred_iou_thresh: float
    stability_score_thresh: float

    @classmethod
    def of(cls, params: AutomaticParams) -> Thresholds:
        return cls(
            points_per_side=params.points_per_side,
            pred_iou_thresh=params.pred_iou_thresh,
            stability_score_thresh=params.stability_score_thresh,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """own: the thresholds of the model that is tuned. usual: the job's. tried: what all find in `images` images."""

    own: Thresholds
    usual: Thresholds
    chosen: Thresholds
    tried: dict[Thresholds, Counted]
    images: int

    @property
    def defaults(self) -> dict[str, Any]:
        """The new model's own AutomaticParams: none when those of the model that is tuned are best."""
        return {} if self.chosen == self.own else asdict(self.chosen)

    def as_json(self) -> dict[str, Any]:
        before, after = self.tried[self.usual], self.tried[self.chosen]
        return {
            "usual": asdict(self.usual),
            "chosen": asdict(self.chosen),
            "images": self.images,
            "objects": before.objects,
            "found": (before.found, after.found),
            "masks": (before.masks, after.masks),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The masks of one image and one grid before any is dropped, by falling predicted IoU.

    boxes_xyxy: (n, 4), both ends included. fits: (n,) which object a mask finds, -1 for none. objects: how many.
    """

    predicted_iou: NDArray[np.float64]
    stability: NDArray[np.float64]
    boxes_xyxy: NDArray[np.float64]
    fits: NDArray[np.int64]
    objects: int

    def count(self, ious: Sequence[float], stability: float, box_nms_thresh: float) -> Iterator[Counted]:
        """What `automatic_masks` keeps by this stability and each of these predicted IoUs.

        A mask is suppressed only by one with a higher predicted IoU. So one suppression serves all thresholds.
        """
        suppression = Suppression(box_nms_thresh)
        stable = np.flatnonzero(self.stability >= stability)
        kept = np.array([n for n in stable if suppression.keep(self.boxes_xyxy[n])], np.int64)
        for iou in ious:
            fits = self.fits[kept[self.predicted_iou[kept] >= iou]]
            yield Counted(found=len(np.unique(fits[fits >= 0])), masks=len(fits), objects=self.objects)


def images_to_try(
    teaching: Sequence[Gathered],
    embeddings: Embeddings,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Image]:
    """Some of the images that teach, until a part of `seconds` is over. say: called with how many of how many."""
    some = [one for one in sorted(teaching, key=lambda one: one.content) if one.asset.masks][:MOST_IMAGES]
    began = clock()
    for done, one in enumerate(some):
        if done >= FEWEST_IMAGES and clock() - began > _SHARE * seconds:
            return
        say(done, len(some))
        if masks := [mask for mask in one.masks() if mask.any()]:
            yield embeddings.of(one.number), masks


def choose_thresholds(
    model: Promptable, images: Iterable[Image], params: AutomaticParams, own: AutomaticParams
) -> Choice:
    """The thresholds with the best F1, of those that find no fewer objects than params' own do.

    Of equally good ones params' own are taken, else those with the fewest points, which each later job pays for, and
    then the lowest: a decoder's scores are lower on images that it did not learn from.
    """
    usual = Thresholds.of(params)
    tried = {usual: Counted()}
    looked_at = 0
    for image in images:
        looked_at += 1
        for choice, counted in _try_all(model, image, params):
            tried[choice] = tried.get(choice, Counted()) + counted
    able = [one for one, counted in tried.items() if counted.found >= tried[usual].found]
    best = max(tried[one].f1 for one in able)
    good = [one for one in able if tried[one].f1 >= best - EQUALLY_GOOD]
    chosen = usual if usual in good else min(good, key=astuple)
    return Choice(own=Thresholds.of(own), usual=usual, chosen=chosen, tried=tried, images=looked_at)


def _try_all(model: Promptable, image: Image, params: AutomaticParams) -> Iterator[tuple[Thresholds, Counted]]:
    """What each choice finds in one image."""
    ious = sorted({*PREDICTED_IOUS, params.pred_iou_thresh})
    stabilities = sorted({*STABILITIES, params.stability_score_thresh})
    finer = [points for points in POINTS_PER_SIDE if points > params.points_per_side and params.point_grids is None]
    for points in (params.points_per_side, *finer):
        loose = replace(
            params,
            points_per_side=points,
            pred_iou_thresh=ious[0],
            stability_score_thresh=stabilities[0],
            box_nms_thresh=1.0,
            min_mask_region_area=0,
            max_masks=0,
        )
        candidates = _find_candidates(model, image, loose)
        for stability in stabilities:
            for iou, counted in zip(ious, candidates.count(ious, stability, params.box_nms_thresh), strict=True):
                choice = Thresholds(points_per_side=points, pred_iou_thresh=iou, stability_score_thresh=stability)
                yield choice, counted


def _find_candidates(model: Promptable, image: Image, loose: AutomaticParams) -> Candidates:
    embedding, wanted = image
    made, ious = search(model, embedding, wanted, loose)
    fits = np.where(ious.max(axis=1) >= FOUND_IOU, ious.argmax(axis=1), -1)
    order = np.argsort([-mask.predicted_iou for mask in made], kind="stable")
    boxes = np.array([mask.bbox_xywh for mask in made], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2] - 1
    stability = [-1.0 if mask.stability_score is None else mask.stability_score for mask in made]
    return Candidates(
        predicted_iou=np.array([mask.predicted_iou for mask in made], np.float64)[order],
        stability=np.array(stability, np.float64)[order],
        boxes_xyxy=boxes[order],
        fits=fits[order],
        objects=len(wanted),
    )
