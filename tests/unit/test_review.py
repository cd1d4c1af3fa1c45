"""Verdicts on regions, which annotation counts, and the numbers made of them."""

from __future__ import annotations

import copy
import http.client
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest

from db.annotations import KnownTask
from db.results import StoredMask
from db.states import AnnotationStatus, Verdict
from orchestrator.label_studio.drawn import mask_from_region
from orchestrator.label_studio.regions import mask_ordinal, regions_for, regions_of_mask
from orchestrator.label_studio.review import judge_task
from orchestrator.label_studio.review_numbers import accepted_above
from orchestrator.label_studio.verdicts import Comparison, base_prediction, choose, compare, without_prompts
from orchestrator.label_studio.wake import SECRET_HEADER, wake_on_webhook
from tests.pixels import decode_counts
from workers.masks import BoolMask, Mask, mask_from_pixels

SIZE_HW = (100, 140)
ROWS, COLUMNS = np.mgrid[: SIZE_HW[0], : SIZE_HW[1]]


def disc(x: float, y: float, radius: float) -> BoolMask:
    found: BoolMask = (COLUMNS - x) ** 2 + (ROWS - y) ** 2 < radius**2
    return found


def shown(*masks: BoolMask, labels: tuple[str, ...] = (), as_: Any = "auto") -> list[dict[str, Any]]:
    names = labels or ("car",) * len(masks)
    made = [mask_from_pixels(m, predicted_iou=0.9, label=label) for m, label in zip(masks, names, strict=True)]
    return regions_for(made, asset_id=7, as_=as_).result


