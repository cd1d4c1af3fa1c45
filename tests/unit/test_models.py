"""The registry names models without torch; the loader takes the right file and says what any other one is."""

import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from db.settings import settings
from tests.official_shapes import official_shapes
from workers.models import nano
from workers.models.files import model_version, weights_dir, weights_path
from workers.models.loading import load_model
from workers.models.registry import MODELS, find_model, largest_present
from workers.models.sam import ARCHITECTURES, SamModel, load_sam
from workers.models.spec import ModelSpec, UnknownModelError, WeightsError
from workers.models.weights import verify
from workers.params import AutomaticParams, automatic_params

OFFICIAL = ("sam_vit_h", "sam_vit_l", "sam_vit_b")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    settings.cache_clear()
    yield tmp_path / "weights"
    settings.cache_clear()


def build_tiny_sam(width=16):
    grid = 4
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=grid * 16,
            embed_dim=width,
            depth=1,
            num_heads=2,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(0,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(grid * 16, grid * 16), mask_in_chans=4
        ),
        mask_decoder=MaskDecoder(
            transformer=TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=32), transformer_dim=32
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


def make_spec(path, **changes):
    values = {
        "name": "tiny",
        "family": "segment-anything",
        "loader": "workers.models.sam:load",
        "weights_file": path.name,
        "url": "https://example.invalid/weights",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "parameter_count": 1,
        "prompts": ("box", "points"),
        "licence": "Apache-2.0",
    }
    return ModelSpec(**{**values, **changes})


def save(folder, payload, name="tiny.pth"):
    """Save as torch does, and return the spec of just this file."""
    torch.save(payload, folder / name)
    return make_spec(folder / name)


def asked(**params):
    return {"mode": "automatic", "params": params}


# The registry


def test_registry_and_weights_are_read_without_torch():
    program = "import sys, workers.models, workers.models.weights; print({'torch', 'torchvision'} & set(sys.modules))"

    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "set()"


def test_every_entry_is_filed_under_its_own_name_and_has_a_loader():
    for name, spec in MODELS.items():
        module, function = spec.loader.split(":")
        assert name == spec.name
        assert callable(getattr(import_module(module), function))


def test_every_entry_has_defaults_that_json_can_hold_and_a_job_may_ask():
    for spec in MODELS.values():
        assert json.loads(json.dumps(spec.defaults)) == spec.defaults
        assert isinstance(automatic_params(spec.defaults, {}), AutomaticParams)


def test_unknown_model_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        UnknownModelError,
        match=r"'sam_vit_x' \(did you mean sam_vit_\w\?\); known: sam_vit_h, sam_vit_l, sam_vit_b, .*sam_nano",
    ):
        find_model("sam_vit_x")


def test_weights_lie_where_the_setting_says(folder):
    assert weights_path(find_model("sam_vit_b")) == folder / "sam_vit_b_01ec64.pth"


@pytest.mark.parametrize(
    ("xdg", "expected"),
    [
        ("/caches", "/caches/maskfleet/weights"),
        ("relative", "~/.cache/maskfleet/weights"),
        ("", "~/.cache/maskfleet/weights"),
    ],
)
def test_weights_lie_in_the_users_cache_without_the_setting(monkeypatch, xdg, expected):
    monkeypatch.delenv("MASKFLEET_WEIGHTS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    settings.cache_clear()

    assert weights_dir() == Path(expected).expanduser()


def test_largest_official_sam_that_is_present_is_chosen(folder):
    chosen = [largest_present().name]
    for name in ("sam_vit_b", "sam_vit_l", "sam_vit_h"):
        weights_path(find_model(name)).touch()
        chosen.append(largest_present().name)

    assert chosen == ["sam_nano", "sam_vit_b", "sam_vit_l", "sam_vit_h"]


def test_model_version_names_model_weights_and_what_was_asked():
    assert model_version(find_model("sam_vit_b"), asked(points_per_side=32)) == "sam_vit_b@ec2df627+586456d8"


def test_model_version_does_not_depend_on_the_order_of_what_was_asked():
    first = model_version(find_model("sam_vit_b"), {"mode": "automatic", "params": {"a": 1, "b": [1, 2]}})
    second = model_version(find_model("sam_vit_b"), {"params": {"b": (1, 2), "a": 1}, "mode": "automatic"})

    assert first == second


def test_model_version_differs_with_parameters_weights_and_model():
    versions = {
        model_version(find_model("sam_vit_b"), asked()),
        model_version(find_model("sam_vit_b"), asked(max_masks=3)),
        model_version(replace(find_model("sam_vit_b"), sha256="f" * 64), asked()),
        model_version(find_model("sam_vit_l"), asked()),
    }

    assert len(versions) == 4


def test_model_version_of_nan_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        model_version(find_model("sam_vit_b"), asked(box_nms_thresh=math.nan))


# The architectures against the official files, without the files


@pytest.mark.parametrize("name", OFFICIAL)
def test_architecture_accounts_for_every_byte_of_the_official_file(name):
    with torch.device("meta"):
        sam = ARCHITECTURES[name]()
    state = sam.state_dict()

    # A torch archive adds a header, padding, a directory entry and a pickled record to each tensor: 316 bytes here.
    overhead = find_model(name).size_bytes - sum(4 * tensor.numel() for tensor in state.values())
    assert overhead / len(state) == pytest.approx(316, abs=2)
    assert find_model(name).parameter_count == sum(parameter.numel() for parameter in sam.parameters())


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes_are_what_the_loader_expects(name):
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in ARCHITECTURES[name]().state_dict().items()}

    assert official_shapes(name) == expected


