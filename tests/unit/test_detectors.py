"""Detectors: their files told apart and identified, their boxes in the image's pixels, their classes as labels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from orchestrator.jobs.request import Request
from orchestrator.prompts.detectors import read_detector, read_label_map
from tests.onnx_detectors import CLASSES, write_colour_detector
from workers.detectors import detector as detectors
from workers.detectors.detector import AskedDetector, Detection, asked_of_json, prompts_of
from workers.detectors.files import examine, require_same_files
from workers.detectors.kinds import DetectorError
from workers.detectors.onnx_names import COCO_CLASSES

NAMES = "\n".join(CLASSES)


def paint(size_hw: tuple[int, int], **boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A dark image with filled boxes: red=(x0, y0, x1, y1)."""
    image = np.zeros((*size_hw, 3), np.uint8)
    for colour, (x0, y0, x1, y1) in boxes.items():
        image[y0:y1, x0:x1, ("red", "green", "blue").index(colour)] = 255
    return image


def found_by(asked: AskedDetector, *images: np.ndarray) -> list[list[Detection]]:
    return detectors.load(asked, "cpu").detect(images, threshold=asked.threshold)


@pytest.mark.parametrize("batch", [1, "n", 2, None])
@pytest.mark.parametrize("size_hw", [(160, 192), ("h", "w")])
def test_an_onnx_detectors_boxes_are_in_the_pixels_of_images_of_any_shape(
    tmp_path: Path, size_hw: tuple[int | str, int | str], batch: int | str | None
) -> None:
    path = write_colour_detector(tmp_path / "d.onnx", size_hw=size_hw, batch=batch, classes=NAMES)
    wide = paint((200, 500), red=(310, 40, 400, 120))
    tall = paint((333, 111), red=(10, 200, 60, 320), blue=(70, 20, 100, 90))
    empty = paint((50, 50))

    in_wide, in_tall, in_empty = found_by(read_detector(str(path)), wide, tall, empty)

    [red] = in_wide
    assert (red.class_name, red.score) == ("red", pytest.approx(0.7))
    assert red.box_xyxy == pytest.approx((310, 40, 400, 120), abs=3)
    assert [found.class_name for found in in_tall] == ["blue", "red"]
    assert in_tall[0].box_xyxy == pytest.approx((70, 20, 100, 90), abs=3)
    assert in_tall[1].box_xyxy == pytest.approx((10, 200, 60, 320), abs=3)
    assert in_empty == []


def test_the_threshold_and_the_classes_choose_boxes(tmp_path: Path) -> None:
    path = str(write_colour_detector(tmp_path / "d.onnx", classes=NAMES))
    image = paint((160, 192), red=(10, 10, 50, 50), green=(60, 60, 90, 90), blue=(100, 100, 140, 140))

    above = found_by(read_detector(path, threshold=0.75), image)

    assert [found.class_name for found in above[0]] == ["blue", "green"]
    asked = read_detector(path, classes="red, blue")
    assert [name for name in CLASSES if asked.keeps(name)] == ["blue", "red"]


@pytest.mark.parametrize(
    ("told", "names"),
    [
        ({"classes": "a\n\nb c\n\n"}, ("a", "class 1", "b c")),
        ({"classes": "\ufeffa\r\nb\x0cc\r\n"}, ("a", "b\x0cc")),
        ({"metadata": "{0: 'a', 2: 'c'}"}, ("a", "class 1", "c")),
        ({"metadata": '{"1": "no", "0": null}'}, ("class 0", "no")),
        ({"metadata": "{'10': 'k', '9': 'j'}"}, (*(f"class {n}" for n in range(9)), "j", "k")),
        ({"classes": "coco"}, COCO_CLASSES),
        ({"metadata": "{0: 'person', 1: \"driver's seat\"}"}, ("person", "driver's seat")),
        ({"metadata": '["x", "y"]'}, ("x", "y")),
        ({"metadata": '["x", "y"]', "classes": "mine"}, ("mine",)),
    ],
)
def test_an_onnx_files_classes_are_told_beside_it_or_in_it(
    tmp_path: Path, told: dict[str, str], names: tuple[str, ...]
) -> None:
    assert examine(str(write_colour_detector(tmp_path / "d.onnx", **told))).classes == names  # type: ignore[arg-type]


