from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from orchestrator.prompts.entries import PromptFileError
from orchestrator.prompts.files import PromptFile, read_prompts
from workers.models.registry import find_model

SOURCE = "/data/images"


def read(path: Path | str, source: str = SOURCE) -> PromptFile:
    return read_prompts(str(path), source=source, spec=find_model("sam_vit_b"), s3_endpoint=None)


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def stored(found: PromptFile) -> list[tuple[str, list[dict[str, Any]]]]:
    rows = [(key, json.loads(prompts)) for key, prompts in found.rows()]
    found.stored.close()
    return rows


BOX = {"box_xyxy": [1.0, 2.0, 3.0, 4.0]}


def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    written = write(tmp_path / "p.jsonl", {"key": "a.jpg", "prompts": [BOX]})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(written.read_bytes()))
    writer.start()

    assert stored(read(pipe)) == stored(read(written))
    writer.join()


def test_bad_lines_are_reported_with_file_and_line_and_stop_nothing_else(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"key": "a.jpg", "prompts": [BOX, {"box_xyxy": [9, 9, 1, 1]}]},
        "{broken",
        "",
        {"key": "b.jpg"},
        [1, 2],
        {"key": "c\x00.jpg", "prompts": [BOX]},
        '{"key": "d.jpg", "prompts": [{"box_xyxy": [NaN, 1, 2, 3]}]}',
        {"key": f"{SOURCE}/e.jpg", "prompts": [BOX], "width": 5},
        {"key": "f" * 2601, "prompts": [BOX]},  # no index of Postgres takes it
    )
    found = read(path)
    assert [line.partition(": ")[0] for line in found.bad] == [
        "p.jsonl:1, prompt 1",
        "p.jsonl:2",
        "p.jsonl:4",
        "p.jsonl:5",
        "p.jsonl:6",
        "p.jsonl:7",
        "p.jsonl:9",
    ]
    assert (found.prompts, found.bad_count, found.file_format) == (2, 7, "json-lines")
    rows = stored(found)
    assert [key for key, _ in rows] == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert rows[0][1][0] == BOX
    assert "p.jsonl:1, prompt 1: box_xyxy: [9, 9, 1, 1] is inverted" in rows[0][1][1]["error"]
    assert "error" in rows[1][1][0]


def test_the_hash_is_of_what_is_asked_whatever_the_files_name_and_layout(tmp_path: Path) -> None:
    one = read(write(tmp_path / "a.jsonl", {"key": "a.jpg", "prompts": [{"label": "x", "box_xyxy": [1, 2, 3, 4]}]}))
    same = read(write(tmp_path / "b", {"prompts": [{"box_xyxy": [1.0, 2, 3, 4], "label": "x"}], "key": "a.jpg"}, ""))
    other = read(write(tmp_path / "c", {"key": "a.jpg", "prompts": [{"label": "y", "box_xyxy": [1, 2, 3, 4]}]}))
    assert one.sha256 == same.sha256 != other.sha256
    for found in (one, same, other):
        found.stored.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"key": "a.jpg", "prompts": [{"text": "bus"}]}', "p:1: a prompt by text, expected box or points"),
        ("nothing of the kind", "no usable prompt among 0 entries: p:1: not JSON"),
        ("", "no usable prompt"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bb', "damaged JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "p").write_text(content)
    with pytest.raises(PromptFileError, match=said):
        read(tmp_path / "p")
    with pytest.raises(PromptFileError, match="cannot be read"):
        read(tmp_path / "absent")


@pytest.mark.slow
def test_a_long_file_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    line = json.dumps({"key": "%07d.jpg", "prompts": [BOX]})
    path = tmp_path / "lines.jsonl"

    def peak_of(count: int) -> int:
        path.write_text("".join(line % n + "\n" for n in range(count)))
        tracemalloc.start()
        found = read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found.stored.close()
        assert found.keys == count
        return peak

    peak_of(10)  # what is imported and cached on first use
    assert peak_of(15_000) < peak_of(1_000) + 2**20


COCO = {
    "info": {"description": "x"},
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"id": 2, "image_id": 8, "category_id": 3, "bbox": [1, 2, 0, 0]},
        {"id": 3, "image_id": 99, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"id": 4, "image_id": 7, "category_id": 5, "bbox": [0, 0, 5, 5]},
    ],
    "categories": [{"id": 3, "name": "car"}],
    "images": [{"id": 7, "file_name": "a/b.jpg", "width": 64, "height": 48}, {"id": 8, "file_name": "c.jpg"}],
}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_coco_instances_file_is_known_by_its_content_and_gives_boxes_and_labels(
    tmp_path: Path, indent: int | None
) -> None:
    path = tmp_path / "whatever.txt"
    path.write_text(json.dumps(COCO, indent=indent))
    found = read(path)
    assert (found.file_format, found.bad_count) == ("coco-instances", 2)
    assert [line.partition(": ")[0] for line in found.bad] == [
        "whatever.txt, annotation 2",
        "whatever.txt, annotation 3",
    ]
    rows = stored(found)
    first = {"label": "car", "box_xyxy": [1.0, 2.0, 11.0, 22.0], "score": 0.5, "size_wh": [64.0, 48.0]}
    assert rows[0] == ("a/b.jpg", [first])
    assert rows[2] == ("a/b.jpg", [{"label": "5", "box_xyxy": [0.0, 0.0, 5.0, 5.0], "size_wh": [64.0, 48.0]}])