# The loader


def test_checkpoint_gives_a_frozen_float32_model_with_its_weights(folder):
    source = build_tiny_sam()
    spec = save(folder, source.state_dict())

    sam = load_sam(spec, build_tiny_sam, "cpu")

    assert not sam.training
    assert not any(parameter.requires_grad for parameter in sam.parameters())
    assert torch.equal(sam.pixel_mean, source.pixel_mean)
    assert list(sam.state_dict()) == list(source.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in sam.state_dict().items())
    assert all(not tensor.is_meta for tensor in [*sam.parameters(), *sam.buffers()])


def test_half_precision_safetensors_are_loaded_as_float32(folder):
    state = {name: tensor.half() for name, tensor in build_tiny_sam().state_dict().items()}
    save_file(state, folder / "tiny.safetensors")

    sam = load_sam(make_spec(folder / "tiny.safetensors"), build_tiny_sam, "cpu")

    assert all(tensor.dtype == torch.float32 for tensor in sam.state_dict().values())
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in sam.state_dict().items())


def test_overwriting_the_file_does_not_change_a_loaded_model(folder):
    spec = save(folder, build_tiny_sam().state_dict())
    sam = load_sam(spec, build_tiny_sam, "cpu")
    before = {name: tensor.clone() for name, tensor in sam.state_dict().items()}

    with (folder / "tiny.pth").open("r+b") as file:
        file.write(bytes(spec.size_bytes))

    assert all(torch.equal(tensor, before[name]) for name, tensor in sam.state_dict().items())


