from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.params import ParamError, parse_prompt_params
from workers.prompts import Prompt, PromptError, fit, fit_all, parse_prompt, takes

coordinates = st.floats(-1e4, 1e4, allow_nan=False)
boxes = st.tuples(coordinates, coordinates, st.floats(0.5, 1e4), st.floats(0.5, 1e4)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
prompts = st.builds(
    Prompt,
    label=st.none() | st.sampled_from(["car", "süß 📷"]),
    points=st.lists(st.tuples(coordinates, coordinates, st.sampled_from([0, 1])), max_size=4).map(tuple),
    box_xyxy=boxes,
    score=st.none() | st.floats(0, 1),
    size_wh=st.none() | st.just((1.0, 1.0)),
)


@given(prompts)
def test_json_gives_back_the_prompt(prompt: Prompt) -> None:
    assert parse_prompt(prompt.as_json()) == prompt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"box_xyxy": [1, 2, math.nan, 4]}, r"box_xyxy: \[1, 2, nan, 4\], expected four finite numbers"),
        ({"box_xyxy": [1, 2, math.inf, 4]}, "finite"),
        ({"box_xyxy": [10, 2, 3, 4]}, "is inverted"),
        ({"box_xyxy": [1, 2, 1, 4]}, "has no area"),
        ({"box_xyxy": [1, 2, 3]}, "expected .x0, y0, x1, y1"),
        ({"box_xyxy": "1,2,3,4"}, "expected .x0, y0, x1, y1"),
        ({"box_xyxy": [True, 2, 3, 4]}, "True, expected a number"),
        ({"box_xyxy": [10**400, 2, 3, 4]}, "a number of 1329 bits"),
        ({"points": [[1, 2]]}, "1 inside or 0 outside"),
        ({"points": [[1, 2, 2]]}, "third value 2"),
        ({"points": [[math.nan, 2, 1]]}, "finite"),
        ({"points": [[1, 2, 0]]}, "all are outside"),
        ({"points": [[1, 2, 1]] * 1001}, "1001 in one prompt"),
        ({"box": [1, 2, 3, 4]}, "unknown key 'box', expected label, points, box_xyxy"),
        ({"label": "car"}, "nothing to look for"),
        ({"negative_box_xyxy": [1, 2, 3, 4]}, "nothing to look for"),
        ({"text": ""}, "expected words"),
        ({"text": "bus", "label": "\x00"}, "label: .*expected words"),
        ({"text": "\ud800"}, "expected words"),
        ({"box_xyxy": [1, 2, 3, 4], "score": math.nan}, "score"),
        ({"box_xyxy": [1, 2, 3, 4], "size_wh": [0, 5]}, "size_wh"),
        ([1, 2, 3, 4], "expected an object such as"),
        (None, "expected an object such as"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(given: object, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        parse_prompt(given)


def test_a_box_partly_outside_is_cut_to_the_image() -> None:
    assert fit(Prompt(box_xyxy=(-5, -5, 10, 200)), (64, 48)).box_xyxy == (0, 0, 10, 48)
    assert fit(Prompt(box_xyxy=(0, 0, 64, 48)), (64, 48)).box_xyxy == (0, 0, 64, 48)


@pytest.mark.parametrize("box", [(64, 0, 70, 10), (0, 48, 5, 60), (-9, -9, 0, 0)])
def test_a_box_wholly_outside_is_an_error_that_names_the_image(box: tuple[float, ...]) -> None:
    with pytest.raises(PromptError, match="lies outside the image of 64 x 48 pixels"):
        fit(Prompt(box_xyxy=box), (64, 48))


def test_a_point_outside_is_an_error_whatever_the_others() -> None:
    with pytest.raises(PromptError, match=r"\[64.5, 1\] lies outside"):
        fit(Prompt(points=((1, 1, 1), (64.5, 1, 0))), (64, 48))


def test_coordinates_of_another_size_are_scaled_and_those_of_a_turned_picture_refused() -> None:
    asked = Prompt(box_xyxy=(0.25, 0.5, 0.5, 1), points=((0.5, 0.5, 1),), size_wh=(1, 1))
    assert fit(asked, (64, 48)) == Prompt(box_xyxy=(16, 24, 32, 48), points=((32, 24, 1),))
    assert fit(Prompt(box_xyxy=(2, 2, 4, 4), size_wh=(32, 24)), (64, 48)).box_xyxy == (4, 4, 8, 8)
    with pytest.raises(PromptError, match="EXIF rotation applied"):
        fit(Prompt(box_xyxy=(2, 2, 4, 4), size_wh=(48, 64)), (64, 48))


@pytest.mark.parametrize("frame_wh", [(48, 64), (24, 32), (480, 640), (47.9, 64)])
def test_coordinates_of_a_picture_that_lies_on_its_side_are_refused_also_of_a_thumbnail(
    frame_wh: tuple[float, float],
) -> None:
    with pytest.raises(PromptError, match="EXIF rotation applied"):
        fit(Prompt(box_xyxy=(2, 2, 4, 4), size_wh=frame_wh), (64, 48))


@pytest.mark.parametrize(
    ("frame_wh", "size_wh"),
    [((1, 1), (64, 48)), ((64, 64), (64, 48)), ((32, 24), (64, 48)), ((501, 500), (1000, 1001))],
)
def test_coordinates_of_another_frame_are_put_on_the_image(
    frame_wh: tuple[float, float], size_wh: tuple[int, int]
) -> None:
    box = fit(Prompt(box_xyxy=(0, 0, *frame_wh), size_wh=frame_wh), size_wh).box_xyxy
    assert box == pytest.approx((0, 0, *size_wh))


def test_an_assets_good_prompts_keep_their_numbers_beside_bad_ones() -> None:
    asked = [{"error": "p.jsonl:1: inverted"}, {"box_xyxy": [1, 1, 2, 2]}, {"box_xyxy": [90, 1, 99, 2]}]
    usable, wrong = fit_all(asked, (64, 48))
    assert list(usable) == [1]
    assert wrong == [
        "p.jsonl:1: inverted",
        "prompt 2: box_xyxy: [90, 1, 99, 2] lies outside the image of 64 x 48 pixels",
    ]


def test_a_model_is_asked_only_what_it_takes() -> None:
    assert takes(Prompt(box_xyxy=(1, 1, 2, 2), points=((1, 1, 1),)), ("box", "points")) is None
    assert takes(Prompt(text="bus"), ("box", "points")) == "a prompt by text, expected box or points"
    assert takes(Prompt(text="bus", negative_box_xyxy=(1, 1, 2, 2)), ("text",)) == (
        "a prompt by exemplar, expected text"
    )


def test_a_job_with_prompts_knows_its_two_parameters() -> None:
    assert parse_prompt_params({"multimask": "all"}) == {"multimask": "all"}
    assert parse_prompt_params({"decoder": "onnx"}) == {"decoder": "onnx"}
    with pytest.raises(ParamError, match="decoder='ONNX': expected torch or onnx"):
        parse_prompt_params({"decoder": "ONNX"})
    with pytest.raises(ParamError, match="expected best"):
        parse_prompt_params({"multimask": "3"})
    with pytest.raises(ParamError, match="'points_per_side' of a job with prompts; known: multimask"):
        parse_prompt_params({"points_per_side": "3"})
