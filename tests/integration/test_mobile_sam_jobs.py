"""A whole `maskfleet run` with MobileSAM. The pinned file has the official names and shapes, with random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from segment_anything import SamPredictor

from tests.e2e.test_run import run
from workers.models.mobile_sam import build_mobile_sam
from workers.training.scenes import draw_scene

pytest.importorskip("timm")
pytestmark = pytest.mark.integration

# Python reads it at its start, because PYTHONPATH names its folder. So the real commands use another pinned file.
SITE = """
from dataclasses import replace
from workers.models.registry import MODELS
MODELS["mobile_sam"] = replace(MODELS["mobile_sam"], sha256="{sha256}", size_bytes={size_bytes})
"""


def test_a_box_of_a_picture_on_its_side_gets_the_predictors_mask_of_the_upright_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sam = build_mobile_sam().eval().requires_grad_(False)
    (tmp_path / "weights").mkdir()
    file = tmp_path / "weights" / "mobile_sam.pt"
    torch.save(sam.state_dict(), file)
    (tmp_path / "site").mkdir()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(sha256=digest, size_bytes=file.stat().st_size))
    upright = draw_scene(77_000_000_000_000, (120, 200)).image
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    on_its_side = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    on_its_side.save(tmp_path / "images" / "a.png", exif=exif)
    box = [110, 15, 180, 100]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"key": "a.png", "prompts": [{"box_xyxy": box}]}) + "\n")

    words = ["--out", tmp_path / "out", "--model", "mobile_sam", "--prompts", prompts, "--devices", "cpu", "--json"]
    settings = {"PYTHONPATH": str(tmp_path / "site"), "MASKFLEET_WEIGHTS_DIR": str(tmp_path / "weights")}
    done = run(tmp_path / "images", *words, **settings)

    summary = json.loads(done.stdout)
    assert summary["model_version"].startswith(f"mobile_sam@{digest[:8]}+")
    coco = COCO(tmp_path / "out" / "coco.json")
    [annotation] = coco.anns.values()
    found = coco.annToMask(annotation).astype(bool)
    predictor = SamPredictor(sam)
    predictor.set_image(upright)
    [expected], _, _ = predictor.predict(box=np.array(box), multimask_output=False)
    assert found.shape == expected.shape == (120, 200)
    assert 0 < expected.sum() < expected.size
    assert (found & expected).sum() >= 0.99 * (found | expected).sum()