def test_coco_has_eighty_classes() -> None:
    assert len(set(COCO_CLASSES)) == 80


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: write_colour_detector(path), "names no classes; write them, one a line"),
        (lambda path: write_colour_detector(path, metadata="[1, 2]"), "class 0 is named 1, expected text"),
        (lambda path: write_colour_detector(path, metadata="'car'"), "expected a list of names"),
        (lambda path: write_colour_detector(path, metadata="car,dog"), "expected a list of names"),
        (lambda path: write_colour_detector(path, metadata="{-1: 'a'}"), "'-1' as a class number"),
        (lambda path: write_colour_detector(path, metadata="{0: 'a', 0: 'b'}"), "comes twice"),
        (lambda path: write_colour_detector(path, metadata="{0: 'a', 2000000000: 'b'}"), "expected numbers below"),
        (lambda path: write_colour_detector(path, metadata="{}"), "expected a list of names"),
        (lambda path: write_colour_detector(path, metadata=f"[{'1' * 5000}]"), "expected a list of names"),
        (lambda path: write_colour_detector(path, classes="\n\n"), "is empty, expected class names"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "not an ONNX file"),
        (lambda path: path.write_bytes(b"\x3a\xff\xff\xff\xff\x0f"), "not an ONNX file, or cut short"),
        (lambda path: None, "no such file or folder, here or in"),
    ],
)
def test_an_unusable_onnx_file_says_what_to_do(tmp_path: Path, make: object, said: str) -> None:
    make(tmp_path / "d.onnx")  # type: ignore[operator]
    with pytest.raises(DetectorError, match=said):
        examine(str(tmp_path / "d.onnx"))


def test_another_onnx_graph_is_refused_with_what_it_gives(tmp_path: Path) -> None:
    import onnx

    path = write_colour_detector(tmp_path / "d.onnx", classes=NAMES)
    model = onnx.load(path)
    model.graph.node[-1].output[0] = model.graph.output[1].name = "numbers"
    onnx.save(model, path)
    with pytest.raises(DetectorError, match=r"gives dets, numbers; expected .* dets and labels"):
        detectors.load(read_detector(str(path)), "cpu")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not a transformers configuration"),
        ("[]", "not a transformers configuration"),
        ('{"architectures": ["BertModel"]}', "its architecture is BertModel, expected one"),
        (None, "no config.json"),
    ],
)
def test_a_folder_that_holds_no_detector_is_refused(tmp_path: Path, config: str | None, said: str) -> None:
    (tmp_path / "model.safetensors").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(DetectorError, match=said):
        examine(str(tmp_path))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["DetrForObjectDetection"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(DetectorError, match="pickled weights could run code"):
        examine(str(tmp_path))


def test_a_name_in_the_weights_folder_means_the_same_files_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from db.settings import settings

    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "here"))
    settings.cache_clear()
    write_colour_detector(tmp_path / "here" / "d.onnx", classes=NAMES)
    asked = read_detector("d.onnx")
    assert asked.name == "d.onnx"

    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "there"))
    settings.cache_clear()
    with pytest.raises(DetectorError, match=r"nothing at .*there/d\.onnx on this machine"):
        require_same_files(asked.name, asked.identity)
    other = write_colour_detector(tmp_path / "there" / "d.onnx", classes="a\nb\nc")
    with pytest.raises(DetectorError, match=rf"{other} is sha256:.*, but the job was submitted with {asked.identity}"):
        detectors.load(asked, "cpu")
    settings.cache_clear()


def test_unknown_classes_are_named_before_anything_runs(tmp_path: Path) -> None:
    path = write_colour_detector(tmp_path / "d.onnx", classes=NAMES)
    with pytest.raises(DetectorError, match="has no class 'bus'; it has blue, green, red"):
        read_detector(str(path), classes="red,bus")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b", "expected lines such as"),
        ("", "expected lines such as"),
        ("null: person", "None: 'person', expected a class and its label"),
        ("car: [7]", r"'car': \['7'\], expected a class and its label"),
        ("car: [", "neither YAML nor JSON"),
    ],
)
def test_a_label_map_that_is_none_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DetectorError, match=said):
        read_label_map(tmp_path / "map.yaml")


