"""Text: phrases of the command line, and detectors that box what each of them says, asked apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from orchestrator.jobs.request import Request  # noqa: E402
from orchestrator.prompts.detectors import read_detector, read_phrases  # noqa: E402
from tests.tiny_checkpoints import save_phrase_detector  # noqa: E402
from workers.detectors import detector as detectors  # noqa: E402
from workers.detectors.detector import Detection, boxes_of_phrases  # noqa: E402
from workers.detectors.kinds import DetectorError, DetectorKind  # noqa: E402
from workers.prompts import Prompt, PromptError, parse_prompt  # noqa: E402

FAMILIES = ("grounding_dino", "owlv2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_phrase_detector(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def picture(size_hw: tuple[int, int] = (50, 90)) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 255, (*size_hw, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("word", "text", "label"),
    [
        ("bus", "bus", "bus"),
        (" red bus : bus ", "red bus", "bus"),
        (r"ratio 3\:4:frame", "ratio 3:4", "frame"),
    ],
)
def test_a_phrase_may_name_its_label(word: str, text: str, label: str) -> None:
    assert read_phrases([word]) == [Prompt(text=text, label=label)]


@pytest.mark.parametrize("words", [[""], [":bus"], ["bus:"], ["a:b:c"], ["bus", "bus:coach"], ["nul\0"]])
def test_a_phrase_that_says_nothing_or_comes_twice_is_refused(words: list[str]) -> None:
    with pytest.raises(PromptError, match=r"--text|expected words"):
        read_phrases(words)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_phrase_is_asked_as_if_it_were_alone(checkpoints: dict[str, Path], family: str) -> None:
    asked = read_detector(str(checkpoints[family]), threshold=0)
    assert (asked.kind, asked.classes) == (DetectorKind.OPEN_VOCABULARY, ())
    detector = detectors.load(asked, "cpu")
    phrases = ["car", "red bus", "person", "a blue square", "bus", "blue"]

    together = detector.find(picture(), phrases, threshold=0)

    assert [{found.class_name for found in one} for one in together] == [{phrase} for phrase in phrases]
    for phrase, one in zip(phrases, together, strict=True):
        [alone] = detector.find(picture(), [phrase], threshold=0)
        assert len(one) == len(alone) > 8
        for a, b in zip(one, alone, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-4)
            assert a.box_xyxy == pytest.approx(b.box_xyxy, abs=0.05)
    assert len({round(one[1].score, 6) for one in together}) > 1


def test_an_owlv2_phrases_scores_are_the_models_own(checkpoints: dict[str, Path]) -> None:
    detector = detectors.load(read_detector(str(checkpoints["owlv2"]), threshold=0), "cpu")
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(checkpoints["owlv2"]).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoints["owlv2"])
    inputs = processor(images=picture(), text=[["bus"]], return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        outputs = model(**inputs)

    [found] = detector.find(picture(), ["bus"], threshold=0)

    assert [one.score for one in found] == pytest.approx(outputs.logits[0, :, 0].sigmoid().tolist(), abs=1e-4)
    # OWLv2 sees the image in the upper left corner of a square.
    cx, cy, w, h = (90 * outputs.pred_boxes[0, 3]).tolist()
    assert found[3].box_xyxy == pytest.approx((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), abs=0.01)


def test_a_large_picture_is_made_smaller_before_owlv2_and_its_boxes_are_in_its_own_pixels(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = detectors.load(read_detector(str(checkpoints["owlv2"]), threshold=0), "cpu")
    smaller = cv2.resize(picture(), (45, 25), interpolation=cv2.INTER_AREA)
    [of_smaller] = detector.find(smaller, ["bus"], threshold=0)
    monkeypatch.setattr("workers.detectors.open_vocabulary._MOST_OWL_SIDE_PX", 45, raising=False)

    [found] = detector.find(picture(), ["bus"], threshold=0)

    assert [one.score for one in found] == [one.score for one in of_smaller]
    expected = [[2 * side for side in one.box_xyxy] for one in of_smaller]
    assert [list(one.box_xyxy) for one in found] == [pytest.approx(box, abs=0.01) for box in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_phrase_longer_than_the_model_reads_is_refused_and_not_cut(checkpoints: dict[str, Path], family: str) -> None:
    detector = detectors.load(read_detector(str(checkpoints[family])), "cpu")
    with pytest.raises(PromptError, match="tokens long, expected at most 16"):
        detector.find(picture(), ["bus", "car " * 20], threshold=0.5)


class Boxes:
    """Boxes that are known: a phrase's number of words, at their places."""

    def find(self, image: np.ndarray, phrases: Sequence[str], *, threshold: float) -> list[list[Detection]]:
        return [
            [
                Detection(class_name=phrase, score=0.5, box_xyxy=(10.0 * n, 5, 10.0 * n + 8, 20))
                for n, _ in enumerate(phrase.split())
            ]
            for phrase in phrases
        ]


def test_boxes_of_phrases_keep_the_phrase_its_label_and_the_score() -> None:
    rows = [
        {"index": 0, "text": "a b", "label": "pair", "size_wh": [10, 10]},
        {"index": 1, "box_xyxy": [1, 1, 9, 9], "text": "where a box says"},
        {"index": 4, "text": "one two three four"},
    ]
    prompts = [(parse_prompt({k: v for k, v in row.items() if k != "index"}), row) for row in rows]

    usable, wrong = boxes_of_phrases(Boxes(), np.zeros((30, 30, 3), np.uint8), prompts, 0.3)

    assert [(p.label, p.box_xyxy, row["index"], row.get("score")) for p, row in usable] == [
        ("pair", (0, 5, 8, 20), 0, 0.5),
        ("pair", (10, 5, 18, 20), 0, 0.5),
        ("where a box says", (1, 1, 9, 9), 1, None),
        ("one two three four", (0, 5, 8, 20), 4, 0.5),
        ("one two three four", (10, 5, 18, 20), 4, 0.5),
        ("one two three four", (20, 5, 28, 20), 4, 0.5),
    ]
    assert all(prompt.kinds == {"box"} for prompt, _ in usable)
    assert usable[0][1]["text"] == "a b"
    assert "size_wh" not in usable[0][1]  # the found box is in pixels of the image
    [lost] = wrong
    assert lost.startswith("a box of 'one two three four': box_xyxy")


def test_classes_are_not_asked_of_a_detector_of_phrases(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(DetectorError, match="has no classes of its own: --text"):
        read_detector(str(checkpoints["owlv2"]), classes="car")
    assert read_detector(str(checkpoints["owlv2"])).threshold == 0.3


def test_the_model_version_changes_with_phrases_labels_and_their_detector(checkpoints: dict[str, Path]) -> None:
    def version(*words: str, family: str | None = None) -> str:
        detector = read_detector(str(checkpoints[family])) if family else None
        return Request(source="/a", model="sam_vit_b", text=read_phrases(words), detector=detector).model_version()

    versions = [
        version("bus"),
        version("bus:coach"),
        version("bus", "car"),
        version("bus", family="owlv2"),
        version("bus", family="grounding_dino"),
    ]
    assert len(set(versions)) == len(versions)
    assert version("bus:bus", family="owlv2") == versions[3]


def test_a_text_job_says_on_its_row_what_was_asked() -> None:
    asked = Request(source="/a", model="sam_nano", text=read_phrases(["red bus:bus"])).asked()
    assert (asked["mode"], asked["text"]) == ("text", [{"text": "red bus", "label": "bus"}])
    assert Prompt(**json.loads(json.dumps(asked["text"]))[0]).kinds == {"text"}