def judge(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Comparison:
    return compare(before, after, asset_id=7, size_hw=SIZE_HW)


def verdicts(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Verdict]:
    return [row.verdict for row in judge(before, after).regions]


def moved(region: dict[str, Any], percent: float) -> dict[str, Any]:
    changed = copy.deepcopy(region)
    changed["value"]["points"] = [[x + percent, y] for x, y in region["value"]["points"]]
    return changed


def drawn(x: float, y: float, side: float, **fields: Any) -> dict[str, Any]:
    value = {"x": x, "y": y, "width": side, "height": side, "rotation": 0, "rectanglelabels": ["tree"]}
    frame = {"original_width": SIZE_HW[1], "original_height": SIZE_HW[0], "image_rotation": 0}
    return {"id": "xYz1", "type": "rectanglelabels", "origin": "manual", "value": value, **frame, **fields}


# ------------------------------------------------------------------------------------------ one annotation


def test_what_comes_back_as_it_was_is_kept() -> None:
    regions = shown(disc(30, 30, 20), disc(90, 50, 25) & ~disc(90, 50, 10))
    assert verdicts(regions, copy.deepcopy(regions)) == [Verdict.KEPT, Verdict.KEPT]


def test_numbers_that_a_page_wrote_back_a_little_differently_are_kept() -> None:
    regions = shown(disc(30, 30, 20))
    assert verdicts(regions, [moved(regions[0], 3e-6)]) == [Verdict.KEPT]


def test_a_moved_region_is_edited_with_the_iou_of_before_and_after_whatever_its_origin_says() -> None:
    regions = shown(disc(30, 30, 20))
    after = moved(regions[0], 5)

    (row,) = judge(regions, [after]).regions

    one, other = mask_from_region(regions[0]), mask_from_region(after)
    assert after["origin"] == "prediction"
    assert row.verdict is Verdict.EDITED
    assert row.iou == pytest.approx((one & other).sum() / (one | other).sum())
    assert row.counts is not None
    assert (decode_counts(row.counts, SIZE_HW) == other).all()


def test_another_label_is_an_edit_that_leaves_the_stored_mask() -> None:
    regions = shown(disc(30, 30, 20))
    after = copy.deepcopy(regions)
    after[0]["value"]["polygonlabels"] = ["bus"]

    (row,) = judge(regions, after).regions

    assert (row.verdict, row.label, row.iou, row.counts) == (Verdict.EDITED, "bus", 1.0, None)


def test_a_region_that_is_gone_is_deleted_and_a_drawn_one_added() -> None:
    regions = shown(disc(30, 30, 20), disc(90, 50, 25))
    found = judge(regions, [regions[0], drawn(50, 60, 20)]).regions
    assert sorted(row.verdict for row in found) == [Verdict.ADDED, Verdict.DELETED, Verdict.KEPT]
    added = next(row for row in found if row.verdict is Verdict.ADDED)
    assert (added.label, added.mask_n, added.bbox_xywh) == ("tree", None, (70, 60, 28, 20))


def test_the_parts_of_a_mask_are_one_and_losing_one_is_an_edit() -> None:
    regions = shown(disc(30, 30, 15) | disc(100, 60, 25))
    assert len(regions) == 2
    assert verdicts(regions, regions[::-1]) == [Verdict.KEPT]

    for left in regions:
        (row,) = judge(regions, [left]).regions
        assert row.verdict is Verdict.EDITED
        assert 0 < (row.iou or 0) < 1
    assert verdicts(regions, []) == [Verdict.DELETED]


def test_what_is_drawn_under_a_mask_belongs_to_it() -> None:
    regions = shown(disc(30, 30, 15))
    child = drawn(60, 60, 20, parentID=regions[0]["id"])

    (row,) = judge(regions, [child, *regions]).regions

    assert row.verdict is Verdict.EDITED
    assert row.area_px is not None
    assert row.area_px > mask_from_region(regions[0]).sum()


def test_drawn_parts_of_a_drawn_parent_are_one_mask() -> None:
    after = [drawn(0, 0, 10, id="child", parentID="parent"), drawn(50, 50, 10, id="parent")]
    (row,) = judge([], after).regions
    assert row.verdict is Verdict.ADDED
    assert row.area_px == 2 * 14 * 10


def test_parents_in_a_circle_end() -> None:
    after = [drawn(0, 0, 10, id="a", parentID="b"), drawn(50, 50, 10, id="b", parentID="a")]
    assert {row.verdict for row in judge([], after).regions} == {Verdict.ADDED}


def test_an_untouched_brush_is_kept_and_a_painted_one_is_edited() -> None:
    regions = shown(disc(30, 30, 20), as_="brush")
    painted = shown(disc(30, 30, 22), as_="brush")
    assert verdicts(regions, regions) == [Verdict.KEPT]
    assert verdicts(regions, painted) == [Verdict.EDITED]


def test_a_brush_wiped_empty_is_deleted() -> None:
    regions = shown(disc(30, 30, 20), as_="brush")
    painted = copy.deepcopy(regions)
    whole = shown(disc(30, 30, 20), as_="brush")
    assert verdicts(whole, painted) == [Verdict.KEPT]
    outside = moved(shown(disc(30, 30, 20))[0], 400)
    assert verdicts(shown(disc(30, 30, 20)), [outside]) == [Verdict.DELETED]


def test_a_damaged_region_leaves_the_stored_mask_and_is_counted() -> None:
    regions = shown(disc(30, 30, 20))
    damaged = copy.deepcopy(regions)
    damaged[0]["value"]["points"] = [[1, 2]]

    found = judge(regions, damaged)

    assert found.unreadable == 1
    assert [(row.verdict, row.counts, row.iou) for row in found.regions] == [(Verdict.EDITED, None, None)]


def test_key_points_are_counted_as_unread_and_choices_are_not() -> None:
    frame = {"original_width": SIZE_HW[1], "original_height": SIZE_HW[0]}
    point = {"id": "p", "type": "keypointlabels", "value": {"x": 1, "y": 1}, **frame}
    choice = {"id": "c", "type": "choices", "value": {"choices": ["blurred"]}}
    found = judge([], [point, choice])
    assert (found.regions, found.unreadable) == ((), 1)


def polygon(*labels: str, kind: str = "polygonlabels", **fields: Any) -> dict[str, Any]:
    """A rectangle of 300 x 100 at 200, 100 on 1000 x 500, as the first mask of asset 7."""
    points = [[20, 20], [50, 20], [50, 40], [20, 40]]
    value = {"points": points, "closed": True, **({kind: list(labels)} if kind.endswith("labels") else {})}
    frame = {"original_width": 1000, "original_height": 500, "image_rotation": 0}
    return {"id": "m7-0", "type": kind, "origin": "prediction", "value": value, **frame, **fields}


def on_photo(before: list[Any], after: list[Any]) -> Comparison:
    return compare(before, after, asset_id=7, size_hw=(500, 1000))


def seen(found: Comparison) -> list[tuple[str, str, float | None]]:
    return [(str(row.verdict), row.label, row.iou) for row in found.regions]


@pytest.mark.parametrize("place", [{"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0}, {"points": [[1, 2]]}, {}])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("taxonomy", [["Insect", "Moth"]]),
        ("number", 3),
        ("datetime", "2026-01-02"),
        ("choices", ["broken"]),
        ("textarea", ["a"]),
        ("rating", 4),
        ("pairwise", "left"),
        ("ranker", ["a", "b"]),
        ("of a later version", "x"),
    ],
)
def test_what_is_said_about_a_region_is_neither_a_mask_nor_unreadable(
    kind: str, said: Any, place: dict[str, Any]
) -> None:
    attribute = polygon(kind=kind) | {"from_name": kind, "value": {**place, kind: said}}
    found = on_photo([polygon("Car")], [attribute, polygon("Car")])
    assert (seen(found), found.unreadable) == ([("kept", "Car", None)], 0)


def test_an_attribute_of_a_key_point_counts_with_it_once() -> None:
    point = polygon(id="k", type="keypointlabels", value={"x": 1, "y": 1})
    number = polygon(id="k", type="number", value={"x": 1, "y": 1, "number": 3})
    whole_picture = {"id": "c", "type": "taxonomy", "value": {"taxonomy": [["a"]]}, "original_width": 1000}
    assert on_photo([], [point, number, whole_picture]).unreadable == 1
    assert on_photo([], [{"id": "k", "type": "keypointlabels", "value": {"x": 1, "y": 1}}]).unreadable == 1


@pytest.mark.parametrize(
    ("after", "label"),
    [
        ([polygon("Car", "Damaged")], "Car"),
        ([polygon("Damaged", "Car")], "Damaged"),
        ([polygon()], "object"),
        ([polygon(kind="polygon")], "object"),
        ([polygon(kind="polygon"), polygon("Truck", kind="labels")], "Truck"),
        ([polygon("Car"), polygon("Damaged", kind="labels")], "Car"),
        ([polygon("Car", from_name="a"), polygon("Wet", from_name="b")], "Car"),
    ],
)
def test_a_second_label_and_a_lost_one_are_edits(after: list[dict[str, Any]], label: str) -> None:
    assert seen(on_photo([polygon("Car")], after)) == [("edited", label, 1.0)]


def test_a_label_in_a_result_of_its_own_is_the_regions() -> None:
    after = [polygon(kind="polygon"), polygon("Car", kind="labels")]
    assert seen(on_photo([polygon("Car")], after)) == [("kept", "Car", None)]


def test_a_part_with_another_label_is_an_edit() -> None:
    regions = shown(disc(30, 30, 15) | disc(100, 60, 25))
    after = copy.deepcopy(regions)
    after[1]["value"]["polygonlabels"] = ["bus"]
    assert [(row.verdict, row.label, row.iou) for row in judge(regions, after).regions] == [
        (Verdict.EDITED, "car", 1.0)
    ]


@pytest.mark.parametrize(
    "frame",
    [
        {"original_width": None, "original_height": None},
        {"original_width": 1000.0, "original_height": 500.0},
        {"original_width": None, "image_rotation": None},
    ],
)
def test_a_region_that_does_not_say_its_frame_is_read_in_the_assets_own(frame: dict[str, Any]) -> None:
    region = polygon("Car", **frame)
    for after in (region, {name: value for name, value in region.items() if value is not None}):
        (added,) = on_photo([], [after]).regions
        assert (added.verdict, added.label, added.bbox_xywh) == (Verdict.ADDED, "Car", (200, 100, 300, 100))
        assert seen(on_photo([polygon("Car")], [after])) == [("kept", "Car", None)]


@pytest.mark.parametrize("frame", [{"original_width": 999}, {"original_width": "1000"}, {"original_width": 999.5}])
def test_a_region_of_another_frame_is_unreadable(frame: dict[str, Any]) -> None:
    found = on_photo([], [polygon("Car", id="x", **frame)])
    assert (found.regions, found.unreadable) == ((), 1)


def test_a_magic_wands_region_is_a_brush() -> None:
    (brush,) = shown(disc(30, 30, 20), as_="brush")
    value = {name: brush["value"][name] for name in ("format", "rle")}
    wand = {**brush, "id": "w", "type": "magicwand", "value": value, "origin": "manual"}
    label = {**wand, "type": "labels", "value": {"labels": ["sky"]}}

    found = judge([], [wand, label])

    assert found.unreadable == 0
    assert [(row.verdict, row.label, row.area_px) for row in found.regions] == [
        (Verdict.ADDED, "sky", int(disc(30, 30, 20).sum()))
    ]


def test_what_is_no_region_at_all_is_counted_and_stops_nothing() -> None:
    found = on_photo([polygon("Car")], ["x", None, {"id": 1}, {"type": ["a"], "value": 3}, polygon("Car")])
    assert (seen(found), found.unreadable) == ([("kept", "Car", None)], 2)


def test_what_postgres_cannot_hold_stops_nothing() -> None:
    """Label Studio stores whatever its API is sent: NUL and half a character in labels, ids that are lists."""
    prompt = {"id": [1], "from_name": "click", "type": "keypoint", "value": {}}
    far = {**drawn(10, 10, 10, id="m7-1"), "value": {**drawn(10, 10, 10)["value"], "x": 10**400}}
    odd = [{"id": [2]}, drawn(1, 1, 1, id="m7-" + "9" * 5000), prompt]
    before = [*shown(disc(30, 30, 20)), drawn(10, 10, 10, id="m7-1")]

    found = judge(before, without_prompts([*relabelled(before[:1], "c\0a\ud800r"), far, *odd], ["click"]))

    assert [(row.verdict, row.mask_n) for row in found.regions] == [
        (Verdict.EDITED, 0),
        (Verdict.EDITED, 1),
        (Verdict.ADDED, None),
    ]
    assert [row.label for row in found.regions] == ["c\\x00a\\ud800r", "tree", "tree"]
    assert mask_ordinal("m7-" + "9" * 5000, 7) is mask_ordinal("m7-9999999999", 7) is None


def relabelled(regions: list[dict[str, Any]], label: str) -> list[dict[str, Any]]:
    return [{**r, "value": {**r["value"], r["type"]: [label]}} for r in regions]


# ------------------------------------------------------------------------------------------ several annotations


def annotation(number: int, person: int, minute: int, **fields: Any) -> dict[str, Any]:
    stamp = f"2026-11-20T12:{minute:02}:00Z"
    return {"id": number, "completed_by": person, "updated_at": stamp, "was_cancelled": False, "result": [], **fields}


def test_a_persons_newest_counts_and_of_several_people_the_newest() -> None:
    found = choose([annotation(1, 5, 10), annotation(2, 5, 11), annotation(3, 6, 9)])
    assert found == {1: AnnotationStatus.SUPERSEDED, 2: AnnotationStatus.CHOSEN, 3: AnnotationStatus.OTHER}


def test_an_older_annotation_that_was_changed_last_is_the_newest() -> None:
    found = choose([annotation(1, 5, 30), annotation(2, 5, 11)])
    assert found == {1: AnnotationStatus.CHOSEN, 2: AnnotationStatus.SUPERSEDED}


def test_half_a_second_later_is_later() -> None:
    half = annotation(1, 5, 10, updated_at="2026-11-20T12:10:00.500000Z")
    assert choose([half, annotation(2, 6, 10)])[1] is AnnotationStatus.CHOSEN


def test_ground_truth_goes_before_the_newest() -> None:
    found = choose([annotation(1, 5, 10, ground_truth=True), annotation(2, 6, 11)])
    assert found == {1: AnnotationStatus.CHOSEN, 2: AnnotationStatus.OTHER}


def test_skipped_ones_never_count() -> None:
    found = choose([annotation(1, 5, 20, was_cancelled=True), annotation(2, {"id": 6}, 11)])  # type: ignore[arg-type]
    assert found == {1: AnnotationStatus.SKIPPED, 2: AnnotationStatus.CHOSEN}
    assert choose([annotation(1, 5, 20, was_cancelled=True)]) == {1: AnnotationStatus.SKIPPED}


def test_an_annotation_began_from_the_prediction_it_names_or_the_one_it_shares_regions_with() -> None:
    one, two = {"id": 1, "result": [{"id": "m7-0"}]}, {"id": 2, "result": [{"id": "m8-0"}, {"id": "m8-1"}]}
    assert base_prediction({"parent_prediction": 1, "result": [{"id": "m8-0"}]}, [one, two]) is one
    assert base_prediction({"parent_prediction": None, "result": [{"id": "m8-1"}]}, [one, two]) is two
    assert base_prediction({"parent_prediction": 99, "result": []}, [one, two]) is None


def test_an_annotation_of_a_strangers_prediction_is_drawn_from_nothing_of_ours() -> None:
    known = KnownTask(ls_task_id=1, task_id=1, asset_ids={"ours": 7}, sizes_hw={7: SIZE_HW})
    strange = {"id": 9, "model_version": "theirs", "result": shown(disc(30, 30, 20))}
    task = {
        "annotations": [annotation(1, 5, 1, result=strange["result"], parent_prediction=9)],
        "predictions": [strange],
    }

    (row,) = judge_task(task, known)

    assert (row.model_version, row.asset_id) == (None, None)
    assert [region.verdict for region in row.regions] == [Verdict.ADDED]


def test_an_annotation_of_another_jobs_prediction_of_the_version_is_read_as_it_was_drawn() -> None:
    """Its regions carry that job's asset ids: which of our masks they are is not known."""
    known = KnownTask(ls_task_id=1, task_id=1, asset_ids={"ours": 8}, sizes_hw={8: SIZE_HW})
    imported = {"id": 9, "model_version": "ours", "result": shown(disc(30, 30, 20))}
    task = {
        "annotations": [annotation(1, 5, 1, result=imported["result"], parent_prediction=9)],
        "predictions": [imported],
    }

    (row,) = judge_task(task, known)

    assert (row.model_version, row.asset_id) == (None, None)
    assert [region.verdict for region in row.regions] == [Verdict.ADDED]


def test_an_asset_nobody_looked_at_takes_each_regions_word_for_its_frame() -> None:
    known = KnownTask(ls_task_id=1, task_id=1, asset_ids={"ours": 7}, sizes_hw={})
    empty = {"id": 9, "model_version": "ours", "result": []}
    regions = [drawn(10, 10, 10), {**drawn(10, 10, 10, id="y"), "original_width": None}]
    task = {"annotations": [annotation(1, 5, 1, result=regions, parent_prediction=9)], "predictions": [empty]}

    (row,) = judge_task(task, known)

    assert ([region.verdict for region in row.regions], row.unread) == ([Verdict.ADDED], 1)


@pytest.mark.parametrize("about", [{"type": "choices", "choices": ["blurred"]}, {"type": "labels", "labels": ["car"]}])
@pytest.mark.parametrize("as_", ["polygon", "brush", "rectangle"])
def test_a_picked_mask_is_kept_also_with_a_result_about_its_region(as_: Any, about: dict[str, Any]) -> None:
    mask = mask_from_pixels(disc(30, 30, 20), predicted_iou=0.9, label="car")
    answer = regions_of_mask(mask, region_id="m7-3", as_=as_)
    said = {**answer[0], "type": about["type"], "value": about}
    task = {"annotations": [annotation(1, 5, 1, result=[*answer, said], parent_prediction=9)], "predictions": [EMPTY]}

    (row,) = judge_task(task, KNOWN, stored_masks=lambda asset_id, numbers: [stored_mask(mask, n) for n in numbers])

    assert [(region.verdict, region.mask_n) for region in row.regions] == [(Verdict.KEPT, 3)]


@pytest.mark.parametrize(("given", "stored"), [(3.5, 3.5), (0, 0), (None, None), (1e39, None), (-1, None)])
def test_a_time_that_cannot_be_one_is_not_known(given: float | None, stored: float | None) -> None:
    """Any number that a script sends is stored by Label Studio. Postgres has no room for the larger ones."""
    task = {"annotations": [annotation(1, 5, 1, lead_time=given)], "predictions": [EMPTY]}
    assert [row.lead_seconds for row in judge_task(task, KNOWN)] == [stored]


KNOWN = KnownTask(ls_task_id=1, task_id=1, asset_ids={"ours": 7}, sizes_hw={7: SIZE_HW})
EMPTY = {"id": 9, "model_version": "ours", "result": []}


def stored_mask(mask: Mask, n: int) -> StoredMask:
    x, y, w, h = (int(side) for side in mask.bbox_xywh)
    return StoredMask(
        asset_id=7,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
        predicted_iou=mask.predicted_iou,
        stability_score=None,
        label=mask.label,
        prompt=None,
    )


# ------------------------------------------------------------------------------------------ numbers


def test_the_score_from_which_on_nineteen_of_twenty_were_kept() -> None:
    found = accepted_above([(0.99, 10, 10), (0.9, 9, 10), (0.8, 0, 5), (0.7, 0, 1)], share=0.95)
    assert found is not None
    assert (found.score, found.kept, found.predictions) == (0.9, 19, 20)
    assert accepted_above([(0.9, 9, 10)], share=0.95) is None
    assert accepted_above([], share=0.95) is None


def test_a_webhook_wakes_only_with_the_secret() -> None:
    event = threading.Event()
    with wake_on_webhook("127.0.0.1", 0, secret="open sesame", event=event) as (host, port):
        assert post(host, port, {}) == 403
        assert post(host, port, {SECRET_HEADER: "close sesame"}) == 403
        assert not event.is_set()
        assert post(host, port, {SECRET_HEADER: "open sesame"}) == 204
        assert event.is_set()


def test_a_webhook_that_is_none_or_breaks_off_wakes_nobody_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    event = threading.Event()
    head = f"POST / HTTP/1.1\r\n{SECRET_HEADER}: open sesame\r\nContent-Length: "
    with wake_on_webhook("127.0.0.1", 0, secret="open sesame", event=event) as (host, port):
        for length in ("abc", "9"):
            with socket.create_connection((host, port), timeout=60) as broken:
                broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close is a reset
                broken.sendall(f"{head}{length}\r\n\r\nx".encode())
        assert post(host, port, {SECRET_HEADER: "close sesame"}) == 403
    assert not event.is_set()
    assert capfd.readouterr().err == ""


def post(host: str, port: int, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=60)
    try:
        connection.request("POST", "/", body=b"{}" * 100_000, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