def test_a_detections_file_names_each_image_in_its_own_way(tmp_path: Path) -> None:
    named = [42, 0, "a/b", "a/b.jpg", "lot_jpg.rf.0a1b", 7.0, 10**30]
    detections = [{"image_id": n, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.25} for n in named]
    detections += [{"image_id": n, "bbox": [1, 2, 3, 4]} for n in (None, True, [1], 1.5, "")]
    detections += [{"image_id": 3, "file_name": "c.jpg", "category_name": "no", "bbox": [1, 2, 3, 4]}, 5]
    found = read(write(tmp_path / "d.json", detections))
    assert (found.file_format, found.bad_count) == ("coco-detections", 6)
    rows = stored(found)
    assert [key for key, _ in rows] == ["42", "0", "a/b", "a/b.jpg", "lot_jpg.rf.0a1b", "7", str(10**30), "c.jpg"]
    assert rows[0][1] == [{"label": "18", "box_xyxy": [1.0, 2.0, 4.0, 6.0], "score": 0.25}]
    assert rows[-1][1][0]["label"] == "no"


@pytest.mark.parametrize(
    ("prompts", "source", "stem"),
    [
        ("ds", "ds/images", "train/a"),
        ("ds/labels", "ds/images/train", "a"),
        ("ds/labels/train", "ds", "images/train/a"),
        ("ds/labels", "elsewhere", "train/a"),
    ],
)
def test_yolo_labels_find_their_images_wherever_the_source_begins(
    tmp_path: Path, prompts: str, source: str, stem: str
) -> None:
    write(tmp_path / "ds" / "labels" / "train" / "a.txt", "1 0.5 0.5 0.2 0.4", "0 0.1 0.1 0.3 0.1 0.2 0.6")
    (tmp_path / "ds" / "data.yaml").write_text("names:\n  0: cat\n  1: dog\n")
    found = read(tmp_path / prompts, source=str(tmp_path / source))
    assert (found.file_format, found.bad_count) == ("yolo", 0)
    rows = stored(found)
    assert [key for key, _ in rows] == [stem, stem]
    [[box], [polygon]] = (asked for _, asked in rows)
    assert (box["label"], box["size_wh"]) == ("dog", [1.0, 1.0])
    assert box["box_xyxy"] == pytest.approx([0.4, 0.3, 0.6, 0.7])
    assert (polygon["label"], polygon["box_xyxy"]) == ("cat", [0.1, 0.1, 0.3, 0.6])


def test_bad_yolo_lines_are_reported_and_the_names_may_come_from_classes_txt(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "cat", "dog")
    write(tmp_path / "a.txt", "0 0.5 0.5 0.2 0.4 0.9", "7 0.5 0.5 0.2 0.4", "0 0.5", "x y", "0 0.5 0.5 0 0.4")
    found = read(tmp_path)
    assert [line.partition(": ")[0] for line in found.bad] == [f"a.txt:{n}" for n in (2, 3, 4, 5)]
    assert "class 7 has no name; known are 0, 1" in found.bad[0]
    rows = stored(found)
    assert (rows[0][1][0]["label"], rows[0][1][0]["score"]) == ("cat", 0.9)
    assert len(rows) == 5


def coco_of(annotation: str, *, category: str = '"car"', image: str = '"a.jpg"') -> str:
    return (
        f'{{"images": [{{"id": 1, "file_name": {image}, "width": 160, "height": 120}}], '
        f'"categories": [{{"id": 1, "name": {category}}}], "annotations": [{annotation}]}}'
    )


POLYGON = "[[30, 25, 80, 25, 80, 75, 30, 75]]"
TURNED_AROUND = {"size": [120, 160], "counts": [3625, *([50, 70] * 49), 50, 9645]}  # columns 30..79, rows 25..74


