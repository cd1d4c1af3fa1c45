"""A whole `maskfleet run` with SAM 2.1 and with SAM-HQ. The pinned files are tiny models in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from tests.e2e.test_run import run
from tests.unit import test_sam2, test_sam_hq
from tests.unit.test_sam2 import phone_picture
from workers.images.decode import decode
from workers.models.sam import SamModel
from workers.models.spec import ModelSpec
from workers.params import PromptParams
from workers.prompts import Prompt

pytestmark = pytest.mark.integration

# Python reads it at its start, because PYTHONPATH names its folder. So the real commands pin a file of a smaller model.
SITE = """
from dataclasses import replace
from workers.models.registry import MODELS
MODELS["{name}"] = replace(
    MODELS["{name}"],
    loader="sitecustomize:load", weights_file="{file}", sha256="{sha256}", size_bytes={size_bytes},
)

def load(spec, device):
    from functools import partial
    if spec.family == "sam2.1":
        from workers.models.sam2 import Hiera, load_variant
        return load_variant(spec, Hiera(**{sizes}), device)
    from workers.models.sam import SamModel, load_sam
    from workers.models.sam_hq import build_sam_hq
    return SamModel(load_sam(spec, partial(build_sam_hq, **{sizes}), device))
"""
PROMPTS = [Prompt(box_xyxy=(10, 30, 60, 120)), Prompt(points=((70, 20, 1), (20, 100, 0)))]


def label(folder: Path, spec: ModelSpec, sizes: dict[str, Any]) -> dict[str, Any]:
    """Run a job with PROMPTS over one phone photo. Returns its summary."""
    (folder / "site").mkdir()
    values = {"sha256": spec.sha256, "size_bytes": spec.size_bytes, "file": spec.weights_file}
    (folder / "site" / "sitecustomize.py").write_text(SITE.format(name=spec.name, sizes=sizes, **values))
    (folder / "images").mkdir()
    (folder / "images" / "phone.jpg").write_bytes(phone_picture())
    prompts = folder / "prompts.jsonl"
    line = {"key": "phone.jpg", "prompts": [prompt.as_json() for prompt in PROMPTS]}
    prompts.write_text(json.dumps(line) + "\n")
    words = ["--out", folder / "out", "--model", spec.name, "--prompts", prompts, "--devices", "cpu", "--json"]
    settings = {"PYTHONPATH": str(folder / "site"), "MASKFLEET_WEIGHTS_DIR": str(folder / "weights")}
    summary: dict[str, Any] = json.loads(run(folder / "images", *words, **settings).stdout)
    return summary


def masks_of(out: Path) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
    coco = COCO(out / "coco.json")
    return [coco.annToMask(annotation).astype(bool) for annotation in coco.anns.values()]


def test_sam2s_masks_of_a_phones_picture_are_those_of_transformers(tmp_path: Path) -> None:
    weights = test_sam2.draw_weights(steepness=30)
    (tmp_path / "weights").mkdir()
    spec = test_sam2.save(tmp_path / "weights", weights)

    sizes = {name: getattr(test_sam2.TINY, name) for name in test_sam2.TINY.__dataclass_fields__}
    summary = label(tmp_path, spec, sizes)

    assert summary["model_version"].startswith(f"sam2.1_tiny@{spec.sha256[:8]}+")
    sam = test_sam2.Sam2(test_sam2.TINY).eval()
    sam.load_state_dict(weights)
    found = masks_of(tmp_path / "out")
    assert len(found) == len(PROMPTS)
    for pixels, prompt in zip(found, PROMPTS, strict=True):
        _, _, [expected] = test_sam2.ask_transformers(SamModel(sam), phone_picture(), prompt, multimask=False)
        assert pixels.shape == expected.shape == (131, 96)
        assert 0 < expected.sum() < expected.numel()
        union = pixels | expected.numpy()
        assert (pixels & expected.numpy()).sum() >= 0.99 * union.sum()


def test_sam_hqs_masks_of_a_phones_picture_are_those_of_a_direct_call(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    spec = test_sam_hq.save(tmp_path / "weights", test_sam_hq.draw_weights())

    summary = label(tmp_path, spec, dict(test_sam_hq.build_tiny.keywords))

    assert summary["model_version"].startswith(f"sam_hq_vit_b@{spec.sha256[:8]}+")
    sam = test_sam_hq.build_tiny().eval()
    sam.load_state_dict(test_sam_hq.draw_weights())
    model, image = SamModel(sam), decode(phone_picture(), name="phone.jpg")
    with torch.no_grad():
        [embedding] = model.embed([image])
        masks = model.prompted(image, embedding, PROMPTS, PromptParams())
    assert [int(pixels.sum()) for pixels in masks_of(tmp_path / "out")] == [mask.area_px for [mask] in masks]
