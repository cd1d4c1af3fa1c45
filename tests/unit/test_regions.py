"""Masks become regions that people can edit and that read back as what was reported; damaged regions are refused."""

import dataclasses
import json
import math
import time
import tracemalloc
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_studio_sdk.converter.utils import convert_annotation_to_yolo_obb
from label_studio_sdk.label_interface import LabelInterface

from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.drawn import RegionError, mask_from_region
from orchestrator.label_studio.entries import MAX_BRUSH_BYTES
from orchestrator.label_studio.regions import mask_ordinal, prediction_task, regions_for
from orchestrator.shapes.colours import label_colour
from orchestrator.shapes.polygons import fit_polygons
from orchestrator.shapes.rasterise import polygon_edges, ring_px
from orchestrator.shapes.runs import edges_from_counts, edges_from_pixels, pixels_from_edges, run_iou
from tests.needs import TESTDATA
from workers.masks import Mask, encode_counts, mask_from_pixels

VECTORS = TESTDATA / "ls_vectors"


@st.composite
def noisy_masks(draw):
    """(H, W) bool: anything from a single pixel to noise with nested holes and islands."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([1, 1, 2, 5]))
    coarse = random.random((height // grain + 1, width // grain + 1)) < draw(st.sampled_from([0.05, 0.3, 0.5, 0.8, 1]))
    return np.kron(coarse, np.ones((grain, grain), bool))[:height, :width]


@st.composite
def objects(draw):
    """A (120, 160) bool mask as models make them: a blob with a wavy outline, holes, and now and then a second part."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size_hw = (120, 160)
    canvas = np.zeros(size_hw, np.uint8)
    for _ in range(draw(st.integers(1, 2))):
        cv2.fillPoly(canvas, [_blob(random, random.uniform(30, 90, 2), random.uniform(8, 40))], 1)
    for _ in range(draw(st.integers(0, 3))):
        cv2.fillPoly(canvas, [_blob(random, random.uniform(20, 100, 2), random.uniform(2, 10))], 0)
    return canvas.astype(bool)


def _blob(random, centre, radius):
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radii = radius * (1 + 0.15 * np.sin(3 * angle + random.uniform(0, 6)) + 0.05 * np.sin(9 * angle))
    points = np.stack((np.cos(angle), np.sin(angle)), axis=1) * radii[:, None] + centre
    return points.astype(np.int32)


def _mask(pixels, **fields):
    return mask_from_pixels(pixels, **{"predicted_iou": 0.9} | fields)


def _iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def _union(regions, size_hw):
    return np.logical_or.reduce([mask_from_region(region, size_hw=size_hw) for region in regions])


def _disc(size_hw=(100, 120), centre=(60, 50), radius=30):
    return cv2.circle(np.zeros(size_hw, np.uint8), centre, radius, 1, -1).astype(bool)


# Runs


@given(noisy_masks(), noisy_masks())
@settings(max_examples=100, deadline=None)
def test_edges_agree_with_pixels(a, b):
    b = np.resize(b, a.shape)
    edges_a, edges_b = edges_from_counts(encode_counts(a), a.shape), edges_from_pixels(b)

    assert np.array_equal(edges_a, edges_from_pixels(a))
    assert np.array_equal(pixels_from_edges(edges_a, a.shape), a)
    assert run_iou(edges_a, edges_b) == pytest.approx(_iou(a, b) if (a | b).any() else 1.0, abs=1e-12)


@pytest.mark.parametrize("counts", ["", "0", "5o", "\x00", "猫", "oooooooooo0", "52", "d0", "P"])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        edges_from_counts(counts, (3, 4))


# Polygons


@given(noisy_masks())
@settings(max_examples=150, deadline=None)
def test_outlines_are_exact_where_exactness_is_asked(pixels):
    edges = edges_from_pixels(pixels)
    polygons = fit_polygons([edges], pixels.shape, min_iou=1.0, max_vertices=10**6, max_parts=10**6)[0]
    if polygons is None:
        assert not pixels.any()
        return

    painted = polygon_edges([ring_px(ring, pixels.shape) for ring in polygons.rings], pixels.shape)
    assert polygons.iou == 1.0
    assert np.array_equal(pixels_from_edges(painted, pixels.shape), pixels)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.3, 0.7, 0.97, 1])), max_size=6))
