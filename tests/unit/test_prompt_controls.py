"""The smart controls of a labeling config: added once, with every label, and told from controls that hold masks."""

from __future__ import annotations

import pytest
from label_studio_sdk.label_interface import LabelInterface

from orchestrator.label_studio.config import find_controls, label_config
from orchestrator.label_studio.prompt_controls import add_prompt_controls, prompt_controls

CONFIG = label_config(["car", 'the "big" <bus>'])
PROMPTS = {"click", "box", "pick", "prompt"}


def _with_prompts(config: str = CONFIG, labels: tuple[str, ...] = ()) -> str:
    return add_prompt_controls(config, labels, image_name="image")


def test_smart_controls_are_added_once_with_every_label_in_one_row():
    smart = _with_prompts()

    assert _with_prompts(smart) == smart
    assert smart.count("<Labels") == 1
    assert LabelInterface(smart).get_control("prompt").labels == ["car", 'the "big" <bus>']
    assert prompt_controls(smart) == PROMPTS
    LabelInterface(smart).validate()


def test_controls_of_masks_are_no_longer_smart_and_stay_the_ones_that_are_found():
    smart = _with_prompts()

    assert smart.count('smart="false"') == 3
    assert find_controls(smart) == find_controls(CONFIG)


def test_a_label_that_the_config_gained_later_is_added_to_the_row():
    smart = _with_prompts().replace('<Label value="car"', '<Label value="tram"/><Label value="car"', 2)
    row_before, row_after = (
        LabelInterface(config).get_control("prompt").labels for config in (smart, _with_prompts(smart))
    )

    assert row_before.count("tram") == 1  # the replacement reached the row itself and the polygons
    assert set(row_after) == {"tram", "car", 'the "big" <bus>'}


def test_a_job_label_that_the_config_lacks_is_offered():
    assert "lorry" in LabelInterface(_with_prompts(labels=("lorry",))).get_control("prompt").labels


def test_a_persons_own_control_of_that_name_is_no_prompt_control_and_is_not_overwritten():
    theirs = CONFIG.replace('name="rectangle"', 'name="box"')

    assert prompt_controls(theirs) == frozenset()
    with pytest.raises(ValueError, match='has <RectangleLabels name="box">'):
        _with_prompts(theirs)


def test_smart_controls_with_labels_of_their_own_are_prompt_controls():
    theirs = CONFIG.replace("</View>", '<KeyPointLabels name="click" toName="image" smart="true"/></View>')

    assert prompt_controls(theirs) == {"click", "prompt"}


def test_a_config_that_is_no_xml_has_none():
    assert prompt_controls("<View><Text") == frozenset()
