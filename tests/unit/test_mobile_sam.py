"""MobileSAM's encoder against what its authors' code and file are, and its file through the real loader."""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from tests.official_shapes import Shapes, official_shapes
from tests.pixels import decode_counts
from workers.models.files import weights_path
from workers.models.loading import load_model
from workers.models.mobile_sam import build_mobile_sam
from workers.models.registry import find_model, largest_present
from workers.models.sam import SamModel
from workers.models.spec import MissingLibraryError, ModelSpec, WeightsError
from workers.params import PromptParams
from workers.prompts import Prompt, asks_one_point

pytest.importorskip("timm")


pytestmark = [pytest.mark.usefixtures("one_thread", "folder"), pytest.mark.slow]  # slow: models are built


def official_encoder() -> Shapes:
    named = official_shapes("mobile_sam").items()
    return {name.removeprefix("image_encoder."): shape for name, shape in named if name.startswith("image_encoder.")}


def shapes_of(sam: Sam) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in sam.state_dict().items()}


def make_state(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Weights by formula, such that activations stay of a size: the same on every machine and in every release."""
    state = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape or 1).astype(np.float32)
        if name.endswith("running_var"):
            values = 1 + 0.5 * np.abs(values)
        elif len(shape) == 1 and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif len(shape) > 1 and name.endswith("weight"):
            values /= np.sqrt(np.prod(shape[1:]))
        elif not name.endswith("attention_biases"):
            values *= 0.1
        state[name] = torch.from_numpy(values.reshape(shape))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
    return state


def make_pixels() -> torch.Tensor:
    rows, columns = np.mgrid[:1024, :1024].astype(np.float32)
    channels = [np.sin(rows / 37), np.cos(columns / 23), np.sin((rows + 2 * columns) / 11)]
    return torch.from_numpy(np.stack(channels))[None]


def save(state: dict[str, torch.Tensor], name: str) -> ModelSpec:
    """Save as torch does where the named model's weights belong, and return its spec with this file for the pinned."""
    path = weights_path(find_model(name))
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(find_model(name), sha256=digest, size_bytes=path.stat().st_size)


def hollow_state(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint of this model's names and shapes in a few bytes a tensor."""
    return {name: torch.zeros(()).expand(shape) for name, shape in official_shapes(name).items()}


# What the authors' file and code are


def test_names_and_shapes_are_those_of_the_official_file() -> None:
    assert shapes_of(build_mobile_sam()) == official_shapes("mobile_sam")


def test_architecture_accounts_for_every_byte_of_the_official_file() -> None:
    sam = build_mobile_sam()
    state = sam.state_dict()

    overhead = find_model("mobile_sam").size_bytes - sum(t.numel() * t.element_size() for t in state.values())

    # torch 2.15 writes 382 bytes more a tensor than it has: a header, padding, names, a directory entry.
    assert overhead / len(state) == pytest.approx(382, abs=3)
    assert find_model("mobile_sam").parameter_count == sum(parameter.numel() for parameter in sam.parameters())


@pytest.mark.slow
def test_encoder_computes_what_the_authors_code_does() -> None:
    encoder = build_mobile_sam().image_encoder.eval()
    encoder.load_state_dict(make_state(official_encoder()))

    with torch.no_grad():
        embedding = encoder(make_pixels())[0]

    # What mobile_sam.modeling.TinyViT at 34bbbfd gives for these weights and pixels (torch 2.15, CPU, November 2026);
    # all 1,048,576 values were compared then and differed by 4e-6 at most.
    places = [(0, 0, 0), (17, 5, 60), (64, 63, 63), (100, 31, 32), (128, 0, 63), (200, 63, 0), (255, 40, 20)]
    expected = [-0.30942, 1.36860, 0.41908, -0.51216, -0.72366, -0.27439, -0.50908]
    assert embedding.shape == (256, 64, 64)
    assert [embedding[place].item() for place in places] == pytest.approx(expected, abs=1e-4)
    assert embedding.abs().mean().item() == pytest.approx(0.7785, abs=1e-4)


# The file through the loader


@pytest.mark.slow
def test_official_file_gives_the_model_with_its_weights() -> None:
    torch.manual_seed(0)
    source = build_mobile_sam().eval()
    spec = save(source.state_dict(), "mobile_sam")

    sam = load_model(spec, "cpu").sam  # type: ignore[attr-defined]

    assert not sam.training
    assert not any(parameter.requires_grad for parameter in sam.parameters())
    assert all(not tensor.is_meta for tensor in [*sam.parameters(), *sam.buffers()])
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in sam.state_dict().items())
    with torch.no_grad():
        assert torch.equal(sam.image_encoder(make_pixels()), source.image_encoder(make_pixels()))


@pytest.mark.parametrize(("held", "wanted"), [("sam_vit_b", "mobile_sam"), ("mobile_sam", "sam_vit_b")])
def test_another_models_file_is_refused_naming_both(held: str, wanted: str) -> None:
    state = hollow_state(held)
    torch.save(state, weights_path(find_model(wanted)))

    with pytest.raises(WeightsError, match=f"holds the weights of {held}, expected the weights of {wanted}; run `"):
        load_model(find_model(wanted), "cpu")


def test_another_models_file_is_described_where_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(hollow_state("mobile_sam"), weights_path(find_model("sam_vit_b")))
    monkeypatch.setitem(sys.modules, "timm.models.tiny_vit", None)

    with pytest.raises(WeightsError, match=r"01ec64.pth: holds another model's weights: \d+ missing .* of sam_vit_b"):
        load_model(find_model("sam_vit_b"), "cpu")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (os.mkdir, (str(self.path),))


def test_pickled_payload_is_refused_and_never_run(folder: Path) -> None:
    spec = save({"image_encoder.head.weight": Payload(folder / "owned")}, "mobile_sam")  # type: ignore[dict-item]

    with pytest.raises(WeightsError, match=r"mobile_sam.pt: holds pickled objects .* could run code; run `"):
        load_model(spec, "cpu")

    assert not (folder / "owned").exists()


def test_missing_timm_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(MissingLibraryError, match=r"mobile_sam needs timm, .* `pip install \"maskfleet\[models\]\"`"):
        load_model(find_model("mobile_sam"), "cpu")


# The model


@pytest.mark.slow
def test_prompts_are_answered_as_by_segment_anythings_predictor() -> None:
    torch.manual_seed(0)
    sam = build_mobile_sam().eval().requires_grad_(False)
    image = np.random.default_rng(1).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    model, predictor = SamModel(sam), SamPredictor(sam)
    predictor.set_image(image)
    prompts = [
        Prompt(box_xyxy=(10, 10, 60, 70)),
        Prompt(points=((20.5, 30, 1),)),
        Prompt(box_xyxy=(3.5, 4, 130, 88), points=((20, 30, 1), (50, 50, 0))),
    ]

    [embedding] = model.embed([image])
    found = model.prompted(image, embedding, prompts, PromptParams())

    assert torch.allclose(embedding, predictor.features, atol=1e-5)
    for prompt, [mask] in zip(prompts, found, strict=True):
        masks, scores, _ = predictor.predict(
            np.array([[x, y] for x, y, _ in prompt.points]) if prompt.points else None,
            np.array([inside for _, _, inside in prompt.points]) if prompt.points else None,
            box=np.array(prompt.box_xyxy) if prompt.box_xyxy else None,
            multimask_output=asks_one_point(prompt),
        )
        pixels, expected = decode_counts(mask.counts, (90, 131)), masks[scores.argmax()]
        assert (pixels & expected).sum() >= 0.99 * (pixels | expected).sum() > 0
        assert mask.predicted_iou == pytest.approx(scores.max(), abs=1e-4)


def test_mobile_sam_is_taken_unasked_before_sam_nano_and_after_vit_b(monkeypatch: pytest.MonkeyPatch) -> None:
    weights_path(find_model("mobile_sam")).touch()
    assert largest_present().name == "mobile_sam"

    weights_path(find_model("sam_vit_b")).touch()
    assert largest_present().name == "sam_vit_b"

    weights_path(find_model("sam_vit_b")).unlink()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert largest_present().name == "sam_nano"
