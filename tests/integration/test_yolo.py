"""YOLO datasets: masks drawn from them again equal the stored masks."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from sqlalchemy import Engine

from db.results import StoredMask
from orchestrator.export.yolo import export_yolo, split
from tests.label_studio.reviewing import BLOCK, RING, SIZE_HW, TWO_PARTS, labeled_job, stored
from workers.masks import BoolMask

pytestmark = pytest.mark.integration

KEYS = [*(f"{n}/image.JPG" for n in range(20)), "none.png"]
LABELS = ["ring: 'a' \"b\"", "пара", None]


@pytest.fixture
def dataset(engine: Engine, tmp_path: Path) -> Path:
    for key in KEYS:
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / key).write_bytes(b"the bytes of " + key.encode())
    job = labeled_job(
        engine,
        KEYS,
        lambda key, asset_id: masks(asset_id) if key != "none.png" else [],
        source=str(tmp_path / "photos"),
    )
    with engine.connect() as db:
        export_yolo(db, job, tmp_path / "yolo", images=True)
    return tmp_path / "yolo"


def masks(asset_id: int) -> list[StoredMask]:
    return stored(asset_id, [RING, TWO_PARTS, BLOCK], scores=[0.9, 0.9, 0.9], labels=LABELS)


def lines(path: Path) -> list[tuple[int, np.ndarray]]:
    rows = [line.split() for line in path.read_text().splitlines()]
    return [(int(row[0]), np.array(row[1:], np.float64)) for row in rows]


def filled(numbers: np.ndarray) -> BoolMask:
    """The pixels with their centre inside, computed at eight times the size, because fillPoly draws the border too."""
    height, width = SIZE_HW
    canvas = np.zeros((height * 8, width * 8), np.uint8)
    points = np.rint(numbers.reshape(-1, 2) * (width * 8, height * 8)).astype(np.int32)
    cv2.fillPoly(canvas, [points], 1)
    found: BoolMask = canvas[4::8, 4::8].astype(bool)
    return found


def test_outlines_keep_holes_and_parts_and_boxes_are_the_masks(dataset: Path) -> None:
    index = [json.loads(line) for line in (dataset / "images.jsonl").read_text().splitlines()]
    assert len({entry["file"] for entry in index}) == len(KEYS)
    for entry in index[:3]:
        name = entry["file"].replace("images/", "labels/").replace(".jpg", ".txt")
        for (number, outline), pixels in zip(lines(dataset / "segment" / name), (RING, TWO_PARTS, BLOCK), strict=True):
            again = filled(outline)
            assert (again & pixels).sum() / (again | pixels).sum() > 0.95, number
        for (_, box), pixels in zip(lines(dataset / "detect" / name), (RING, TWO_PARTS, BLOCK), strict=True):
            ys, xs = np.nonzero(pixels)
            x, y, w, h = box * np.tile(SIZE_HW[::-1], 2)
            sides = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            assert sides == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1e-3)


def test_the_splits_hang_on_the_key_and_every_image_has_its_labels(dataset: Path) -> None:
    written = [json.loads(line) for line in (dataset / "images.jsonl").read_text().splitlines()]
    index = {entry["key"]: entry["file"] for entry in written}
    assert set(index) == set(KEYS)
    for key, file in index.items():
        assert file.split("/")[1] == split(key)
        for name in ("segment", "detect"):
            assert (dataset / name / file).read_bytes() == b"the bytes of " + key.encode()
            assert (dataset / name / file.replace("images/", "labels/")).with_suffix(".txt").exists()
    empty = (dataset / "segment" / index["none.png"].replace("images/", "labels/")).with_suffix(".txt")
    assert empty.read_text() == ""


def test_the_classes_are_yaml_whatever_their_letters(dataset: Path) -> None:
    for name in ("segment", "detect"):
        found = yaml.safe_load((dataset / name / "data.yaml").read_text())
        assert found["names"] == {0: LABELS[0], 1: LABELS[1], 2: "object"}
        assert (dataset / name / found["train"]).is_dir()
        assert any((dataset / name / found["val"]).iterdir())


def test_of_a_thousand_keys_about_a_tenth_is_for_validation() -> None:
    parts = [split(f"{n}.jpg") for n in range(1000)]
    assert 70 < parts.count("val") < 130
    assert 70 < parts.count("test") < 130
