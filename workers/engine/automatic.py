"""Every object of an image without prompts: SamAutomaticMaskGenerator's masks, many times faster.

The parameters, the kept masks and their order are the reference's (segment_anything/automatic_mask_generator.py). This
code is faster because it skips work. It scores candidates before it upsamples and thresholds them. It upsamples them
one at a time, best first, and only inside a box found from the low-resolution logits. It skips a candidate that a
better one will surely suppress. Only kept masks get run lengths. For a model on a GPU, the whole search runs there
(`device_search`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid, generate_crop_boxes, is_box_near_crop_edge
from torchvision.ops.boxes import batched_nms, box_area

from workers.engine.boxed_runs import FoundMask, InclusiveBox, encode_runs, take_runs
from workers.engine.decoder import Decoded, decode_points, prompt_logits
from workers.engine.device_search import DeviceSearch
from workers.engine.folded_decoder import FOLD_FROM_DIM
from workers.engine.promptable import ModelOutputError, Promptable, half_precision
from workers.engine.sam import promptable
from workers.engine.small_regions import remove_small_regions
from workers.engine.suppression import STABLE_UP_TO, Suppression, order_of_kept
from workers.engine.upsampling import Cut, Patch
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.params import AutomaticParams

__all__ = ["ModelOutputError", "automatic_masks", "embed", "prompt_logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One output of the decoder that passed by predicted IoU. patch: None if no pixel reaches the lowest threshold."""

    point_xy: tuple[float, float]
    predicted_iou: np.float32
    patch: Patch | None


@torch.no_grad()
def embed(sam: Sam | Promptable, images: Sequence[RgbImage], *, fast: bool = False) -> list[Any]:
    """Encode images (H, W, 3) uint8 RGB of any sizes in one batch: one embedding for each. fast: in bfloat16."""
    return promptable(sam).embed(images, fast=fast) if images else []


def automatic_masks(
    sam: Sam | Promptable, image: RgbImage, params: AutomaticParams, *, embedding: Any = None
) -> list[Mask]:
    """Every mask of image (H, W, 3) uint8 RGB that passes `params`, in the reference's order.

    embedding: the result of `embed` for this image. Without it the image is encoded here. Crops are always encoded
    here. Raises ModelOutputError where the model gives NaN or infinity.
    """
    # fast may differ from the reference in a few pixels; the folded decoder keeps the predicted IoUs in float32
    model = promptable(sam, fold_from_dim=0 if params.precision == "fast" else FOLD_FROM_DIM)
    search = DeviceSearch if model.device.type == "cuda" else CropSearch
    return masks_by(search, model, image, params, embedding)


@torch.no_grad()
def masks_by(
    search: type[CropSearch | DeviceSearch],
    model: Promptable,
    image: RgbImage,
    params: AutomaticParams,
    embedding: Any = None,
) -> list[Mask]:
    """`automatic_masks` with the search that the caller chooses. Both work on any device and find the same masks."""
    height, width = image.shape[:2]
    size_hw = (height, width)
    crops, layers = generate_crop_boxes(size_hw, params.crop_n_layers, params.crop_overlap_ratio)
    grids = _point_grids(params)
    found: list[FoundMask] = []
    for (x0, y0, x1, y1), layer in zip(crops, layers, strict=True):
        if x0 >= x1 or y0 >= y1 or len(grids[layer]) == 0:
            continue  # more crops than pixels, or no point for this layer: the reference fails here
        given = embedding if layer == 0 else None
        crop_embedding = (
            model.embed([image[y0:y1, x0:x1]], fast=params.precision == "fast")[0] if given is None else given
        )
        crop_search = search(model, params, crop=(x0, y0, x1, y1), size_hw=size_hw)
        found += crop_search.masks(crop_embedding, grids[layer])
    if len(crops) > 1:
        found = _suppress_between_crops(found, params.crop_nms_thresh)
    if params.min_mask_region_area > 0:
        found = _clean(found, size_hw, params)
    return _to_masks(_limit(found, size_hw, params), size_hw)