@pytest.mark.parametrize(
    ("annotation", "changes", "label"),
    [
        ('{"image_id": 1, "category_id": 1, "bbox": [30, 25, 50, 50]}', {}, "car"),
        ('{"image_id": "1", "category_id": 1.0, "bbox": [30.0, 25, 50, 50]}', {}, "car"),
        (f'{{"image_id": 1, "category_id": 1, "segmentation": {POLYGON}}}', {}, "car"),
        (f'{{"image_id": 1, "category_id": 1, "bbox": [], "segmentation": {POLYGON}}}', {}, "car"),
        (f'{{"image_id": 1, "category_id": 1, "bbox": null, "segmentation": {POLYGON}}}', {}, "car"),
        (f'{{"image_id": 1, "category_id": 1, "bbox": [0, 0, 0, 0], "segmentation": {POLYGON}}}', {}, "car"),
        (f'{{"image_id": 1, "category_id": 1, "segmentation": {POLYGON[1:-1]}}}', {}, "car"),
        (
            '{"image_id": 1, "category_id": 1, "segmentation": [[30, 25, 40, 25, 40, 75], [70, 25, 80, 75, 60, 75]]}',
            {},
            "car",
        ),
        (f'{{"image_id": 1, "category_id": 1, "segmentation": {json.dumps(TURNED_AROUND)}}}', {}, "car"),
        ('{"image_id": 1, "category_id": 1, "bbox": [30, 25, 50, 50]}', {"category": "5"}, "5"),
        ('{"image_id": 1, "category_id": 1, "bbox": [30, 25, 50, 50]}', {"category": "null"}, "1"),
        ('{"image_id": 1, "category_id": 7, "bbox": [30, 25, 50, 50]}', {}, "7"),
        ('{"image_id": 1, "bbox": [30, 25, 50, 50]}', {}, None),
        ('{"id": 123456789012345678901234567890, "image_id": 1, "bbox": [30, 25, 50, 50]}', {}, None),
        ('{"image_id": 1, "bbox": [30, 25, 50, 50], "area": NaN, "note": "a \\" NaN"}', {}, None),
    ],
)
def test_an_annotation_gives_its_box_or_what_is_around_its_segmentation(
    tmp_path: Path, annotation: str, changes: dict[str, str], label: str | None
) -> None:
    (tmp_path / "c.json").write_text(coco_of(annotation, **changes))
    found = read(tmp_path / "c.json")
    [(key, [asked])] = stored(found)
    assert (key, asked["box_xyxy"], asked.get("label")) == ("a.jpg", [30.0, 25.0, 80.0, 75.0], label)


def test_the_box_around_compressed_run_lengths_is_pycocotools(tmp_path: Path) -> None:
    import numpy as np
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(7)
    rles, boxes = [], []
    for _ in range(40):
        pixels = np.zeros((37, 53), np.uint8, order="F")
        x, y = rng.integers(0, 50), rng.integers(0, 34)
        pixels[y : y + rng.integers(1, 37), x : x + rng.integers(1, 53)] = rng.integers(0, 2)
        pixels[y, x] = 1
        rle = coco_mask.encode(pixels)
        boxes.append(coco_mask.toBbox(rle).tolist())
        rles.append({"size": [37, 53], "counts": rle["counts"].decode()})
    detections = [{"image_id": n, "category_id": 1, "segmentation": rle} for n, rle in enumerate(rles)]
    rows = stored(read(write(tmp_path / "d.json", detections)))
    assert [asked[0]["box_xyxy"] for _, asked in rows] == [[x, y, x + w, y + h] for x, y, w, h in boxes]


