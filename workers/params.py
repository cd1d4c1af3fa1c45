"""What a job may ask of a model by name: SamAutomaticMaskGenerator's parameters plus our three filters.

Needs no torch, so the command line can check a job before any worker sees it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from workers.errors import meant


class ParamError(ValueError):
    """A parameter is unknown, or its value is not allowed."""


PRECISIONS = ("auto", "exact", "fast")
DECODERS = ("torch", "onnx")
# Limits for people; the engine can compute with more. Thresholds of scores lie in 0..1. Logits stay below 100. There
# are at most as many points as an image has pixels.
_RANGES = {
    "pred_iou_thresh": (0, 1),
    "stability_score_thresh": (0, 1),
    "box_nms_thresh": (0, 1),
    "crop_nms_thresh": (0, 1),
    "stability_score_offset": (0, 100),
    "points_per_side": (1, 1024),
    "points_per_batch": (1, 1_000_000),
    "crop_n_points_downscale_factor": (1, 1024),
    "min_mask_region_area": (0, 10**9),
    "min_area_px": (0, 10**9),
    "max_masks": (0, 1_000_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticParams:
    """Parameters of automatic masks, with SamAutomaticMaskGenerator's names, meanings and defaults.

    points_per_batch is a maximum: on a GPU with little free memory, fewer points are decoded at once.
    The last five are ours: min_area_px drops smaller masks. max_area_fraction drops masks that cover more than this
    part of the image. max_masks keeps the best by predicted IoU; 0 means no limit. precision: "exact" computes in
    float32, as the reference does. "fast" multiplies in bfloat16. "auto" is exact until fast is measured on a GPU.
    decoder: what runs SAM's prompt encoder and mask decoder, "torch" or "onnx".
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    point_grids: tuple[tuple[tuple[float, float], ...], ...] | None = None
    min_mask_region_area: int = 0
    min_area_px: int = 0
    max_area_fraction: float = 1.0
    max_masks: int = 0
    precision: str = "auto"
    decoder: str = "torch"

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            if getattr(self, name) < 1:
                raise ParamError(f"{name}={getattr(self, name)}: expected a whole number of at least 1")
        for name in ("crop_n_layers", "min_mask_region_area", "min_area_px", "max_masks"):
            if getattr(self, name) < 0:
                raise ParamError(f"{name}={getattr(self, name)}: expected a whole number of at least 0")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ParamError(f"{field.name}={value}: expected a finite number")
        if not 0 < self.max_area_fraction <= 1:
            raise ParamError(f"max_area_fraction={self.max_area_fraction}: expected more than 0 and at most 1")
        if not 0 <= self.crop_overlap_ratio < 1:
            raise ParamError(f"crop_overlap_ratio={self.crop_overlap_ratio}: expected 0 or more and less than 1")
        self._check_crops_and_precision()

    def _check_crops_and_precision(self) -> None:
        if self.crop_n_layers > 4:
            raise ParamError(f"crop_n_layers={self.crop_n_layers}: {4**self.crop_n_layers} crops an image; at most 4")
        layers = self.crop_n_layers + 1
        if self.point_grids is not None and len(self.point_grids) < layers:
            raise ParamError(
                f"point_grids: {len(self.point_grids)} lists of points, expected {layers}, one a crop layer"
            )
        if self.precision not in PRECISIONS:
            raise ParamError(f"precision={self.precision!r}: expected {', '.join(PRECISIONS)}")
        check_decoder(self.decoder)


def check_decoder(decoder: str) -> None:
    """Raise ParamError for a name that is not in DECODERS."""
    if decoder not in DECODERS:
        raise ParamError(f"decoder={decoder!r}: expected {' or '.join(DECODERS)}")


PARAM_NAMES = tuple(field.name for field in dataclasses.fields(AutomaticParams))


def parse_params(texts: Mapping[str, str]) -> dict[str, Any]:
    """Read `name=value` texts of the command line into typed values, and check them together.

    Raises ParamError with the parameter, the given value and the expected values.
    """
    hints = get_type_hints(AutomaticParams)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in hints:
            raise ParamError(f"unknown parameter {name!r}{meant(name, PARAM_NAMES)}; known: {', '.join(PARAM_NAMES)}")
        values[name] = _parse(name, text, hints[name])
        least, most = _RANGES.get(name, (-math.inf, math.inf))
        if isinstance(values[name], int | float) and not least <= values[name] <= most:
            raise ParamError(f"{name}={text}: expected {least}..{most}")
    AutomaticParams(**values)
    return values


def automatic_params(defaults: Mapping[str, Any], asked: Mapping[str, Any]) -> AutomaticParams:
    """The model's own defaults, replaced where the job gave values (both JSON-safe)."""
    values = {**defaults, **asked}
    if values.get("point_grids") is not None:
        values["point_grids"] = _check_grids(values["point_grids"])
    return AutomaticParams(**values)


def _parse(name: str, text: str, kind: type) -> Any:
    if name in ("precision", "decoder"):
        return text
    return _parse_grids(text) if name == "point_grids" else _parse_number(name, text, kind)


def _parse_number(name: str, text: str, kind: type) -> int | float:
    try:
        return int(text) if kind is int else float(text)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise ParamError(f"{name}={text!r}: expected {expected}") from error


def _parse_grids(text: str) -> tuple[tuple[tuple[float, float], ...], ...]:
    try:
        grids = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of ten thousand digits
        raise ParamError(
            f"point_grids: not JSON ({error}); expected one list of [x, y] in 0..1 a crop layer"
        ) from error
    return _check_grids(grids)


def _check_grids(grids: Any) -> tuple[tuple[tuple[float, float], ...], ...]:
    try:
        checked = tuple(tuple((float(x), float(y)) for x, y in grid) for grid in grids)
    except (TypeError, ValueError, OverflowError) as error:
        raise ParamError("point_grids: expected one list of [x, y] in 0..1 a crop layer") from error
    if not all(0 <= v <= 1 for grid in checked for point in grid for v in point):
        raise ParamError("point_grids: every coordinate must lie in 0..1, a fraction of the crop")
    return checked


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptParams:
    """Parameters of a job with prompts. multimask: "best" gives one mask a prompt, "all" the model's three. decoder:
    what runs SAM's prompt encoder and mask decoder, "torch" or "onnx". text_threshold: 0..1. Masks of a text or
    an example count only if the model's score is above it."""

    multimask: Literal["best", "all"] = "best"
    decoder: str = "torch"
    text_threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.multimask not in ("best", "all"):
            raise ParamError(f"multimask={self.multimask!r}: expected best (one mask a prompt) or all (three)")
        if not 0 <= self.text_threshold <= 1:
            raise ParamError(f"text_threshold={self.text_threshold}: expected 0..1")
        check_decoder(self.decoder)


_PARAM_NAMES = tuple(PromptParams.__dataclass_fields__)


def parse_prompt_params(texts: Mapping[str, str]) -> dict[str, Any]:
    """Read `name=value` texts of the command line. Raises ParamError with the given and the expected value."""
    values: dict[str, Any] = dict(texts)
    for name in texts:
        if name not in _PARAM_NAMES:
            raise ParamError(
                f"unknown parameter {name!r} of a job with prompts{meant(name, _PARAM_NAMES)}; "
                f"known: {', '.join(_PARAM_NAMES)}"
            )
    if "text_threshold" in values:
        try:
            values["text_threshold"] = float(values["text_threshold"])
        except ValueError as error:
            raise ParamError(f"text_threshold={texts['text_threshold']!r}: expected a number, 0..1") from error
    PromptParams(**values)
    return values
