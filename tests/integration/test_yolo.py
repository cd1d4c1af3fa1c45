"""YOLO datasets: masks drawn from them again equal the stored masks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
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


def written(
    engine: Engine,
    tmp_path: Path,
    files: dict[str, bytes],
    masks: Callable[[int], Sequence[StoredMask]],
    *,
    images: bool = True,
) -> tuple[Path, dict[str, str], list[str]]:
    """A dataset of a folder of these files, the name of each key's image in it, and what was said."""
    for key, data in files.items():
        (tmp_path / "photos" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / key).write_bytes(data)
    job = labeled_job(engine, list(files), lambda _, asset_id: masks(asset_id), source=str(tmp_path / "photos"))
    with engine.connect() as db:
        notes = export_yolo(db, job, tmp_path / "yolo", images=images)
    index = [json.loads(line) for line in (tmp_path / "yolo" / "images.jsonl").read_text().splitlines()]
    return tmp_path / "yolo", {entry["key"]: entry["file"] for entry in index}, notes


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*SIZE_HW, 3), (200, 40, 90), np.uint8)).save(file, kind)
    return file.getvalue()


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


def test_labels_of_any_alphabet_come_back_from_yaml_and_stand_there_as_they_are(engine: Engine, tmp_path: Path) -> None:
    labels = ["car 🚗", "𠮷野", "no", "1.10", "null", "a: b # c", " x", "a\u2028b\x7f", "", "\U0001fae9"]

    def some(asset_id: int) -> list[StoredMask]:
        return stored(asset_id, [BLOCK] * len(labels), scores=[0.9] * len(labels), labels=labels)

    dataset, _, _ = written(engine, tmp_path, {"a.png": picture("PNG")}, some)

    for name in ("segment", "detect"):
        data = (dataset / name / "data.yaml").read_text(encoding="utf-8")
        assert set(yaml.safe_load(data)["names"].values()) == set(labels)
        assert "car 🚗" in data
        numbers = {number for number, _ in lines(next((dataset / name / "labels").rglob("*.txt")))}
        assert numbers == set(range(len(labels)))


def test_images_get_names_and_formats_that_trainers_read(engine: Engine, tmp_path: Path) -> None:
    files = {
        "no suffix": picture("JPEG"),
        "a.jfif": picture("JPEG"),
        "b.gif": picture("GIF"),
        "c.jpg": picture("GIF"),
        "d.Webp": picture("WEBP"),
        "e.v2": picture("TIFF"),
        "f.PNG": picture("JPEG"),
        "g.tiff": b"no picture any more",
        "h": b"nor this",
    }
    dataset, names, notes = written(engine, tmp_path, files, lambda _: [])

    suffixes = {key: PurePosixPath(name).suffix for key, name in names.items()}
    assert suffixes == {
        "no suffix": ".jpg", "a.jfif": ".jpg", "b.gif": ".png", "c.jpg": ".png", "d.Webp": ".webp", "e.v2": ".tif",
        "f.PNG": ".png", "g.tiff": ".tiff", "h": "",
    }  # fmt: skip
    for key, name in names.items():
        for kind in ("segment", "detect"):
            data = (dataset / kind / name).read_bytes()
            assert (data == files[key]) == (key not in ("b.gif", "c.jpg"))
            assert (dataset / kind / name.replace("images/", "labels/")).with_suffix(".txt").exists()
    assert cv2.imread(str(dataset / "segment" / names["b.gif"])).shape == (*SIZE_HW, 3)
    assert any(note.startswith("5 images got a name or a format") for note in notes), notes
    assert any(note.startswith("1 images have names without a suffix") for note in notes), notes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_that_its_exif_turns_is_upright_where_opencv_reads_it(
    engine: Engine, tmp_path: Path, kind: str
) -> None:
    height, width = SIZE_HW
    lying = Image.new("RGB", (height, width), "white")
    lying.paste((200, 40, 90), (0, 0, height, 4))  # its upper border is on the right when it is upright
    exif = lying.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying.save(file, kind, exif=exif)
    flat = io.BytesIO()
    Image.new("RGB", (width, height)).save(flat, kind, exif=Image.Exif())

    dataset, names, _ = written(engine, tmp_path, {"a": file.getvalue(), "b": flat.getvalue()}, lambda _: [])

    read = cv2.imread(str(dataset / "segment" / names["a"]))
    assert read.shape == (*SIZE_HW, 3)
    assert read[:, : width // 2].min() > 200
    assert read[height // 2, -2, 1] < 100
    assert (dataset / "segment" / names["b"]).read_bytes() == flat.getvalue()


def test_without_images_names_that_trainers_pass_over_are_said(engine: Engine, tmp_path: Path) -> None:
    files = {"a": picture("JPEG"), "b.gif": picture("GIF"), "c.jpg": picture("JPEG")}
    _, _, notes = written(engine, tmp_path, files, lambda _: [], images=False)
    assert [note for note in notes if note.startswith("2 images have names") and "--images" in note]


def test_outlines_that_lost_more_than_two_percent_are_counted(engine: Engine, tmp_path: Path) -> None:
    lace = np.random.default_rng(0).random(SIZE_HW) < 0.7
    empty = np.zeros(SIZE_HW, bool)

    def some(asset_id: int) -> list[StoredMask]:
        return stored(asset_id, [RING, lace, BLOCK, empty], scores=[0.9] * 4, labels=[None] * 4)

    _, _, notes = written(engine, tmp_path, {"a.png": picture("PNG"), "b.png": picture("PNG")}, some)

    assert [note for note in notes if note.startswith("2 of 6 outlines lost more than 2 %") and "coco" in note]
    assert "2 masks without a single pixel are not in it" in notes


def test_a_dataset_that_lost_nothing_says_nothing(engine: Engine, tmp_path: Path) -> None:
    _, _, notes = written(engine, tmp_path, {"a.png": picture("PNG")}, masks)
    assert notes == []


def test_a_yolo_split_without_images_is_the_one_that_has_some(engine: Engine, tmp_path: Path) -> None:
    key = next(key for key in map("{}.jpg".format, range(99)) if split(key) == "val")
    job = labeled_job(engine, [key], lambda _, asset_id: masks(asset_id))

    with engine.connect() as db:
        export_yolo(db, job, tmp_path / "yolo")

    found = yaml.safe_load((tmp_path / "yolo" / "segment" / "data.yaml").read_text())
    assert {found[part] for part in ("train", "val", "test")} == {"images/val"}