def _point_grids(params: AutomaticParams) -> list[NDArray[np.float64]]:
    """The points of each crop layer: (n, 2), x and y as fractions of the crop."""
    if params.point_grids is not None:
        return [np.asarray(grid, np.float64).reshape(-1, 2) for grid in params.point_grids]
    factor = params.crop_n_points_downscale_factor
    sides = [int(params.points_per_side / factor**layer) for layer in range(params.crop_n_layers + 1)]
    return [build_point_grid(side) if side else np.zeros((0, 2)) for side in sides]


class CropSearch:
    """The search for masks in one crop of an image on a CPU. The whole image is the first crop."""

    def __init__(
        self, model: Promptable, params: AutomaticParams, *, crop: InclusiveBox, size_hw: tuple[int, int]
    ) -> None:
        self.model, self.params, self.crop, self.size_hw = model, params, crop, size_hw
        self.crop_hw = (crop[3] - crop[1], crop[2] - crop[0])
        middle, offset = model.mask_threshold, params.stability_score_offset
        self.thresholds = (middle, middle + offset, middle - offset)
        self.upsampling = model.upsampling(self.crop_hw)

    def masks(self, embedding: Any, grid: NDArray[np.float64]) -> list[FoundMask]:
        """Masks from the points of grid (n, 2), in fractions of the crop, after suppression inside the crop."""
        points = grid * np.array(self.crop_hw[::-1])
        decoded = decode_points(
            self.model,
            embedding,
            points,
            size_hw=self.crop_hw,
            at_once=self.params.points_per_batch,
            least_iou=self.params.pred_iou_thresh,
            used_hw=self.upsampling.used_hw,
        )
        with half_precision(self.model.device, is_wanted=self.params.precision == "fast"):
            candidates = [candidate for batch in decoded for candidate in self._candidates(batch, points)]
        with one_thread():
            return self._best(candidates)

    def _candidates(self, batch: Decoded, points: NDArray[np.float64]) -> Iterator[Candidate]:
        for row, output in np.argwhere(batch.wanted):
            try:
                patch = self.upsampling.patch(batch.logits[row, output], min(self.thresholds))
            except FloatingPointError as error:
                raise ModelOutputError("the model's mask logits hold NaN or infinity") from error
            x, y = points[batch.prompts[row]].tolist()
            yield Candidate(point_xy=(x, y), predicted_iou=batch.predicted_iou[row, output], patch=patch)

    def _best(self, candidates: list[Candidate]) -> list[FoundMask]:
        """Take the candidates by falling predicted IoU. Keep those that pass and are not suppressed."""
        scores = np.array([candidate.predicted_iou for candidate in candidates], np.float32)
        suppression = Suppression(self.params.box_nms_thresh)
        kept: dict[int, FoundMask] = {}
        skipped, survivors = [], 0
        for number in np.argsort(-scores, kind="stable").tolist():
            candidate = candidates[number]
            if self._is_surely_suppressed(candidate, suppression):
                skipped.append(number)
                continue
            found = self._upsample_and_threshold(candidate)
            survivors += found is not None
            if found is not None and suppression.keep(found.runs.box):
                kept[number] = found
        has_ties = len(np.unique(scores[list(kept)])) < len(kept)
        if has_ties and survivors <= STABLE_UP_TO < survivors + len(skipped):
            survivors += sum(self._upsample_and_threshold(candidates[number]) is not None for number in skipped)
        order = order_of_kept(list(kept), scores, survivors) if has_ties else list(kept)
        return [kept[number].in_image() for number in order]

    def _is_surely_suppressed(self, candidate: Candidate, suppression: Suppression) -> bool:
        if candidate.patch is None:
            return False
        inner, outer = self.upsampling.box_bounds(candidate.patch, self.thresholds[0])
        return inner is not None and outer is not None and suppression.would_drop(inner, outer)

    def _upsample_and_threshold(self, candidate: Candidate) -> FoundMask | None:
        """The mask at full resolution, in the crop's frame. None when it is unstable, or the crop's edge cuts it."""
        if candidate.patch is None:
            cut = Cut(counts=np.zeros(3, np.int64), pixels=np.zeros((0, 0), np.bool_), corner=(0, 0))
        else:
            cut = self.upsampling.cut(candidate.patch, self.thresholds)
        with np.errstate(invalid="ignore", divide="ignore"):
            stability = np.float32(cut.counts[1]) / np.float32(cut.counts[2])
        if self.params.stability_score_thresh > 0 and not stability >= self.params.stability_score_thresh:
            return None
        runs = take_runs(cut.pixels, cut.corner)
        if self._is_near_crop_edge(runs.box):
            return None
        return FoundMask(
            runs=runs,
            predicted_iou=float(candidate.predicted_iou),
            stability_score=float(stability),
            point_xy=candidate.point_xy,
            crop=self.crop,
        )

    def _is_near_crop_edge(self, box: InclusiveBox) -> bool:
        """Whether the mask may continue outside the crop. Inclusive boxes are compared, as in the reference."""
        if self.crop_hw == self.size_hw:
            return False
        whole = [0, 0, self.size_hw[1], self.size_hw[0]]
        return bool(is_box_near_crop_edge(torch.tensor([box]), list(self.crop), whole))


