"""A YOLO line is read as what its values are, or refused; never as another box, and an id is never a score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from orchestrator.prompts.entries import PromptFileError
from orchestrator.prompts.files import read_prompts
from orchestrator.prompts.yolo_lines import Forms, Reading, alone, decide, parse_line, readings
from orchestrator.prompts.yolo_names import KeyPoints
from tests.unit.test_prompt_files import read, stored, write
from workers.models.registry import find_model
from workers.prompts import PromptError

BOX = "0.5 0.5 0.2 0.4"
BOX_XYXY = (0.4, 0.3, 0.6, 0.7)
QUAD = "0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7"
TRIANGLE = "0.4 0.3 0.6 0.3 0.5 0.7"
COCO_POINTS = " ".join("0.5 0.45 0.98" for _ in range(17))


def read_line(text: str, *others: str, key_points: tuple[int, int] | None = None) -> Reading:
    """others: lines of the same data set."""
    shape = KeyPoints(*key_points) if key_points else None
    forms: Forms = Counter()
    for line in (text, *others):
        form = alone(readings(parse_line(line), shape))
        forms[form] += form is not None  # type: ignore[index]
    line = parse_line(text)
    return decide(line, readings(line, shape), forms, shape)


@pytest.mark.parametrize(
    ("line", "key_points", "score"),
    [
        (f"0 {BOX}", None, None),
        (f"0.0 {BOX}", None, None),
        (f"0\t{BOX}", None, None),
        (f"0 {BOX} 0.87", None, 0.87),
        (f"0 {BOX} 1e-05", None, 1e-05),
        (f"0 {BOX} 1.0", None, 1.0),
        (f"0 {BOX} 12", None, None),
        (f"0 {BOX} 1", None, None),  # a confidence of 1, or the first track
        (f"0 {BOX} 0.87 12", None, 0.87),
        (f"0.000000 {BOX} 0.87 12.000000", None, 0.87),
        (f"0 {QUAD}", None, None),  # a polygon, or the corners of a turned box
        (f"0 {QUAD} 0.87", None, 0.87),
        (f"0 {QUAD} 12", None, None),
        (f"0 {QUAD} 0.87 12", None, 0.87),
        (f"0 {TRIANGLE}", None, None),
        (f"0 {TRIANGLE} 0.87", None, 0.87),
        (f"0 {TRIANGLE} 0.87 12", None, 0.87),
        (f"0 {BOX} 0.5 0.5 2 0.45 0.6 1 0 0 0 0.5 0.4 2", None, None),  # flags say key points
        (f"0 {BOX} 0.1 0.1 0.9 0.9", (2, 2), None),
        (f"0 {BOX} 0.1 0.1 0.9 0.9 0.87", (2, 2), 0.87),
        (f"0 {BOX} 0.1 0.1 0.9 0.9 0.87 3", (2, 2), 0.87),
        (f"0 {BOX} 0.1 0.1 0.9 0.9 7", (2, 2), None),
        (f"0 {BOX} 0.1 0.1 2 0.9 0.9 0", (2, 3), None),
        (f"0 {BOX} 0.1 0.1 0.99 0.9 0.9 0.02 0.87 4", (2, 3), 0.87),
        (f"0 {BOX} {COCO_POINTS}", (17, 3), None),
        (f"0 {BOX} {COCO_POINTS} 0.87 4", (17, 3), 0.87),
        (f"0 {BOX}", (17, 3), None),
        (f"0 {BOX} 0.3 0.3", (1, 2), None),
        (f"0 {BOX} 0.3 0.3 0.87", (1, 2), 0.87),
    ],
)
def test_a_line_gives_its_box_and_its_score_alone(
    line: str, key_points: tuple[int, int] | None, score: float | None
) -> None:
    found = read_line(line, key_points=key_points)
    assert found.box_xyxy == pytest.approx(BOX_XYXY)
    assert found.score == score


@pytest.mark.parametrize(
    ("line", "others", "score"),
    [
        (f"0 {BOX} 1", [f"0 {BOX} 0.4"], 1.0),
        (f"0 {BOX} 1", [f"0 {BOX} 2"], None),
        (f"0 {BOX} 0.62 1", [f"0 {BOX} 0.62 2"], 0.62),
        (f"0 {QUAD} 0.62 1", [f"0 {QUAD} 0.62 7"], 0.62),
        ("0 0.4 0.3 0.6 0.3 0.5 0.7 1", ["0 0.4 0.3 0.6 0.3 0.5 0.7 3"], None),
    ],
)
def test_what_a_line_does_not_tell_the_others_of_its_data_set_do(
    line: str, others: list[str], score: float | None
) -> None:
    found = read_line(line, *others)
    assert found.box_xyxy == pytest.approx(BOX_XYXY)
    assert found.score == score


def test_a_polygon_that_ends_at_the_border_is_one_among_polygons() -> None:
    assert read_line("0 0.1 0.1 0.9 0.1 0.9 0.5 0.5 1", f"0 {QUAD}").box_xyxy == (0.1, 0.1, 0.9, 1.0)
    assert read_line("0 0.1 0.1 0.9 0.1 0.5 1", f"0 {TRIANGLE}").box_xyxy == (0.1, 0.1, 0.9, 1.0)


@pytest.mark.parametrize(
    ("line", "key_points", "said"),
    [
        ("0", None, "0 numbers after the class"),
        ("0 0.5 0.5", None, "2 numbers after the class"),
        ("car 0.5 0.5 0.2 0.4", None, "class 'car'"),
        ("-1 0.5 0.5 0.2 0.4", None, "class '-1'"),
        ("1.5 0.5 0.5 0.2 0.4", None, "class '1.5'"),
        ("nan 0.5 0.5 0.2 0.4", None, "class 'nan'"),
        ("0 0.5 nan 0.2 0.4", None, "'nan' is no finite number"),
        ("0 0.5 inf 0.2 0.4", None, "'inf' is no finite number"),
        ("0 0,5 0,5 0,2 0,4", None, "'0,5' is no finite number"),
        ("0 55 50 50 40", None, "coordinates of pixels?"),
        ("0 30 25 80 25 80 75 30 75", None, "coordinates of pixels?"),
        ("0 0.5 0.5 -0.2 0.4", None, "4 numbers"),
        (f"0 {BOX} 87.5", None, "neither a confidence 0..1 nor a track id"),
        (f"0 {BOX} -0.5", None, "neither a confidence 0..1 nor a track id"),
        (f"0 {QUAD} 1.5", None, "9 numbers"),
        (f"0 {BOX} 0.62 1", None, "may be"),
        (f"0 {BOX} 0.5 0.5 2", None, "may be a box with key points or a polygon and a track id"),
        (f"0 {BOX} {COCO_POINTS}", None, "kpt_shape"),
        (f"0 {BOX} {COCO_POINTS} 0.9", None, "kpt_shape"),
        (f"0 {BOX} 0.1 0.1 0.9 0.9", (17, 3), r"kpt_shape \[17, 3\]: expected 55"),
        (f"0 {QUAD}", (17, 3), "kpt_shape"),
    ],
)
def test_a_line_that_is_none_of_the_forms_or_may_be_two_is_refused(
    line: str, key_points: tuple[int, int] | None, said: str
) -> None:
    with pytest.raises(PromptError, match=said):
        read_line(line, key_points=key_points)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_label_files_of_every_system_are_read(tmp_path: Path, encoding: str, ending: str) -> None:
    (tmp_path / "a.TXT").write_bytes(ending.join([f"0 {BOX}", f"1 {BOX} 0.5", ""]).encode(encoding))
    (tmp_path / "b.png.txt").write_text(f"0 {BOX}\n")
    (tmp_path / "c.txt").touch()
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7")
    found = read(tmp_path)
    assert (found.bad_count, found.prompts) == (0, 3)
    assert [(key, len(asked)) for key, asked in stored(found)] == [("a", 1), ("a", 1), ("b.png", 1), ("c", 0)]


@pytest.mark.parametrize(
    ("file", "content", "label"),
    [
        ("data.yaml", "names: [no, yes]", "yes"),
        ("data.yaml", "names:\n  0: null\n  1: 1.10\n", "1.10"),
        ("data.yaml", "names: {0: a, 1: 2024-01-01}", "2024-01-01"),
        ("data.yaml", "names:\n- a\n- 0x10\n", "0x10"),
        ("data.yaml", "\ufeffnames: [a, ~]", "~"),
        ("data.yml", "names: {1: on}", "on"),
        ("dataset.yaml", 'names: {"1": "b c"}', "b c"),
        ("classes.txt", "a\r\nb\r\n", "b"),
        ("classes.txt", "\n no\n\n", "no"),
        ("classes.txt", "0\n1\n", "1"),
        ("obj.names", "\ufeffa\nb\x0cc\nd", "b\x0cc"),
        ("_darknet.labels", "a\nb", "b"),
    ],
)
def test_a_class_keeps_the_name_that_is_written_at_its_number(
    tmp_path: Path, file: str, content: str, label: str
) -> None:
    write(tmp_path / "labels" / "a.txt", f"1 {BOX}")
    (tmp_path / file).write_bytes(content.encode())
    found = read(tmp_path / "labels")
    [(_, [asked])] = stored(found)
    assert asked["label"] == label


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("data.yaml", "names: car, dog", "is one text, expected a list"),
        ("data.yaml", "names: classes.txt", "is one text, expected a list"),
        ("data.yaml", "names: {car: 0}", "'car' as a class number"),
        ("data.yaml", "names: [[a, b], c]", "is named"),
        ("data.yaml", "names: {0: a, 0: b}", "a class number comes twice"),
        ("data.yaml", "names: {0: a, 999999999: b}", "expected numbers below"),
        ("data.yaml", "names: [a", "expected YAML"),
        ("data.yaml", "names: [a]\nkpt_shape: 17", "kpt_shape: '17', expected"),
        ("classes.txt", b"M\xfcll\n", "is no UTF-8"),
    ],
)
def test_names_that_cannot_keep_their_numbers_are_refused(
    tmp_path: Path, file: str, content: str | bytes, said: str
) -> None:
    write(tmp_path / "labels" / "a.txt", f"1 {BOX}")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptFileError, match=said):
        read_prompts(str(tmp_path / "labels"), source="/x", spec=find_model("sam_vit_b"), s3_endpoint=None)


def test_each_label_file_is_read_by_the_nearest_files_of_its_data_set(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "top")
    write(tmp_path / "a.txt", f"0 {BOX}")
    write(tmp_path / "pose" / "data.yaml", "kpt_shape: [2, 2]", "names: [person]")
    write(tmp_path / "pose" / "labels" / "train" / "b.txt", f"0 {BOX} 0.1 0.1 0.9 0.9")
    write(tmp_path / "segment" / "obj.names", "car")
    write(tmp_path / "segment" / "obj_train_data" / "c.txt", f"0 {QUAD}")
    found = read(tmp_path)
    assert (found.bad_count, found.passed_over) == (0, ("classes.txt",))
    rows = {key: (asked["label"], asked["box_xyxy"]) for key, [asked] in stored(found)}
    assert {key: label for key, (label, _) in rows.items()} == {
        "a": "top",
        "pose/labels/train/b": "person",
        "segment/obj_train_data/c": "car",
    }
    assert all(box == pytest.approx(BOX_XYXY) for _, box in rows.values())


def test_key_points_are_known_from_above_a_folder_that_has_class_names(tmp_path: Path) -> None:
    write(tmp_path / "data.yaml", "kpt_shape: [2, 3]", "names: [other]")
    write(tmp_path / "labels" / "classes.txt", "person")
    write(tmp_path / "labels" / "a.txt", f"0 {BOX} 0.1 0.1 0.7 0.9 0.9 0.8")  # without kpt_shape, a polygon
    [(_, [asked])] = stored(read(tmp_path / "labels"))
    assert (asked["label"], asked["box_xyxy"]) == ("person", pytest.approx(BOX_XYXY))

    write(tmp_path / "labels" / "data.yaml", "names: [person]")  # a data set of its own, without key points
    [(_, [asked])] = stored(read(tmp_path / "labels"))
    assert asked["box_xyxy"] != pytest.approx(BOX_XYXY)


def test_a_class_without_a_name_is_refused_by_its_line(tmp_path: Path) -> None:
    write(tmp_path / "classes.txt", "a", "", "c")
    write(tmp_path / "a.txt", f"0 {BOX}", f"1 {BOX}", f"2 {BOX}")
    found = read(tmp_path)
    assert found.bad == ("a.txt:2: class 1 has no name; known are 0, 2",)
    assert [asked[0].get("label") for _, asked in stored(found)] == ["a", None, "c"]
