"""SAM 3 at toy size through the real loader: the library's own answers, drawn one by one; its folder of weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from workers.models.files import is_present, model_version, require_same_weights
from workers.models.loading import load_model
from workers.models.registry import find_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from db.settings import settings  # noqa: E402
from tests.pixels import decode_counts  # noqa: E402
from tests.tiny_checkpoints import save_sam3  # noqa: E402
from workers.models.spec import WeightsError  # noqa: E402
from workers.models.weights import WeightsState, verify  # noqa: E402
from workers.params import AutomaticParams, ParamError, PromptParams, parse_prompt_params  # noqa: E402
from workers.prompts import Prompt, PromptError  # noqa: E402

pytestmark = pytest.mark.slow  # slow: models are built

SPEC = find_model("sam3")
ALL = PromptParams(text_threshold=0)
PROMPTS = [
    Prompt(text="red bus"),
    Prompt(text="car"),
    Prompt(exemplar_box_xyxy=(3, 4, 20, 30)),
    Prompt(text="car", exemplar_box_xyxy=(3, 4, 20, 30), negative_box_xyxy=(12, 5, 25, 33)),
    Prompt(text="car", negative_box_xyxy=(12, 5, 25, 33)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sam3(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def weights_folder(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path))
    settings.cache_clear()
    shutil.copytree(checkpoint, tmp_path / "sam3")
    return tmp_path / "sam3"


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(4)
    return [random.integers(0, 255, (*size_hw, 3), dtype=np.uint8) for size_hw in ((50, 90), (77, 31))]


def test_each_prompts_masks_and_scores_are_the_librarys_own(checkpoint: Path) -> None:
    model, images = load_model(SPEC, "cpu"), pictures()
    theirs = transformers.Sam3Model.from_pretrained(checkpoint).eval()
    processor = transformers.Sam3Processor.from_pretrained(checkpoint)

    for image, embedding in zip(images, model.embed(images), strict=True):
        found = model.prompted(image, embedding, PROMPTS, ALL)

        for prompt, masks in zip(PROMPTS, found, strict=True):
            boxes = [
                (list(b), meant) for b, meant in ((prompt.exemplar_box_xyxy, 1), (prompt.negative_box_xyxy, 0)) if b
            ]
            examples = {
                "input_boxes": [[box for box, _ in boxes]],
                "input_boxes_labels": [[meant for _, meant in boxes]],
            }
            inputs = processor(
                images=image,
                text=prompt.text,
                return_tensors="pt",
                input_data_format="channels_last",
                **(examples if boxes else {}),
            )
            with torch.no_grad():
                outputs = theirs(**{name: value for name, value in inputs.items() if name != "original_sizes"})
            [expected] = processor.post_process_instance_segmentation(
                outputs, threshold=0, target_sizes=[image.shape[:2]]
            )
            order = expected["scores"].argsort(descending=True).tolist()
            assert len(masks) == len(order) == 9
            assert [mask.predicted_iou for mask in masks] == pytest.approx(expected["scores"][order].tolist(), abs=1e-5)
            for mask, n in zip(masks, order, strict=True):
                assert mask.size_hw == image.shape[:2]
                differing = decode_counts(mask.counts, mask.size_hw) != expected["masks"][n].numpy().astype(bool)
                assert differing.mean() < 1e-3


def test_the_threshold_says_how_many_masks_a_text_gives() -> None:
    model, image = load_model(SPEC, "cpu"), pictures()[0]
    [embedding] = model.embed([image])
    [every] = model.prompted(image, embedding, PROMPTS[:1], ALL)
    between = (every[2].predicted_iou + every[3].predicted_iou) / 2

    [some] = model.prompted(image, embedding, PROMPTS[:1], PromptParams(text_threshold=between))
    [none] = model.prompted(image, embedding, PROMPTS[:1], PromptParams(text_threshold=1))

    assert (some, none) == (every[:3], [])
    assert parse_prompt_params({"text_threshold": "0.25"})["text_threshold"] == 0.25
    for value in ("high", "2", "nan"):
        with pytest.raises(ParamError, match=r"text_threshold=.*0\.\.1"):
            parse_prompt_params({"text_threshold": value})


def test_a_text_longer_than_the_model_reads_is_refused_and_not_cut() -> None:
    model, image = load_model(SPEC, "cpu"), pictures()[0]
    with pytest.raises(PromptError, match="tokens long, expected at most 32"):
        model.prompted(image, model.embed([image])[0], [Prompt(text="bus " * 20)], ALL)


def test_masks_of_everything_are_refused() -> None:
    assert not SPEC.automatic
    with pytest.raises(ValueError, match="expected text or an example"):
        load_model(SPEC, "cpu").automatic(pictures()[0], None, AutomaticParams())


def test_its_version_is_its_folders_content_and_other_files_are_not_taken_for_it(weights_folder: Path) -> None:
    version = model_version(SPEC, {})
    assert model_version(SPEC, {}) == version
    require_same_weights(SPEC, version)
    assert verify(SPEC).ok
    (weights_folder / "README.md").write_text("not part of it")
    assert model_version(SPEC, {}) == version

    config = (weights_folder / "config.json").read_text()
    (weights_folder / "config.json").write_text(config + "\n")

    assert model_version(SPEC, {}) != version
    with pytest.raises(WeightsError, match=r"sam3 is \w{8}, but the job was submitted with \w{8}; put the same files"):
        require_same_weights(SPEC, version)


def test_an_absent_or_damaged_folder_says_how_to_bring_it(weights_folder: Path) -> None:
    (weights_folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"transformers cannot load it as sam3: .* run `maskfleet models pull sam3`"):
        load_model(SPEC, "cpu")
    (weights_folder / "model.safetensors").unlink()
    assert verify(SPEC).state is WeightsState.ABSENT
    assert not is_present(SPEC)
    with pytest.raises(WeightsError, match=r"no weights at .*sam3; run `maskfleet models pull sam3`"):
        model_version(SPEC, {})
