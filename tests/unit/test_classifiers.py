"""CLIP and SigLIP name masks: each by its own crop, with the job's words, from files whose identity is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from orchestrator.jobs.request import Request  # noqa: E402
from orchestrator.prompts.classifier import read_classifier  # noqa: E402
from tests.tiny_checkpoints import save_classifier  # noqa: E402
from workers.classifiers.asked import AskedClassifier, Classified, ClassifierError, asked_of_json  # noqa: E402
from workers.classifiers.classifier import load_classifier  # noqa: E402
from workers.classifiers.clip import square_around  # noqa: E402
from workers.engine.promptable import ModelOutputError  # noqa: E402
from workers.masks import Mask, mask_from_pixels  # noqa: E402

FAMILIES = ("clip", "siglip")
GREY = np.array([9, 99, 199], np.uint8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_classifier(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def picture() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 255, (80, 120, 3), dtype=np.uint8)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> Mask:
    pixels = np.zeros((80, 120), bool)
    pixels[y0:y1, x0:x1] = True
    return mask_from_pixels(pixels, predicted_iou=0.9)


MASKS = [rectangle(10 + n, 5, 40 + n, 30 + 2 * n) for n in range(20)] + [rectangle(0, 0, 120, 80)]


def ask(folder: Path, words: str = "cat,dog,bus", masks: list[Mask] = MASKS) -> list[Classified]:
    ticks: list[int] = []
    classifier = load_classifier(read_classifier(str(folder), words))
    found = [best for _, best in classifier.classify(picture(), masks, lambda: ticks.append(1))]
    assert len(ticks) == -(-len(masks) // 16)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masks_scores_are_the_models_own_for_its_two_crops(checkpoints: dict[str, Path], family: str) -> None:
    folder, mask = checkpoints[family], rectangle(40, 20, 72, 52)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    fill = np.array([round(255 * value) for value in processor.image_mean], np.uint8)
    square, inside = square_around(picture(), mask, fill)
    crops = [square, np.where(inside[..., None], square, fill)]
    texts = [f"a photo of a {word}" for word in ("cat", "dog", "bus", "background")]
    tokens = tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")
    pixels = [torch.tensor(crop).permute(2, 0, 1)[None] for crop in crops]
    pixels = [torch.nn.functional.interpolate(one.float(), (32, 32), mode="bilinear", antialias=True) for one in pixels]
    with torch.no_grad():
        images = processor(torch.cat(pixels).round() / 255, do_rescale=False, do_resize=False, return_tensors="pt")
        asked = {"input_ids": tokens["input_ids"]}
        asked |= {"attention_mask": tokens["attention_mask"]} if family == "clip" else {}
        outputs = model(**asked, **images)
    seen = outputs.image_embeds.mean(0) / outputs.image_embeds.mean(0).norm()
    expected = (model.logit_scale.exp() * seen @ outputs.text_embeds.T).softmax(-1).detach()

    [found] = ask(folder, masks=[mask])

    assert found.score == pytest.approx(float(expected.max()), abs=2e-3)
    assert found.word == ("cat", "dog", "bus", "background")[int(expected.argmax())]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_is_named_as_if_it_were_alone(checkpoints: dict[str, Path], family: str) -> None:
    together = ask(checkpoints[family])

    assert len({round(found.score, 5) for found in together}) > 15
    for mask, found in list(zip(MASKS, together, strict=True))[::5]:
        [alone] = ask(checkpoints[family], masks=[mask])
        assert alone.word == found.word
        assert alone.score == pytest.approx(found.score, abs=1e-4)


def test_a_square_reaches_a_tenth_beyond_the_mask_and_over_the_images_edge() -> None:
    image = picture()
    square, inside = square_around(image, rectangle(0, 70, 20, 80), GREY)

    assert square.shape == (24, 24, 3)
    assert inside.sum() == 200
    assert (square[inside] == image[70:80, 0:20].reshape(-1, 3)).all()
    assert (square[:, 0] == GREY).all()
    assert (square[-1] == GREY).all()


def test_a_mask_as_long_as_a_line_scan_is_seen_in_a_square_of_bounded_size() -> None:
    image = np.random.default_rng(2).integers(0, 255, (4, 8000, 3), dtype=np.uint8)
    mask = mask_from_pixels(np.ones((4, 8000), bool), predicted_iou=0.9)

    square, inside = square_around(image, mask, GREY)

    assert square.shape == (3200, 3200, 3)  # a third of 9,600 pixels a side
    # The square begins at (-800, -4,798), so every third of its pixels is the image's row 2, from column 1 on.
    assert (square[inside] == image[2, 1::3]).all()
    assert (square[~inside] == GREY).all()


def test_the_same_request_has_the_same_version_and_other_words_files_or_thresholds_another(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def version(name: Path = checkpoints["clip"], words: str = "cat,dog", threshold: float = 0.5) -> str:
        asked = read_classifier(str(name), words, threshold=threshold)
        return Request(source="/x", model="sam_nano", classify=asked).model_version()

    elsewhere = shutil.copytree(checkpoints["clip"], tmp_path / "elsewhere")
    changed = shutil.copytree(checkpoints["clip"], tmp_path / "changed")
    (changed / "preprocessor_config.json").write_text('{"do_resize": false}')

    assert version(elsewhere) == version(words="dog,cat") == version()
    others = [version(changed), version(checkpoints["siglip"]), version(words="cat"), version(threshold=0.4)]
    assert len({*others, version(), Request(source="/x", model="sam_nano").model_version()}) == 6


def test_what_is_stored_on_the_job_is_read_back(checkpoints: dict[str, Path]) -> None:
    asked = read_classifier(str(checkpoints["clip"]), " red bus , cat ", threshold=0)
    assert asked.words == ("red bus", "cat")
    assert asked_of_json(json.loads(json.dumps(asked.as_json()))) == asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (" , ", "0 words, expected 1 to 200"),
        (",".join(map(str, range(201))), "201 words"),
        ("cat,dog,cat", "'cat' comes twice"),
        ("red bus,Red  bus", "'Red  bus' comes twice"),
        ("background", "is always asked beside the words"),
        ("Background", "is always asked beside the words"),
        ("a\x1b[2J", "is no label"),
        ("x" * 101, "is no label"),
    ],
)
def test_words_that_cannot_be_labels_are_refused(words: str, said: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ClassifierError, match=said):
        read_classifier(str(checkpoints["clip"]), words)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("config.json"), "expected the folder of a CLIP or SigLIP checkpoint"),
        (without("model.safetensors"), r"no .safetensors file"),
        (with_config("[]"), "is not a transformers configuration"),
        (with_config("{"), "is not a transformers configuration"),
        (with_config('{"model_type": "bert"}'), "its model_type is 'bert', expected clip or siglip"),
    ],
)
def test_a_folder_that_is_no_classifier_is_a_named_error(
    change: Callable[[Path], object], said: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["clip"], tmp_path / "broken")
    change(folder)
    with pytest.raises(ClassifierError, match=said):
        read_classifier(str(folder), "cat")


def test_what_fails_at_loading_names_the_classifier(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="no such folder, here or in"):
        read_classifier("./gone", "cat")
    asked = read_classifier(str(checkpoints["clip"]), "cat," + "w" * 60)
    with pytest.raises(ClassifierError, match=r"'w+' is 7[0-9] tokens long, expected at most 32"):
        load_classifier(asked)
    with pytest.raises(ClassifierError, match="but the job was submitted with sha256:ab"):
        load_classifier(AskedClassifier(name=asked.name, identity="sha256:ab", words=("cat",), threshold=0.5))
    with pytest.raises(ClassifierError, match="nothing at /nowhere/clip on this machine"):
        load_classifier(AskedClassifier(name="/nowhere/clip", identity="sha256:ab", words=("cat",), threshold=0.5))
    cut = shutil.copytree(checkpoints["clip"], tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ClassifierError, match=r"cut: transformers cannot load it"):
        load_classifier(read_classifier(str(cut), "cat"))


def test_scores_that_are_no_numbers_are_an_error(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["clip"], tmp_path / "nan")
    model = transformers.AutoModel.from_pretrained(folder)
    model.visual_projection.weight.data[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelOutputError, match="NaN"):
        ask(folder)