@settings(max_examples=60, deadline=None)
def test_masks_fitted_together_do_not_touch_each_other(recipes):
    masks = [edges_from_pixels(np.random.default_rng(seed).random((9, 11)) < share) for seed, share in recipes]

    together = fit_polygons(masks, (9, 11), max_vertices=60)

    assert len(together) == len(masks)
    for found, edges in zip(together, masks, strict=True):
        (alone,) = fit_polygons([edges], (9, 11), max_vertices=60)
        assert (found is None) == (alone is None)
        if found is not None:
            assert found.iou == alone.iou
            assert [ring.tolist() for ring in found.rings] == [ring.tolist() for ring in alone.rings]


@given(objects())
@settings(max_examples=60, deadline=None)
def test_polygons_reach_the_iou_that_they_report(pixels):
    found = regions_for([_mask(pixels)] if pixels.any() else [], asset_id=1, as_="polygon")

    if pixels.any():
        assert found.ious[0] >= 0.98
        assert _iou(_union(found.result, pixels.shape), pixels) == pytest.approx(found.ious[0], abs=1e-12)
        assert sum(len(region["value"]["points"]) for region in found.result) <= 400


@given(st.lists(st.tuples(st.floats(-20, 60), st.floats(-20, 60)), min_size=3, max_size=12))
@settings(max_examples=100, deadline=None)
def test_pixels_belong_to_a_polygon_by_their_centre_and_winding(points):
    ring = np.array(points)
    painted = pixels_from_edges(polygon_edges([ring], (40, 40)), (40, 40))

    # The angle that the ring turns around each centre, in turns.
    centres = np.stack(np.meshgrid(np.arange(40) + 0.5, np.arange(40) + 0.5), axis=2)
    spokes = ring - centres[:, :, None]
    ends = np.roll(spokes, -1, axis=2)
    cross = spokes[..., 0] * ends[..., 1] - spokes[..., 1] * ends[..., 0]
    turns = np.arctan2(cross, (spokes * ends).sum(axis=3)).sum(axis=2) / (2 * np.pi)
    lengths = np.maximum(np.hypot(*np.moveaxis(ends - spokes, 3, 0)), 1e-12)
    along = np.clip(-(spokes * (ends - spokes)).sum(axis=3) / lengths**2, 0, 1)
    clear = np.hypot(*np.moveaxis(spokes + along[..., None] * (ends - spokes), 3, 0)).min(axis=2) > 1e-6
    assert np.array_equal(painted[clear], (np.round(turns) != 0)[clear])


def test_a_browser_would_cover_the_same_pixels():
    pixels = _disc(radius=40) & ~_disc(radius=12)
    (region,) = regions_for([_mask(pixels)], asset_id=1).result

    # Sixteen samples a pixel stand in for the canvas, which smooths edges by how much of a pixel is covered.
    ring = ring_px(np.array(region["value"]["points"]), pixels.shape)
    fine = pixels_from_edges(polygon_edges([ring * 4], (400, 480)), (400, 480))
    covered = fine.reshape(100, 4, 120, 4).mean(axis=(1, 3))

    assert np.minimum(covered, pixels).sum() / np.maximum(covered, pixels).sum() > 0.97


def test_holes_are_cut_in_by_a_keyhole_and_islands_are_parts():
    pixels = _disc(radius=40) & ~_disc(radius=25) | _disc(radius=10)
    found = regions_for([_mask(pixels)], asset_id=7)

    ring, island = found.result
    assert mask_from_region(ring)[50, 60 - 32]
    assert not mask_from_region(ring)[50, 60 - 18]
    assert mask_from_region(island)[50, 60]
    assert (ring["id"], island["id"], island["parentID"]) == ("m7-0", "m7-0-p1", "m7-0")
    assert "parentID" not in ring
    points = [tuple(point) for point in ring["value"]["points"]]
    assert len(points) - len(set(points)) == 2  # the bridge's two ends, each passed twice


@pytest.mark.parametrize("as_", ["auto", "polygon"])
def test_tiny_masks_do_not_vanish(as_):
    shapes = [np.zeros((50, 70), bool) for _ in range(5)]
    shapes[0][20, 30] = True
    shapes[1][0, 0] = True
    shapes[2][:, 69] = True
    shapes[3][10, 5:60] = True
    shapes[4][np.arange(40), np.arange(40)] = True
    for pixels in shapes:
        found = regions_for([_mask(pixels)], asset_id=1, as_=as_)
        assert found.left_out == 0
        assert found.ious[0] >= 0.95
        assert _iou(_union(found.result, pixels.shape), pixels) >= 0.95