def _suppress_between_crops(found: list[FoundMask], iou_threshold: float) -> list[FoundMask]:
    """Drop duplicates between crops. Masks from smaller crops win. The order is torchvision's."""
    if not found:
        return []
    scores = 1 / box_area(torch.tensor([one.crop for one in found]))
    return [found[number] for number in _nms([one.runs.box for one in found], scores, iou_threshold)]


def _clean(found: list[FoundMask], size_hw: tuple[int, int], params: AutomaticParams) -> list[FoundMask]:
    """Remove small regions, then the duplicates that this made. Masks that did not change win."""
    if not found:
        return []
    cleaned = [remove_small_regions(one.runs, size_hw, params.min_mask_region_area) for one in found]
    boxes = [runs.box if runs.area_px else (0, 0, 0, 0) for runs, _ in cleaned]
    scores = torch.tensor([0.0 if changed else 1.0 for _, changed in cleaned])
    keep = _nms(boxes, scores, max(params.box_nms_thresh, params.crop_nms_thresh))
    return [replace(found[number], runs=cleaned[number][0]) for number in keep]


def _nms(boxes: Sequence[InclusiveBox], scores: torch.Tensor, iou_threshold: float) -> list[int]:
    kept: list[int] = batched_nms(
        torch.tensor(boxes, dtype=torch.float), scores, torch.zeros(len(boxes)), iou_threshold=iou_threshold
    ).tolist()
    return kept


def _limit(found: list[FoundMask], size_hw: tuple[int, int], params: AutomaticParams) -> list[FoundMask]:
    """Our own three filters, in the order of params' docstring."""
    largest = params.max_area_fraction * size_hw[0] * size_hw[1]
    found = [one for one in found if params.min_area_px <= one.runs.area_px <= largest]
    if 0 < params.max_masks < len(found):
        best = sorted(range(len(found)), key=lambda number: -found[number].predicted_iou)[: params.max_masks]
        found = [found[number] for number in sorted(best)]
    return found


def _to_masks(found: list[FoundMask], size_hw: tuple[int, int]) -> list[Mask]:
    """The Masks with COCO's boxes: width and height include the last pixel. A mask without pixels has no stability."""
    masks = []
    for one in found:
        x0, y0, x1, y1 = one.runs.box
        box = (x0, y0, x1 - x0 + 1, y1 - y0 + 1) if one.runs.area_px else (0, 0, 0, 0)
        x, y, width, height = (float(value) for value in box)
        mask = Mask(
            counts=encode_runs(one.runs, size_hw),
            size_hw=size_hw,
            bbox_xywh=(x, y, width, height),
            area_px=one.runs.area_px,
            predicted_iou=one.predicted_iou,
            stability_score=None if np.isnan(one.stability_score) else one.stability_score,
            prompt={"points": [[*one.point_xy, 1]]},
        )
        masks.append(mask)
    return masks


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch's small operations on one thread. On a busy machine two threads make them up to nine times slower
    (EPYC Zen5, 2 cores, load 4, November 2026)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
