"""SAM's decoder as ONNX: the file by itself, and decoder=onnx against the torch path."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam

from db.settings import settings
from tests.pixels import decode_counts
from workers.engine.decoder import prompt_logits
from workers.engine.sam import input_hw
from workers.images.decode import decode
from workers.images.pixels import RgbImage
from workers.masks import Mask
from workers.models.files import onnx_path
from workers.models.loading import load_model
from workers.models.mobile_sam import build_mobile_sam
from workers.models.onnx_decoder import with_onnx_decoder
from workers.models.onnx_export import INPUTS, OUTPUTS, export
from workers.models.registry import find_model
from workers.models.sam import SamModel
from workers.models.spec import MissingLibraryError, ModelError
from workers.params import PromptParams, automatic_params
from workers.prompts import Prompt
from workers.training.scenes import Scene, draw_scene

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

NANO = find_model("sam_nano")
# slow: each test exports a decoder
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    settings.cache_clear()
    yield tmp_path / "weights"
    settings.cache_clear()


@pytest.fixture(scope="module")
def nano() -> Sam:
    return load_model(NANO, "cpu").sam  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def session(nano: Sam, tmp_path: Path) -> Any:
    export(nano, NANO, tmp_path / "nano.onnx")
    return onnxruntime.InferenceSession(tmp_path / "nano.onnx", providers=["CPUExecutionProvider"])


def ask(session: Any, **given: Any) -> list[np.ndarray]:
    """Run the file as any program does that knows the official convention, without a mask unless one is given."""
    inputs = {"mask_input": np.zeros((1, 1, 128, 128)), "has_mask_input": np.zeros(1), **given}
    found: list[np.ndarray] = session.run(None, {name: np.asarray(v, np.float32) for name, v in inputs.items()})
    return found


def make_embedding(seed: int) -> torch.Tensor:
    return torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(seed))


def turned(scene: Scene) -> RgbImage:
    """The scene as a picture that is stored on its side, with the EXIF mark that turns it upright, decoded."""
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(scene.image).transpose(Image.Transpose.ROTATE_90).save(content, "PNG", exif=exif)
    return decode(content.getvalue(), name="turned.png")


def iou(one: Mask, other: Mask) -> float:
    a, b = (decode_counts(mask.counts, mask.size_hw) for mask in (one, other))
    return float((a & b).sum() / (a | b).sum())


# The file


def test_the_file_has_the_official_inputs_and_outputs_for_any_number_of_prompts_and_points(session: Any) -> None:
    assert [one.name for one in session.get_inputs()] == list(INPUTS)
    assert [one.name for one in session.get_outputs()] == list(OUTPUTS)
    shapes = {one.name: one.shape for one in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes["point_coords"] == ["prompts", "points", 2]
    assert shapes["masks"][0] == shapes["iou_predictions"][0] == shapes["low_res_masks"][0] == "prompts"


@pytest.mark.parametrize("size_hw", [(240, 320), (320, 240), (97, 1000)])
def test_masks_of_any_image_size_are_those_of_segment_anything(
    nano: Sam, session: Any, size_hw: tuple[int, int]
) -> None:
    embedding, random = make_embedding(1), np.random.default_rng(1)
    inside = input_hw(nano, size_hw)
    coords = (random.random((3, 2, 2)) * inside[::-1]).astype(np.float32)
    labels = np.array([[1, 0], [1, 1], [0, 1]])
    padding = np.zeros((3, 1, 2)), np.full((3, 1), -1)

    masks, iou_predictions, low_res_masks = ask(
        session,
        image_embeddings=embedding.numpy(),
        point_coords=np.concatenate([coords, padding[0]], axis=1),
        point_labels=np.concatenate([labels, padding[1]], axis=1),
        orig_im_size=size_hw,
    )

    with torch.no_grad():
        sparse, dense = nano.prompt_encoder(
            points=(torch.from_numpy(coords), torch.from_numpy(labels)), boxes=None, masks=None
        )
        place = nano.prompt_encoder.get_dense_pe()
        logits, scores = nano.mask_decoder.predict_masks(embedding, place, sparse, dense)
        expected = nano.postprocess_masks(logits, inside, size_hw).numpy()
    assert np.abs(low_res_masks - logits.numpy()).max() < 1e-4
    assert np.abs(iou_predictions - scores.numpy()).max() < 1e-4
    assert masks.shape == (3, 4, *size_hw)
    # A bilinear weight's last bit counts where logits of 20 meet logits of -20.
    assert np.abs(masks - expected).max() < 1e-3


def test_a_box_alone_and_a_box_with_a_mask_need_no_padding_point(nano: Sam, session: Any) -> None:
    embedding, box = make_embedding(2), torch.tensor([[20.0, 30, 200, 150]])
    earlier = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(3))
    for mask in (None, earlier):
        given = {} if mask is None else {"mask_input": mask.numpy(), "has_mask_input": [1]}

        _, iou_predictions, low_res_masks = ask(
            session,
            image_embeddings=embedding.numpy(),
            point_coords=box.reshape(1, 2, 2).numpy(),
            point_labels=[[2, 3]],
            orig_im_size=(10, 10),
            **given,
        )

        with torch.no_grad():
            sparse, dense = nano.prompt_encoder(points=None, boxes=box, masks=mask)
            place = nano.prompt_encoder.get_dense_pe()
            logits, scores = nano.mask_decoder.predict_masks(embedding, place, sparse, dense)
        assert np.abs(low_res_masks - logits.numpy()).max() < 1e-4
        assert np.abs(iou_predictions - scores.numpy()).max() < 1e-4


# decoder=onnx


def test_every_make_of_prompt_on_a_picture_on_its_side_gets_the_torch_decoders_masks() -> None:
    scene = draw_scene(77_000_000_000_001, (240, 320))
    image, model = turned(scene), load_model(NANO, "cpu")
    assert np.array_equal(image, scene.image)
    rows, columns = np.nonzero(scene.masks[0])
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    middle = (float(np.median(columns)), float(np.median(rows)), 1)
    prompts = [
        Prompt(box_xyxy=box),
        Prompt(points=(middle,)),
        Prompt(points=(middle, (3, 3, 0))),
        Prompt(box_xyxy=box, points=(middle, (3, 3, 0))),
        *(Prompt(box_xyxy=(5.0 + 9 * n, 7, 90 + 15 * n, 200)) for n in range(9)),
    ]
    [embedding] = model.embed([image])

    for multimask in ("best", "all"):
        expected = model.prompted(image, embedding, prompts, PromptParams(multimask=multimask))
        found = model.prompted(image, embedding, prompts, PromptParams(multimask=multimask, decoder="onnx"))

        assert [len(masks) for masks in found] == [len(masks) for masks in expected]
        pairs = [pair for two in zip(found, expected, strict=True) for pair in zip(*two, strict=True)]
        assert min(iou(*pair) for pair in pairs) >= 0.99
        assert max(abs(one.predicted_iou - other.predicted_iou) for one, other in pairs) < 1e-4
    [[at_the_box], *_] = model.prompted(image, embedding, prompts, PromptParams(decoder="onnx"))
    object_ = scene.masks[0].astype(bool)
    pixels = decode_counts(at_the_box.counts, (240, 320))
    assert (pixels & object_).sum() > 0.8 * (pixels | object_).sum()


def test_automatic_masks_are_the_torch_decoders() -> None:
    scene, model = draw_scene(77_000_000_000_002, (160, 240)), load_model(NANO, "cpu")
    [embedding] = model.embed([scene.image])
    few = {"points_per_side": 6, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}

    expected = model.automatic(scene.image, embedding, automatic_params(NANO.defaults, few))
    found = model.automatic(scene.image, embedding, automatic_params(NANO.defaults, {**few, "decoder": "onnx"}))

    assert len(found) == len(expected) > 2
    assert min(iou(*pair) for pair in zip(found, expected, strict=True)) >= 0.99


def test_low_resolution_logits_of_sams_own_width_are_the_torch_decoders() -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    sam = build_mobile_sam().eval().requires_grad_(False)
    with_onnx = with_onnx_decoder(sam, replace(find_model("mobile_sam"), sha256="f" * 64))
    embedding = torch.randn(1, 256, 64, 64)
    asked: dict[str, Any] = {
        "size_hw": (201, 97),
        "point_coords": np.array([[[20.5, 30]], [[90, 200]]]),
        "point_labels": np.array([[1], [0]]),
        "boxes_xyxy": np.array([[10, 10, 60, 70.5], [0, 0, 97, 201]]),
    }
    for multimask in (False, True):
        logits, predicted_iou = prompt_logits(with_onnx, embedding, **asked, multimask=multimask)
        expected_logits, expected_iou = prompt_logits(sam, embedding, **asked, multimask=multimask)

        assert logits.shape == expected_logits.shape
        assert (logits - expected_logits).abs().max() < 1e-4
        assert (predicted_iou - expected_iou).abs().max() < 1e-4


# Where the file lies, and what lies there


def test_an_absent_file_is_exported_once_and_said_in_the_log(
    nano: Sam, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with_onnx_decoder(nano, NANO)
    path = folder / f"sam_nano.{NANO.sha256[:8]}.decoder.onnx"
    assert onnx_path(NANO) == path
    assert f"sam_nano: exporting its decoder to {path}" in caplog.text
    written = path.stat()

    with_onnx_decoder(nano, NANO)

    assert path.stat().st_ino == written.st_ino
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_another_weights_decoder_in_the_files_place_is_refused_naming_both(nano: Sam) -> None:
    export(nano, replace(NANO, sha256="0" * 64), onnx_path(NANO))

    with pytest.raises(
        ModelError, match=f"the decoder of weights with sha256 0{{64}}, expected that of sam_nano, {NANO.sha256}; run `"
    ):
        with_onnx_decoder(nano, NANO)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"<!DOCTYPE html>", "cannot be read as ONNX"),
        (b"", "no decoder of ours"),
        (b"\x80\x04K\x01.", "cannot be read"),
    ],
)
def test_what_is_no_onnx_file_is_refused_with_the_command_that_mends_it(
    nano: Sam, folder: Path, content: bytes, found: str
) -> None:
    folder.mkdir()
    onnx_path(NANO).write_bytes(content)

    with pytest.raises(ModelError, match=rf"\.onnx: {found}.*; run `maskfleet models export-onnx sam_nano`"):
        with_onnx_decoder(nano, NANO)


def test_a_truncated_graph_is_refused_with_the_command_that_mends_it(nano: Sam) -> None:
    import onnx

    export(nano, NANO, onnx_path(NANO))
    model = onnx.load_model(onnx_path(NANO))
    del model.graph.initializer[3:]
    onnx.save_model(model, onnx_path(NANO))

    with pytest.raises(ModelError, match=r"\.onnx: onnxruntime cannot run it .*; run `maskfleet models export-onnx"):
        with_onnx_decoder(nano, NANO)


def test_a_folder_that_cannot_be_written_is_named(nano: Sam, folder: Path) -> None:
    folder.write_text("a file where the folder should be")

    with pytest.raises(ModelError, match=r"sam_nano: cannot write .*\.decoder\.onnx"):
        with_onnx_decoder(nano, NANO)


def test_missing_onnxruntime_is_named_with_what_to_install(
    nano: Sam, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    image = np.zeros((20, 30, 3), np.uint8)
    model = SamModel(nano, NANO)
    [embedding] = model.embed([image])
    prompts = [Prompt(box_xyxy=(1, 1, 9, 9))]

    with pytest.raises(MissingLibraryError, match=r"onnx needs onnxruntime, .* `pip install \"maskfleet\[models\]\"`"):
        model.prompted(image, embedding, prompts, PromptParams(decoder="onnx"))

    assert not folder.exists()
    assert len(model.prompted(image, embedding, prompts, PromptParams())) == 1