def test_the_tolerance_follows_the_frame():
    small, large = (_disc((h, h), (h // 2, h // 2), h // 4) for h in (200, 4000))
    counts = [len(regions_for([_mask(p)], asset_id=1).result[0]["value"]["points"]) for p in (small, large)]

    # Twenty times the outline, three times the points: what a screen cannot show is not followed.
    assert counts[1] < 4 * counts[0] < 100


def test_lace_is_brushed_until_the_brushes_run_out():
    lace = np.random.default_rng(0).random((64, 64)) < 0.7
    masks = [_mask(lace, predicted_iou=0.9 - 0.1 * n) for n in range(3)]

    found = regions_for(masks, asset_id=1, max_brush=2)

    assert [region["type"] for region in found.result[:2]] == ["brushlabels", "brushlabels"]
    assert found.ious[:2] == (1.0, 1.0)
    assert {region["type"] for region in found.result[2:]} == {"polygonlabels"}
    assert 0.5 <= found.ious[2] < 0.95
    assert np.array_equal(mask_from_region(found.result[0]), lace)


def test_without_limits_what_no_polygon_shows_is_a_brush():
    lace = np.random.default_rng(0).random((64, 64)) < 0.7
    dust = np.random.default_rng(1).random((64, 64)) < 0.05
    masks = [_mask(pixels, predicted_iou=0.5) for pixels in (lace, dust) for _ in range(30)]

    found = regions_for(masks, asset_id=1)

    assert (found.left_out, set(found.ious)) == (0, {1.0})
    limited = regions_for(masks, asset_id=1, max_brush=20)
    assert limited.left_out == 30
    heavy = regions_for(masks, asset_id=1, max_brush_bytes=100)
    assert {region["type"] for region in heavy.result} == {"polygonlabels"}


def test_noise_neither_hangs_nor_floods():
    noise = _mask(np.random.default_rng(0).random((1200, 1200)) < 0.5)
    started = time.process_time()

    for as_ in ("auto", "polygon", "brush"):
        assert regions_for([noise], asset_id=1, as_=as_, max_brush_bytes=MAX_BRUSH_BYTES).left_out == 1
    assert regions_for([noise], asset_id=1).ious == (1.0,)
    assert time.process_time() - started < 8


# Regions of an asset


def test_best_masks_come_first_and_are_shown_whole():
    two_parts = _disc(centre=(20, 20), radius=10) | _disc(centre=(80, 60), radius=15)
    masks = [
        _mask(_disc(), predicted_iou=0.5, label="low"),
        _mask(two_parts, predicted_iou=0.8, label="two"),
        _mask(_disc(), predicted_iou=1.03, label="best"),
        _mask(_disc(), predicted_iou=math.nan),
    ]

    whole = regions_for(masks, asset_id="a9")
    cut = regions_for(masks, asset_id="a9", max_masks=2)

    assert [region["id"] for region in whole.result] == ["ma9-2", "ma9-1", "ma9-1-p1", "ma9-0", "ma9-3"]
    assert [region["score"] for region in whole.result] == [1.0, 0.8, 0.8, 0.5, 0.0]
    assert whole.result[-1]["value"]["polygonlabels"] == ["object"]
    assert (len(whole.ious), whole.left_out) == (4, 0)
    # Masks are counted, not their parts.
    assert [region["id"] for region in cut.result] == ["ma9-2", "ma9-1", "ma9-1-p1"]
    assert (len(cut.ious), cut.left_out) == (2, 2)
    assert [mask_ordinal(region["id"], "a9") for region in whole.result] == [2, 1, 1, 0, 3]
    for other in ("ma9-", "ma9-x", "ma91-1", "xma9-1", "ma9--1", "ma9-²", "Dx_aB91ISN", ""):
        assert mask_ordinal(other, "a9") is None


def test_an_asset_of_three_thousand_masks_shows_the_best():
    disc = _mask(_disc())
    masks = [dataclasses.replace(disc, predicted_iou=n / 3000) for n in range(3000)]

    found = regions_for(masks, asset_id=1, max_masks=150)

    assert (len(found.result), found.left_out) == (150, 2850)
    assert found.result[0]["id"] == "m1-2999"
    assert regions_for(masks, asset_id=1).left_out == 0


def test_masks_of_two_frames_are_refused():
    with pytest.raises(ValueError, match="different frames"):
        regions_for([_mask(_disc()), _mask(_disc((100, 121)))], asset_id=1)


def test_heavy_masks_are_fitted_a_few_at_a_time_with_the_same_result(monkeypatch):
    masks = [_mask(_disc(radius=10 + n), predicted_iou=n / 20) for n in range(20)]
    expected = regions_for(masks, asset_id=1)

    monkeypatch.setattr("orchestrator.label_studio.regions._CHARACTERS_TOGETHER", 100)

    assert regions_for(masks, asset_id=1) == expected


def test_masks_without_pixels_are_left_out():
    empty = Mask(
        counts=encode_counts(np.zeros((4, 5), bool)), size_hw=(4, 5), bbox_xywh=(0, 0, 0, 0), area_px=0, predicted_iou=1
    )
    for as_ in ("auto", "polygon", "brush", "rectangle"):
        found = regions_for([empty], asset_id=1, as_=as_)
        assert (found.result, found.ious, found.left_out) == ([], (), 1)


@given(objects())
@settings(max_examples=20, deadline=None)
def test_brush_is_exact_and_rectangles_are_the_box(pixels):
    if not pixels.any():
        return
    mask = _mask(pixels)
    (brush,) = regions_for([mask], asset_id=1, as_="brush").result
    rectangles = regions_for([mask], asset_id=1, as_="rectangle")

    assert np.array_equal(mask_from_region(brush), pixels)
    box = mask_from_region(rectangles.result[0])
    x, y, w, h = (int(v) for v in mask.bbox_xywh)
    assert box[y : y + h, x : x + w].all()
    assert box.sum() == w * h
    assert rectangles.ious[0] == pytest.approx(_iou(box, pixels))


# Tasks and label config

LABELS = ["car", "a \"quoted\" <b> & 'other'", "猫", "рыжий кот", "x" * 300]


@pytest.mark.parametrize("as_", ["auto", "polygon", "brush", "rectangle"])
def test_the_sdk_accepts_what_is_published(as_):
    pixels = [_disc(), _disc(radius=40) & ~_disc(radius=25) | _disc(radius=10), np.eye(100, 120, dtype=bool)]
    pixels.append(np.random.default_rng(1).random((100, 120)) < 0.5)
    masks = [_mask(p, label=label, predicted_iou=1.2) for p in pixels for label in LABELS]

    regions = regions_for(masks, asset_id=3, as_=as_)
    task = prediction_task(
        image="s3://b/ü k.jpg", asset_id=3, size_hw=(100, 120), model_version="sam@1+2", regions=regions
    )

    assert json.loads(json.dumps(task, allow_nan=False)) == task
    assert task["data"] == {"image": "s3://b/ü k.jpg", "asset_id": 3, "width": 120, "height": 100}
    (prediction,) = task["predictions"]
    assert (prediction["model_version"], prediction["score"]) == ("sam@1+2", 1.0)
    assert LabelInterface(label_config(LABELS)).validate_prediction(prediction, return_errors=True) == []


def test_a_task_without_masks_has_an_empty_prediction():
    task = prediction_task(
        image="s3://b/k.jpg", asset_id=3, size_hw=(1, 1), model_version="v", regions=regions_for([], asset_id=3)
    )
    assert task["predictions"] == [{"model_version": "v", "score": 0.0, "result": []}]


def test_the_config_has_every_label_once_in_each_control_in_its_colour():
    view = ElementTree.fromstring(label_config([*LABELS, "car"]))

    assert [child.tag for child in view] == ["Image", "PolygonLabels", "BrushLabels", "RectangleLabels"]
    for control in view[1:]:
        assert control.get("toName") == view[0].get("name")
        assert [label.get("value") for label in control] == LABELS
        assert [label.get("background") for label in control] == [label_colour(label) for label in LABELS]
    assert [label.get("value") for label in ElementTree.fromstring(label_config([]))[1]] == ["object"]
    for bad in ("", "  ", "a\x00", "a\nb", "\ud800", "\ufffe"):
        with pytest.raises(ValueError, match="label"):
            label_config([bad])


def test_colours_do_not_change_with_the_version_or_the_other_labels():
    assert [label_colour(label) for label in ("car", "dog", "猫")] == ["#acae04", "#ab05d1", "#4e57da"]
    assert len({label_colour(f"label {n}") for n in range(100)}) > 95


# Regions that people drew


def _region(kind, **value):
    return {"id": "r", "type": kind, "original_width": 200, "original_height": 100, "value": value}


def test_rotated_rectangles_turn_about_their_corner():
    value = {"x": 30.0, "y": 20.0, "width": 20.0, "height": 30.0, "rotation": 33.0}
    label = value | {"original_width": 200, "original_height": 100}
    corners = np.array(convert_annotation_to_yolo_obb(label, normalize=False))

    painted = mask_from_region(_region("rectanglelabels", **value))

    assert np.array_equal(painted, pixels_from_edges(polygon_edges([corners], (100, 200)), (100, 200)))
    assert painted.sum() == pytest.approx(40 * 30, rel=0.02)


def test_ellipses_and_parts_outside_the_frame():
    ellipse = mask_from_region(_region("ellipselabels", x=50, y=50, radiusX=10, radiusY=30, rotation=90))
    beyond = mask_from_region(_region("rectanglelabels", x=90, y=-50, width=400, height=400))

    assert ellipse.sum() == pytest.approx(math.pi * 20 * 30, rel=0.01)
    assert np.ptp(np.nonzero(ellipse.any(axis=0))[0]) == 59
    assert np.array_equal(beyond, np.broadcast_to(np.arange(200) >= 180, (100, 200)))


@pytest.mark.usefixtures("testdata")
def test_regions_of_the_editor_are_read():
    annotation = json.loads((VECTORS / "lsf_image_tools_annotation.json").read_text())["annotations"][0]
    areas = {}
    for region in annotation["result"]:
        if region["type"] in ("rectangle", "rectanglelabels", "ellipse", "polygon", "brush"):
            pixels = mask_from_region(region, size_hw=(2802, 2242))
            areas[region["id"]] = int(pixels.sum())

    frame = 2242 * 2802
    assert areas["kuZf2E5DRQ"] == pytest.approx(frame * 0.1266667 * 0.10885806, rel=0.01)
    assert areas["YnhRme7NvX"] == pytest.approx(frame * math.pi * 0.14666667 * 0.0432231, rel=0.01)
    assert areas["wZ0I2XlKw1"] == 57608
    polygon = next(r for r in annotation["result"] if r["type"] == "polygon")["value"]["points"]
    x, y = np.array(polygon).T / 100
    shoelace = abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2
    assert areas["3-21_8nfMb"] == pytest.approx(frame * shoelace, rel=0.01)
    assert len(areas) == 7


TRIANGLE = [[0, 0], [50, 0], [0, 50]]


@pytest.mark.parametrize(
    "region",
    [
        {},
        _region("keypointlabels", x=1, y=1, width=1),
        _region("labels", labels=["a"]),
        _region("polygonlabels"),
        _region("polygonlabels", points=None),
        _region("polygonlabels", points=[[0, 0], [1, 1]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [2]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], ["2", "3"]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [None, 3]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [math.nan, 3]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [math.inf, 3]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [1e300, 3]]),
        _region("polygonlabels", points=[[0, 0], [1, 1], [10**400, 3]]),
        _region("polygonlabels", points=[[0, 0, 0]] * 3),
        _region("polygonlabels", points=[[[0, 0]]] * 3),
        _region("polygonlabels", points=[[0, 0]] * 200_000),
        _region("rectanglelabels", x=0, y=0, width=10),
        _region("rectanglelabels", x=0, y=0, width="10", height=10),
        _region("rectanglelabels", x=0, y=0, width=math.nan, height=10),
        _region("rectanglelabels", x=0, y=0, width=True, height=10),
        _region("ellipselabels", x=0, y=0, radiusX=1e9, radiusY=1),
        _region("brushlabels"),
        _region("brushlabels", rle="AAAA"),
        _region("brushlabels", rle=[0, 0, 0, 16, 57, 27, 255]),
        _region("polygonlabels", points=TRIANGLE) | {"value": [1]},
        _region("polygonlabels", points=TRIANGLE) | {"original_width": None},
        _region("polygonlabels", points=TRIANGLE) | {"original_width": 0},
        _region("polygonlabels", points=TRIANGLE) | {"original_width": True},
        _region("polygonlabels", points=TRIANGLE) | {"original_height": 100.5},
        _region("polygonlabels", points=TRIANGLE) | {"original_height": 10**12},
        _region("polygonlabels", points=TRIANGLE) | {"image_rotation": 90},
        _region("polygonlabels", points=TRIANGLE) | {"type": None},
        _region("polygonlabels", points=TRIANGLE) | {"type": ["polygonlabels"]},
    ],
)
def test_damaged_regions_are_refused(region):
    with pytest.raises(RegionError, match="region"):
        mask_from_region(region)


def test_regions_of_another_frame_are_refused():
    region = _region("polygonlabels", points=TRIANGLE)

    assert mask_from_region(region, size_hw=(100, 200)).shape == (100, 200)
    with pytest.raises(RegionError, match="image has"):
        mask_from_region(region, size_hw=(200, 100))


def test_a_tangled_polygon_is_refused_before_it_takes_memory():
    zigzag = [[0 if n % 2 else 100, n / 1000] for n in range(90_000)]
    region = _region("polygonlabels", points=zigzag) | {"original_width": 10_000, "original_height": 10_000}
    tracemalloc.start()
    with pytest.raises(RegionError, match="tangled"):
        mask_from_region(region)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 50_000_000