def test_loaded_models_are_kept_by_name_and_sha256(folder, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", build_tiny_sam)
    first_spec = save(folder, build_tiny_sam().state_dict())
    first = load_model(first_spec, "cpu")
    assert load_model(first_spec, "cpu") is first

    second_spec = save(folder, build_tiny_sam().state_dict())

    assert load_model(second_spec, "cpu") is not first
    assert load_model(first_spec, "cpu") is first


def test_absent_weights_are_an_error_with_the_command_that_brings_them():
    with pytest.raises(
        WeightsError, match=r"sam_vit_b: no weights at .*01ec64.pth; run `maskfleet models pull sam_vit_b`"
    ):
        load_model(find_model("sam_vit_b"), "cpu")


def test_another_models_checkpoint_is_named_with_the_model_that_was_wanted(folder):
    torch.save(nano.build_sam_nano().state_dict(), weights_path(find_model("sam_vit_b")))

    with pytest.raises(WeightsError, match=r"01ec64.pth: holds the weights of sam_nano, expected .* sam_vit_b; run `"):
        load_model(find_model("sam_vit_b"), "cpu")


def test_unknown_models_checkpoint_is_described_by_its_differences(folder):
    state = build_tiny_sam(width=32).state_dict()
    state["mask_decoder.hf_token.weight"] = state.pop("mask_decoder.iou_token.weight")
    spec = save(folder, state)

    with pytest.raises(
        WeightsError, match=r"holds another model's weights: 1 missing \(mask_decoder.iou_token"
    ) as error:
        load_sam(spec, build_tiny_sam, "cpu")

    assert "1 unexpected (mask_decoder.hf_token.weight)" in str(error.value)
    assert "of another shape (image_encoder.pos_embed (1, 4, 4, 32), not (1, 4, 4, 16), " in str(error.value)


def test_finetuned_checkpoint_under_an_official_name_is_refused(folder):
    published = save(folder, build_tiny_sam().state_dict())
    save(folder, build_tiny_sam().state_dict())

    with pytest.raises(
        WeightsError, match=r"tiny.pth: fits tiny, but is another or damaged file, with sha256 [0-9a-f]{64};"
    ):
        load_sam(published, build_tiny_sam, "cpu")


def test_truncated_checkpoint_is_named_as_such(folder):
    spec = save(folder, build_tiny_sam().state_dict())
    (folder / "tiny.pth").write_bytes((folder / "tiny.pth").read_bytes()[: spec.size_bytes // 2])

    with pytest.raises(
        WeightsError, match=r"tiny.pth: truncated: [\d,]+ of [\d,]+ bytes; run `maskfleet models pull tiny`"
    ):
        load_sam(spec, build_tiny_sam, "cpu")


def test_truncated_safetensors_are_named_as_such(folder):
    save_file(build_tiny_sam().state_dict(), folder / "tiny.safetensors")
    spec = make_spec(folder / "tiny.safetensors")
    (folder / "tiny.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[: spec.size_bytes // 2])

    with pytest.raises(WeightsError, match=r"tiny.safetensors: truncated: "):
        load_sam(spec, build_tiny_sam, "cpu")


def test_html_page_saved_as_a_checkpoint_is_named(folder):
    spec = save(folder, build_tiny_sam().state_dict())
    (folder / "tiny.pth").write_text("<!DOCTYPE html><html>502 Bad Gateway</html>")

    with pytest.raises(WeightsError, match=r"tiny.pth: an HTML page; run `maskfleet models pull tiny`"):
        load_sam(spec, build_tiny_sam, "cpu")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("pinned", [True, False])
def test_pickled_payload_in_a_checkpoint_is_refused_and_never_run(folder, pinned):
    spec = save(folder, {"weights": Payload(folder / "owned")})
    if not pinned:
        spec = replace(spec, sha256="0" * 64, size_bytes=10**9)

    with pytest.raises(WeightsError, match=r"tiny.pth: holds pickled objects .* could run code; run `"):
        load_sam(spec, build_tiny_sam, "cpu")

    assert not (folder / "owned").exists()


def test_bare_pickle_is_refused_and_never_run(folder):
    (folder / "tiny.pth").write_bytes(pickle.dumps(Payload(folder / "owned")))
    spec = replace(make_spec(folder / "tiny.pth"), sha256="0" * 64, size_bytes=10**9)

    with pytest.raises(WeightsError, match=r"tiny.pth: a bare pickle, which is not loaded because it could run code"):
        load_sam(spec, build_tiny_sam, "cpu")

    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("payload", "held"),
    [
        ({"model": {}, "optimizer": {}, "step": 3, "rate": 0.1}, "entries model, optimizer, step, …"),
        ([torch.zeros(1)], "a list"),
    ],
)
def test_training_checkpoint_is_not_taken_for_weights(folder, payload, held):
    spec = save(folder, payload)

    with pytest.raises(WeightsError, match=f"tiny.pth: holds {held}, expected the tensors of tiny by name"):
        load_sam(spec, build_tiny_sam, "cpu")


# The model


@pytest.fixture
def tiny_model(folder):
    torch.manual_seed(0)
    return SamModel(load_sam(save(folder, build_tiny_sam().state_dict()), build_tiny_sam, "cpu"))


def make_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_images_of_any_size_are_embedded_together_as_they_are_alone(tiny_model):
    images = [make_image(40, 70, seed=1), make_image(64, 64, seed=2), make_image(9, 200, seed=3)]

    together = tiny_model.embed(images)

    assert len(together) == 3
    for image, embedding in zip(images, together, strict=True):
        assert torch.allclose(embedding, tiny_model.embed([image])[0], atol=1e-5)


def test_automatic_masks_are_of_the_image_that_is_given_not_the_last_one_embedded(tiny_model):
    first, second = make_image(40, 70, seed=1), make_image(64, 50, seed=2)
    params = AutomaticParams(points_per_side=4, pred_iou_thresh=-10, stability_score_thresh=0)
    alone = tiny_model.automatic(first, tiny_model.embed([first])[0], params)

    embedding, _ = tiny_model.embed([first, second])

    again = tiny_model.automatic(first, embedding, params)
    assert alone
    assert {mask.size_hw for mask in again} == {(40, 70)}
    assert [mask.counts for mask in again] == [mask.counts for mask in alone]


# sam_nano


def test_the_registry_counts_the_parameters_of_sam_nano():
    spec = find_model("sam_nano")

    assert spec.parameter_count == sum(parameter.numel() for parameter in nano.build_sam_nano().parameters())
    assert weights_path(spec) == nano.WEIGHTS_PATH


def test_shipped_sam_nano_is_the_pinned_file_and_loads():
    assert verify(find_model("sam_nano")).found == "the published file"
    assert isinstance(load_model(find_model("sam_nano"), "cpu"), SamModel)
