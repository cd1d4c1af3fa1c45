from __future__ import annotations

import inspect

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
        ("points_per_sid", "16", "unknown parameter 'points_per_sid'; known: points_per_side"),
        ("points_per_side", "16.5", "expected a whole number"),
        ("points_per_side", "0", "at least 1"),
        ("pred_iou_thresh", "high", "expected a number"),
        ("pred_iou_thresh", "nan", "expected a finite number"),
        ("crop_n_layers", "9", "at most 4"),
        ("max_area_fraction", "0", "more than 0"),
        ("point_grids", "[[1, 2]]", "one list of"),
        ("point_grids", "[[[1.5, 0]]]", "0..1"),
        ("point_grids", "{", "not JSON"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_expected(name: str, value: str, expected: str) -> None:
    with pytest.raises(ParamError, match=expected.replace("(", "\\(").replace("[", "\\[")):
        parse_params({name: value})


def test_a_job_overrides_the_defaults_of_its_model() -> None:
    params = automatic_params({"points_per_side": 16, "box_nms_thresh": 0.6}, {"points_per_side": 8})
    assert (params.points_per_side, params.box_nms_thresh, params.pred_iou_thresh) == (8, 0.6, 0.88)
