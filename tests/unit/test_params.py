from __future__ import annotations

import inspect
import re

import pytest
from segment_anything import SamAutomaticMaskGenerator

from workers.params import AutomaticParams, ParamError, automatic_params, parse_params


def test_every_parameter_of_the_reference_generator_is_here_with_its_name_and_default() -> None:
    reference = inspect.signature(SamAutomaticMaskGenerator).parameters
    ours = inspect.signature(AutomaticParams).parameters
    for name in set(reference) - {"model", "output_mode", "points_per_side", "point_grids"}:
        assert ours[name].default == reference[name].default, name
    assert ours["points_per_side"].default == 32
    assert ours["point_grids"].default is None


def test_values_are_read_by_the_type_of_their_parameter() -> None:
    assert parse_params({"points_per_side": "16", "pred_iou_thresh": "0.5"}) == {
        "points_per_side": 16,
        "pred_iou_thresh": 0.5,
    }
    assert parse_params({"point_grids": "[[[0.5, 0.5]]]"}) == {"point_grids": (((0.5, 0.5),),)}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "points_per_sid",
            "16",
            "'points_per_sid' (did you mean points_per_side?); known: points_per_side",
        ),
        ("points_per_side", "16.5", "expected a whole number"),
        ("points_per_side", "0", "expected 1..1024"),
        ("pred_iou_thresh", "high", "expected a number"),
        ("pred_iou_thresh", "nan", "expected 0..1"),
        ("crop_n_layers", "9", "at most 4"),
        ("pred_iou_thresh", "7", "expected 0..1"),
        ("pred_iou_thresh", "-0.1", "expected 0..1"),
        ("pred_iou_thresh", "88", "expected 0..1"),
        ("stability_score_thresh", "95", "expected 0..1"),
        ("box_nms_thresh", "1.01", "expected 0..1"),
        ("crop_nms_thresh", "-1", "expected 0..1"),
        ("stability_score_offset", "-1", "expected 0..100"),
        ("crop_overlap_ratio", "1", "less than 1"),
        ("crop_n_points_downscale_factor", "0", "expected 1..1024"),
        ("points_per_side", "100000", "expected 1..1024"),
        ("points_per_batch", "0", "expected 1..1000000"),
        ("min_mask_region_area", "-5", "expected 0..1000000000"),
        ("max_masks", "-1", "expected 0..1000000"),
        ("crop_n_layers", "-1", "at least 0"),
        ("stability_score_offset", "inf", "expected 0..100"),
        ("max_area_fraction", "1.5", "at most 1"),
        ("max_area_fraction", "0", "more than 0"),
        ("point_grids", "[[1, 2]]", "one list of"),
        ("point_grids", "[[[1.5, 0]]]", "0..1"),
        ("point_grids", "{", "not JSON"),
        pytest.param("point_grids", "[" * 100_000, "not JSON", id="brackets without end"),
        pytest.param("point_grids", f"[[[1{'0' * 400}, 0]]]", "one list of", id="a number too large for a float"),
        pytest.param("point_grids", f"[[[1{'0' * 5000}, 0]]]", "not JSON", id="a number too large to read"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_expected(name: str, value: str, expected: str) -> None:
    with pytest.raises(ParamError, match=re.escape(expected)):
        parse_params({name: value})


def test_a_job_overrides_the_defaults_of_its_model() -> None:
    params = automatic_params({"points_per_side": 16, "box_nms_thresh": 0.6}, {"points_per_side": 8})
    assert (params.points_per_side, params.box_nms_thresh, params.pred_iou_thresh) == (8, 0.6, 0.88)
