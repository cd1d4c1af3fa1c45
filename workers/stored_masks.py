"""Converts a mask to its database form, and back."""

from __future__ import annotations

from db.leases import Asset
from db.results import StoredMask
from workers.masks import Mask


def mask_of_row(mask: StoredMask, size_hw: tuple[int, int]) -> Mask:
    """A stored mask as a Mask. size_hw: the frame of its asset, which is not in the mask's row."""
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


def stored_mask(asset: Asset, n: int, mask: Mask, label: str | None) -> StoredMask:
    x, y, w, h = (int(v) for v in mask.bbox_xywh)
    return StoredMask(
        asset_id=asset.id,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        label=mask.label or label,
        prompt=mask.prompt,
    )
