"""What a reviewer asked, read from Label Studio's own bodies and from damaged ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.assist.asked import Asked, PointPrompt, read_asked
from orchestrator.assist.boxes import REMEMBERED_SECONDS, Boxes


def body(*regions: dict[str, Any], **task: Any) -> bytes:
    """A request as Label Studio 1.23 sends it."""
    whole = {"id": 3, "data": {"asset_id": "13e3620b52ff392a", "width": 640, "height": 480}, **task}
    context = {"context": {"result": list(regions)}}
    document = {"tasks": [whole], "project": "7.1795638503", "label_config": "<View/>", "params": context}
    return json.dumps(document).encode()


def point(own: str, x: float, y: float, *, inside: bool = True, control: str = "click") -> list[dict[str, Any]]:
    """A key point of the row of labels: the editor sends its place and its label as two results."""
    value = {"x": x, "y": y, "width": 0.2, "labels": ["car"]}
    shared = {"id": own, "to_name": "image", "value": value, "is_positive": inside}
    return [
        {**shared, "from_name": control, "type": "keypoint"},
        {**shared, "from_name": "prompt", "type": "labels"},
    ]


def box(own: str, x: float, y: float, width: float, height: float, rotation: float = 0) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": ["car"]}
    return {"id": own, "from_name": "box", "to_name": "image", "type": "rectanglelabels", "value": value}


def asked(content: bytes) -> Asked:
    found = read_asked(content)
    assert found is not None
    return found


def test_points_keep_their_order_and_alt_means_outside():
    found = asked(body(*point("a", 10, 20), *point("b", 30, 40, inside=False), *point("c", 1, 2, control="pick")))

    assert (found.project_id, found.task_id, found.asset_uid, found.label) == (7, 3, "13e3620b52ff392a", "car")
    assert found.points == (
        PointPrompt(id="a", control="click", x=10, y=20, inside=True),
        PointPrompt(id="b", control="click", x=30, y=40, inside=False),
        PointPrompt(id="c", control="pick", x=1, y=2, inside=True),
    )
    assert found.first_id == "a"


def test_a_turned_rectangle_is_its_bounding_box():
    found = asked(body(box("r", 50, 50, 10, 20, rotation=90))).box

    assert found is not None
    assert found.box_xyxy == pytest.approx((30, 50, 50, 60))


def test_a_rectangle_is_turned_in_pixels_and_not_in_percents():
    turned = box("r", 50, 50, 10, 20, rotation=90) | {"original_width": 200, "original_height": 100}
    found = asked(body(turned)).box

    assert found is not None  # 20 x 20 pixels, turned: 20 pixels to the left and 20 down
    assert found.box_xyxy == pytest.approx((40, 50, 50, 70))


@pytest.mark.parametrize(
    ("place", "frame_wh"),
    [((5, 5, 10, 10), (1e-320, 1e308)), ((5, 5, 10, 10), (1e308, 1e-320)), ((5, 5, 1e308, 1e308), (640, 480))],
)
def test_a_turned_rectangle_of_numbers_that_no_picture_has_asks_nothing_or_a_box(place: Any, frame_wh: Any):
    turned = box("r", *place, rotation=30) | dict(zip(("original_width", "original_height"), frame_wh, strict=True))
    found = read_asked(body(turned))
    assert found is None or (found.box is not None and all(0 <= side <= 100 for side in found.box.box_xyxy))


def test_points_and_boxes_outside_the_image_are_moved_to_its_border():
    assert asked(body(*point("a", -5, 140))).points[0] == PointPrompt(id="a", control="click", x=0, y=100, inside=True)
    found = asked(body(box("r", -10, 90, 30, 30))).box
    assert found is not None
    assert found.box_xyxy == pytest.approx((0, 90, 20, 100))


def test_a_task_that_is_only_opened_asks_nothing():
    opened = json.loads(body())
    assert read_asked(json.dumps({**opened, "params": {}}).encode()) is None
    assert read_asked(json.dumps({**opened, "params": {"context": None}}).encode()) is None
    assert read_asked(body()) is None


def test_nan_and_too_many_prompts_are_refused():
    assert read_asked(body(*point("a", 10, 20)).replace(b"10", b"NaN")) is None
    assert read_asked(body(*[one for n in range(101) for one in point(str(n), 10, 20)])) is None


def test_labels_that_postgres_cannot_store_are_left_out():
    assert asked(body(*point("a", 1, 1)).replace(b'"car"', b'"\\u0000"')).label is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes):
    assert read_asked(content) is None


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["id", "type", "value", "from_name", "is_positive"]), value=JSON)
def test_any_value_in_a_region_is_read_or_refused(name: str, value: Any):
    region = {**point("a", 10, 20)[0], name: value}
    found = read_asked(body(region, *point("b", 1, 1)))
    assert found is None or len(found.points) + (found.box is not None) > 0


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["id", "data", "drafts", "predictions", "annotations"]), value=JSON)
def test_any_value_in_a_task_is_read_or_refused(name: str, value: Any):
    found = read_asked(body(*point("a", 10, 20), **{name: value}))
    assert found is None or found.points[0].id == "a"


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_points_after_a_box_are_joined_with_it_until_it_is_old():
    clock = _Clock()
    boxes = Boxes(clock)
    boxes.join(asked(body(box("r", 10, 10, 20, 20))))

    joined = boxes.join(asked(body(*point("a", 12, 12, inside=False))))
    assert joined.box is not None
    assert joined.box.id == "r"

    clock.now += REMEMBERED_SECONDS + 1
    assert boxes.join(asked(body(*point("a", 12, 12, inside=False)))).box is None


def test_another_tasks_or_labels_points_are_not_joined():
    boxes = Boxes()
    boxes.join(asked(body(box("r", 10, 10, 20, 20))))

    assert boxes.join(asked(body(*point("a", 12, 12), id=4))).box is None
    assert boxes.join(asked(body(*point("a", 12, 12)).replace(b"car", b"bus"))).box is None


def test_a_box_that_a_newer_draft_no_longer_has_is_forgotten():
    boxes = Boxes()
    boxes.join(asked(body(box("r", 10, 10, 20, 20))))
    draft_with = [{"result": [{"id": "r"}, {"id": "a"}]}]
    draft_without = [{"result": [{"id": "a"}]}]

    assert boxes.join(asked(body(*point("a", 12, 12), drafts=draft_with))).box is not None
    assert boxes.join(asked(body(*point("a", 12, 12), drafts=draft_without))).box is None
    assert boxes.join(asked(body(*point("a", 12, 12)))).box is None


def test_a_click_far_outside_the_box_is_of_another_object():
    boxes = Boxes()
    boxes.join(asked(body(box("r", 10, 10, 20, 20))))

    assert boxes.join(asked(body(*point("a", 34, 12)))).box is not None  # the box was drawn a bit too small
    assert boxes.join(asked(body(*point("a", 90, 90, inside=False)))).box is not None
    assert boxes.join(asked(body(*point("a", 36, 12)))).box is None
    assert boxes.join(asked(body(*point("a", 12, 12)))).box is None


def test_a_box_whose_answer_was_accepted_is_forgotten():
    boxes = Boxes()
    boxes.answered(boxes.join(asked(body(box("r", 10, 10, 20, 20)))), "assist-1")
    boxes.answered(boxes.join(asked(body(*point("a", 12, 12, inside=False)))), "assist-2")

    assert boxes.join(asked(body(*point("a", 12, 12), drafts=[{"result": [{"id": "assist-1"}]}]))).box is not None
    assert boxes.join(asked(body(*point("b", 12, 12), drafts=[{"result": [{"id": "assist-2"}]}]))).box is None
    assert boxes.join(asked(body(*point("b", 12, 12)))).box is None
