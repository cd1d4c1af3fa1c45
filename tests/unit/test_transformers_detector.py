"""Detectors through transformers, at toy size: the real loader, batches of any shapes, boxes in the image's pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from orchestrator.prompts.detectors import read_detector  # noqa: E402
from tests.tiny_checkpoints import LABELS, save_detector  # noqa: E402
from workers.detectors import detector as detectors  # noqa: E402
from workers.detectors.kinds import DetectorError  # noqa: E402
from workers.engine.promptable import ModelOutputError  # noqa: E402

FAMILIES = ("rt_detr_v2", "d_fine", "rf_detr")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_detector(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 255, (*size_hw, 3), dtype=np.uint8) for size_hw in ((50, 90), (120, 33), (64, 64))]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoints_boxes_are_the_models_own_in_each_images_pixels(
    checkpoints: dict[str, Path], family: str
) -> None:
    asked = read_detector(str(checkpoints[family]), threshold=0)
    images = pictures()

    together = detectors.load(asked, "cpu").detect(images, threshold=0)

    model = transformers.AutoModelForObjectDetection.from_pretrained(checkpoints[family]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoints[family])
    for image, found in zip(images, together, strict=True):
        inputs = processor(images=image, return_tensors="pt", input_data_format="channels_last")
        assert inputs["pixel_values"].shape == (1, 3, 64, 64)
        with torch.no_grad():
            outputs = model(**inputs)
        scores = outputs.logits[0].sigmoid()
        best = scores.flatten().argmax()
        query, number = divmod(int(best), scores.shape[1])
        cx, cy, w, h = outputs.pred_boxes[0, query].tolist()
        height, width = image.shape[:2]
        expected = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        assert len(found) == 12
        assert found[0].class_name == LABELS[number]
        assert found[0].score == pytest.approx(float(scores.max()), abs=1e-4)
        assert found[0].box_xyxy == pytest.approx(expected, abs=1e-2)
    assert len({found[0].box_xyxy for found in together}) == 3


@pytest.mark.slow
def test_scores_of_nan_fail_instead_of_finding_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForObjectDetection.from_pretrained(checkpoints["rt_detr_v2"])
    next(model.model.encoder_input_proj.parameters()).data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    transformers.AutoImageProcessor.from_pretrained(checkpoints["rt_detr_v2"]).save_pretrained(tmp_path)
    with pytest.raises(ModelOutputError, match="scores hold NaN"):
        detectors.load(read_detector(str(tmp_path)), "cpu").detect(pictures(), threshold=0.5)


def test_another_models_weights_are_refused_and_not_filled_in_at_random(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoints["rt_detr_v2"] / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((checkpoints["rf_detr"] / "model.safetensors").read_bytes())
    with pytest.raises(DetectorError, match=r"the weights lack \d+ tensors of RTDetrV2ForObjectDetection"):
        detectors.load(read_detector(str(tmp_path)), "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(DetectorError, match="transformers cannot load it"):
        detectors.load(read_detector(str(tmp_path)), "cpu")


def test_code_that_comes_with_a_checkpoint_is_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for file in checkpoints["rt_detr_v2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), "own.Own")}
    config["auto_map"]["AutoModelForObjectDetection"] = "own.Own"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(DetectorError, match="transformers cannot load it"):
        detectors.load(read_detector(str(tmp_path)), "cpu")
    assert not (tmp_path / "ran").exists()
