"""Labeling configs: what is missing in them, and which predictions fit, compared with Label Studio's own SDK."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from label_studio_sdk.label_interface import LabelInterface

from orchestrator.label_studio.config import (
    ALL_KINDS,
    ConfigError,
    address_regions,
    faults,
    find_controls,
    label_config,
    merge_config,
    missing_lines,
    require_controls,
)
from orchestrator.label_studio.prompt_controls import add_prompt_controls
from orchestrator.label_studio.regions import prediction_task, regions_for
from workers.masks import mask_from_pixels

CONFIG = label_config(["car", 'the "big" <bus>'])
THEIRS = """<View><Header value="Look"/><Image name="photo" value="$picture"/>
  <PolygonLabels name="outline" toName="photo"><Label value="car"/><Label value="x" alias="bus"/></PolygonLabels>
</View>"""


def _prediction(as_="auto", label="car"):
    pixels = np.zeros((40, 50), bool)
    pixels[5:25, 5:30] = True
    pixels[10:15, 10:20] = False
    mask = mask_from_pixels(pixels, predicted_iou=0.9, label=label)
    regions = regions_for([mask], asset_id=7, as_=as_)
    task = prediction_task(image="s3://b/k", asset_id="7", size_hw=(40, 50), model_version="v", regions=regions)
    return task["predictions"][0]


@pytest.mark.parametrize("as_", ["auto", "polygon", "brush", "rectangle"])
@pytest.mark.parametrize("label", ["car", 'the "big" <bus>'])
def test_what_we_publish_fits_our_config_here_and_in_the_sdk(as_, label):
    prediction = _prediction(as_, label)

    assert faults(find_controls(CONFIG), prediction) == []
    assert LabelInterface(CONFIG).validate_prediction(prediction, return_errors=True) == []


def _spoil(prediction, path, value):
    spoilt = copy.deepcopy(prediction)
    *way, last = path
    target = spoilt
    for step in way:
        target = target[step]
    target[last] = value
    return spoilt


@pytest.mark.parametrize(
    ("as_", "path", "value"),
    [
        ("polygon", ["result", 0, "value", "polygonlabels"], ["tram"]),
        ("polygon", ["result", 0, "from_name"], "outline"),
        ("polygon", ["result", 0, "to_name"], "photo"),
        ("polygon", ["score"], 1.5),
        ("rectangle", ["result", 0, "value", "width"], 101.0),
        ("rectangle", ["result", 0, "value", "y"], 150.0),
    ],
)
def test_what_the_sdk_refuses_is_refused_here(as_, path, value):
    prediction = _spoil(_prediction(as_), path, value)

    assert LabelInterface(CONFIG).validate_prediction(prediction, return_errors=True)
    assert len(faults(find_controls(CONFIG), prediction)) == 1


@pytest.mark.parametrize("points", [[[0, 0], [1, math.nan], [1, 1]], [[0, 0], [101, 0], [1, 1]], [[0, 0], [1, 1]]])
def test_a_polygon_without_a_place_on_the_image_is_refused_though_the_sdk_takes_it(points):
    prediction = _spoil(_prediction("polygon"), ["result", 0, "value", "points"], points)

    assert faults(find_controls(CONFIG), prediction)


def test_controls_are_found_under_their_own_names_and_aliases():
    controls = find_controls(THEIRS)
    prediction = _prediction("polygon")
    address_regions(controls, prediction["result"])

    assert controls.image_field == "picture"
    assert controls.by_kind["polygon"].labels == {"car", "bus"}
    assert faults(controls, prediction) == []
    assert prediction["result"][0]["from_name"] == "outline"


def test_what_is_missing_comes_as_lines_to_add():
    lines = missing_lines(find_controls(THEIRS), kinds=["polygon", "brush"], labels=["car", "猫"])

    assert lines[0] == 'in <PolygonLabels name="outline">:'
    assert lines[1].strip().startswith('<Label value="猫" background="#')
    assert lines[2] == '<BrushLabels name="brush" toName="photo">'
    assert lines[-1] == "</BrushLabels>"
    with pytest.raises(ConfigError, match="--update-config"):
        require_controls(find_controls(THEIRS), as_="auto", labels=["car"])
    require_controls(find_controls(THEIRS), as_="polygon", labels=["car", "猫"])


def test_comments_of_people_and_of_label_studios_templates_stay_when_a_config_is_changed() -> None:
    before, behind = "<!-- of the river team -->\n", '\n<!-- {"data": {"picture": "/static/sample.jpg"}} -->\n'
    config = before + THEIRS.replace("  <Poly", "  <!-- every car, also parked ones -->\n  <Poly") + behind

    merged = merge_config(config, kinds=ALL_KINDS, labels=["car"])
    smart = add_prompt_controls(merged, [], image_name="photo")

    for changed in (merged, smart):
        assert changed.startswith(f"{before}<View>")
        assert changed.endswith(f"</View>{behind}")
        assert "<!-- every car, also parked ones -->" in changed
    assert find_controls(smart) == find_controls(merged)
    assert add_prompt_controls(smart, [], image_name="photo") == smart


def test_merging_adds_what_is_missing_and_changes_nothing_else():
    merged = merge_config(THEIRS, kinds=ALL_KINDS, labels=["car", "猫"])

    assert missing_lines(find_controls(merged), kinds=ALL_KINDS, labels=["car", "猫", "bus"][:2]) == []
    assert find_controls(merged).by_kind["polygon"].labels == {"car", "bus", "猫"}
    assert '<Header value="Look"' in merged
    assert (
        LabelInterface(merged).validate_prediction(
            _spoil(_spoil(_prediction("rectangle"), ["result", 0, "to_name"], "photo"), ["score"], 0.5),
            return_errors=True,
        )
        == []
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("<View><Text", "no XML"),
        ("<View><Text name='t' value='$text'/></View>", "no image"),
        (THEIRS.replace("Look", "$text"), r"\$text"),
        (THEIRS.replace("Look", "$meta.title"), r"\$meta,"),
        (THEIRS.replace('<Header value="Look"/>', '<Text name="t" value="$text"/>'), r"\$text"),
        (THEIRS.replace('<Header value="Look"/>', '<Text name="t" value="Over $Limit only"/>'), r"\$Limit"),
        (THEIRS.replace('toName="photo">', 'toName="photo" value="$choices">'), r"\$choices"),
        (THEIRS.replace('value="$picture"', 'value="$picture" valueList="$pictures"'), r"\$pictures"),
        (THEIRS.replace("<View>", '<View><Repeater on="$rows" indexFlag="{{i}}"/>'), r"\$rows"),
    ],
)
def test_a_config_that_cannot_hold_our_tasks_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        find_controls(config)


@pytest.mark.parametrize(
    "config",
    [
        label_config(["US$cash", "$note", "car"]),
        THEIRS.replace("Look", "Prices over $Limit only"),
        THEIRS.replace("Look", "$5 and more, in $Currency"),
        THEIRS.replace('<Label value="car"/>', '<Label value="car" hint="costs $Ten" title="$x"/>'),
        THEIRS.replace("<Header", '<Style>.a { color: "$red" }</Style><Header class="$wide" placeholder="$a"'),
        THEIRS.replace(
            "<Header", '<Choices name="c" toName="photo"><Choice value="$10" hint="$ten"/></Choices><Header'
        ),
        THEIRS.replace("<Header", '<Text name="t" value="$asset_id"/><Header'),
    ],
)
def test_a_dollar_in_prose_is_no_variable(config):
    controls = find_controls(config)

    assert "car" in controls.by_kind["polygon"].labels
    LabelInterface(config).validate()


@pytest.mark.parametrize("label", ["\U0001fae9", "\U0001fadf", "\U0001fac6", "car 🚗", "𠮷野", "\ufdd0", "a\u200db"])
def test_what_xml_takes_is_a_label_however_new(label):
    config = label_config([label])

    assert find_controls(config).by_kind["polygon"].labels == {label}
    assert LabelInterface(config).validate_prediction(_prediction(label=label), return_errors=True) == []


@pytest.mark.parametrize("label", ["", " ", "a\nb", "a\0b", "\x85", "\ufffe", "\uffff", "\ud83d"])
def test_what_xml_does_not_take_is_no_label(label):
    with pytest.raises(ValueError, match="label"):
        label_config([label])