def test_a_label_map_keeps_the_words_that_yaml_reads_as_other_things(tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_bytes("\ufeffno: yes\r\n1.10: 2024-01-01\r\noff: ~\r\n7: 08\r\n".encode())
    assert read_label_map(tmp_path / "map.yaml") == {"no": "yes", "1.10": "2024-01-01", "off": None, "7": "08"}


def test_a_label_map_renames_drops_and_leaves_the_others_their_names(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"red": "bus", "green": None}))
    path = write_colour_detector(tmp_path / "d.onnx", classes=NAMES)

    asked = read_detector(str(path), label_map=tmp_path / "map.json")

    assert [name for name in CLASSES if asked.keeps(name)] == ["blue", "red"]
    assert (asked.label_of("red"), asked.label_of("blue")) == ("bus", "blue")
    assert asked_of_json(json.loads(json.dumps(asked.as_json()))) == asked


def test_unusable_boxes_are_counted_and_the_others_cut_to_the_image() -> None:
    asked = AskedDetector(name="d", kind=detectors.DetectorKind.ONNX, identity="sha256:0", threshold=0.5)
    boxes = [(-5, 3, 20, 30), (math.nan, 0, 5, 5), (9, 9, 1, 1), (200, 200, 300, 300), (1, 1, math.inf, 5)]
    found = [Detection(class_name="car", score=0.9, box_xyxy=box) for box in boxes]
    found.append(Detection(class_name="car", score=math.nan, box_xyxy=(1, 1, 5, 5)))

    usable, wrong = prompts_of(found, asked, (100, 50))

    [(prompt, row)] = usable
    assert prompt.box_xyxy == (0, 3, 20, 30)
    assert row == {"index": 0, "class": "car", "label": "car", "box_xyxy": (0, 3, 20, 30), "score": 0.9}
    assert [line.split(":")[0] for line in wrong] == [f"box {n} (car)" for n in range(1, 6)]


def test_the_model_version_changes_with_the_detectors_files_and_what_is_asked_of_it(tmp_path: Path) -> None:
    def version(name: str = "d.onnx", classes: str = NAMES, **asked: object) -> str:
        path = write_colour_detector(tmp_path / name, classes=classes)
        detector = read_detector(str(path), **asked)  # type: ignore[arg-type]
        return Request(source="/a", model="sam_vit_b", detector=detector).model_version()

    plain = version()
    assert plain != Request(source="/a", model="sam_vit_b").model_version()
    assert version(threshold=0.5) == plain
    assert version(classes=NAMES.upper()) != plain
    assert version(threshold=0.4) != plain
    # A folder's name is not its content; which classes are kept is no matter of their order.
    assert version(name="elsewhere/d.onnx") == plain
    path = str(tmp_path / "d.onnx")
    some = [
        Request(source="/a", model="sam_vit_b", detector=read_detector(path, classes=named)).model_version()
        for named in ("red,blue", "blue,red")
    ]
    assert some[0] == some[1] != plain


@pytest.mark.parametrize("convert_attribute", [False, True])
def test_weights_outside_of_an_onnx_file_are_part_of_what_it_is_whatever_their_files_name(
    tmp_path: Path, convert_attribute: bool
) -> None:
    path = write_colour_detector(tmp_path / "colours.onnx", classes="blue\ngreen\nred")
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
        convert_attribute=convert_attribute,
    )
    before = examine(str(path)).identity
    weights = tmp_path / "w.bin"

    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert examine(str(path)).identity != before

    weights.rename(tmp_path / "elsewhere.bin")
    with pytest.raises(DetectorError, match=r"weights are in 'w\.bin', expected a file of that name beside it"):
        examine(str(path))


def test_weights_that_an_onnx_file_names_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    path = write_colour_detector(tmp_path / "inside" / "colours.onnx", classes="blue\ngreen\nred")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    (tmp_path / "outside.bin").write_bytes(b"0" * 4096)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    path.write_bytes(model.SerializeToString())

    with pytest.raises(DetectorError, match=r"'\.\./outside\.bin', expected a file of that name beside it"):
        examine(str(path))