@pytest.mark.parametrize(
    ("annotation", "changes", "said"),
    [
        ('{"image_id": 1, "category_id": 1, "bbox": [NaN, 1, 2, 3]}', {}, "bbox: ['NaN', 1, 2, 3]"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 1, Infinity, 3]}', {}, "bbox: [1, 1, 'Infinity', 3]"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, -Infinity, 5, 3]}', {}, "'-Infinity'"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3]}', {}, "bbox: [1, 2, 3] and no segmentation"),
        ('{"image_id": 1, "category_id": 1, "bbox": ["1", "2", "3", "4"]}', {}, "in numbers"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 2, -3, 4]}', {}, "is inverted"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 2, 0, 4]}', {}, "no segmentation"),
        ('{"image_id": 1, "category_id": 1}', {}, "no bbox and no segmentation"),
        ('{"image_id": 1, "category_id": 1, "segmentation": [[1, 2, 3]]}', {}, "expected [x1, y1"),
        ('{"image_id": 1, "segmentation": {"size": [2, 2], "counts": [9]}}', {}, "add up to 2 x 2"),
        ('{"image_id": 1, "segmentation": {"size": [2, 2], "counts": [4]}}', {}, "without a pixel"),
        ('{"image_id": 1, "segmentation": {"size": [2, 2], "counts": "~~"}}', {}, "counts '~~'"),
        ('{"image_id": 1, "segmentation": {"size": 4, "counts": []}}', {}, "size 4"),
        ('{"image_id": 1, "bbox": [1e999, 1, 5, 5]}', {}, "bbox"),
        (f'{{"image_id": 1, "bbox": [{10**400}, 1, 5, 5]}}', {}, "bbox"),
        ('{"image_id": [1], "bbox": [1, 2, 3, 4]}', {}, "image_id [1] has no file_name"),
        ('{"image_id": 2, "bbox": [1, 2, 3, 4]}', {}, "image_id 2 has no file_name"),
        ('{"image_id": 1, "category_id": [1, 2], "bbox": [1, 2, 3, 4]}', {}, "category_id [1, 2], expected one"),
        ('{"image_id": 1, "category_id": true, "bbox": [1, 2, 3, 4]}', {}, "category_id True, expected one"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}', {"category": "1.10"}, "is named 1.1"),
        ('{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}', {"category": "[1]"}, "is named [1]"),
        ('{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1.5}', {}, "score: 1.5, expected 0..1"),
        ('{"image_id": 1, "bbox": [1, 2, 3, 4], "score": -0.1}', {}, "score: -0.1, expected 0..1"),
        ('{"image_id": 1, "bbox": [1, 2, 3, 4], "score": "0.9"}', {}, "score: '0.9', expected a number"),
        ('{"image_id": 1, "bbox": [1, 2, 3, 4]}', {"image": "null"}, "file_name None"),
        ("7", {}, "expected an object"),
    ],
)
def test_an_annotation_that_cannot_be_read_is_reported_in_the_files_words_and_alone(
    tmp_path: Path, annotation: str, changes: dict[str, str], said: str
) -> None:
    good = '{"image_id": 9, "bbox": [1, 2, 3, 4]}'
    text = coco_of(f"{annotation}, {good}", **changes)
    (tmp_path / "c.json").write_text(text.replace('"images": [', '"images": [{"id": 9, "file_name": "b.jpg"}, '))
    found = read(tmp_path / "c.json")
    assert found.prompts == 1
    assert said in " ".join(found.bad)
    assert stored(found)[-1][0] == "b.jpg"


def test_two_names_of_one_number_are_no_label(tmp_path: Path) -> None:
    document = json.loads(coco_of('{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}'))
    document["annotations"].append({"image_id": 2, "category_id": 2, "bbox": [1, 2, 3, 4]})
    document["categories"] += [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    document["images"] += [
        {"id": 2, "file_name": "b.jpg"},
        {"id": 2, "file_name": "c.jpg"},
        {"id": 3, "file_name": "d"},
    ]
    document["annotations"].append({"image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4]})
    (tmp_path / "c.json").write_text(json.dumps(document))
    found = read(tmp_path / "c.json")
    found.stored.close()
    assert found.bad == (
        "c.json, annotation 1: category_id 1 has two names among the categories, expected one",
        "c.json, annotation 2: image_id 2 has two file names among the images",
    )


def test_our_own_prompts_may_stand_in_one_array(tmp_path: Path) -> None:
    entries = [{"key": "a.jpg", "prompts": [BOX]}, {"prompts": [BOX]}, 5, {"key": "b.jpg", "prompts": [{"x": 1}]}]
    found = read(write(tmp_path / "p.json", json.dumps(entries, indent=2)))
    assert (found.file_format, found.prompts, found.bad_count) == ("json-array", 1, 3)
    assert [line.partition(": ")[0] for line in found.bad] == [f"p.json, entry {n}" for n in (2, 3, 4)]
    assert [key for key, _ in stored(found)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("text", [json.dumps({"key": "ü.jpg", "prompts": [BOX]}), json.dumps(COCO)])
def test_json_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str, text: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "p").write_bytes((mark + text).encode(encoding))
    found = read(tmp_path / "p")
    found.stored.close()
    assert found.prompts > 0


def test_a_long_document_with_nan_is_read_to_its_end(tmp_path: Path) -> None:
    detections = [{"image_id": n, "bbox": [1, 2, 3, 4], "area": float("nan"), "s": "NaN" * 9} for n in range(5000)]
    found = read(write(tmp_path / "d.json", detections))
    assert (found.prompts, found.bad_count) == (5000, 0)
    found.stored.close()
