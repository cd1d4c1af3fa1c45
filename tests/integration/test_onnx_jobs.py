"""`maskfleet models export-onnx` and jobs with `--decoder onnx`, through the real commands, with sam_nano."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from sqlalchemy import Engine, text

from db import jobs, leases
from db.settings import Settings, settings
from orchestrator.jobs.dispatch import tick
from orchestrator.jobs.request import Request, submit_job
from tests.e2e.test_run import run
from tests.integration.test_prompted_jobs import box_of, draw, iou
from tests.pixels import decode_counts
from workers.detectors import detector as detectors
from workers.models import sam
from workers.models.files import is_present
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.running.chunk import run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_present(find_model("sam_nano")), reason="sam_nano's weights are not here"),
]


def export_onnx(*words: str | Path, weights: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "orchestrator.cli", "models", "export-onnx", *map(str, words)]
    environment = {**os.environ, "MASKFLEET_WEIGHTS_DIR": str(weights)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_boxes_of_pictures_upright_and_on_their_side_get_the_torch_decoders_masks(tmp_path: Path) -> None:
    scenes = draw(tmp_path / "images")
    lines = [
        json.dumps({"key": key, "prompts": [{"box_xyxy": box_of(mask)} for mask in scene.masks]})
        for key, scene in scenes.items()
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    weights = tmp_path / "weights"
    exported = export_onnx("sam_nano", weights=weights)
    assert exported.returncode == 0, exported.stderr
    [file] = weights.iterdir()
    assert exported.stdout.strip() == str(file)
    as_exported = file.read_bytes()

    words = ["--model", "sam_nano", "--devices", "cpu", "--json", "--prompts", tmp_path / "p.jsonl"]
    done = run(
        tmp_path / "images",
        *words,
        "--decoder",
        "onnx",
        "--out",
        tmp_path / "out",
        MASKFLEET_WEIGHTS_DIR=str(weights),
    )

    coco = COCO(tmp_path / "out" / "coco.json")
    keys = {image["id"]: image["file_name"] for image in coco.imgs.values()}
    found = {(keys[a["image_id"]], a["prompt"]["index"]): coco.annToMask(a).astype(bool) for a in coco.anns.values()}
    assert len(found) == sum(len(scene.masks) for scene in scenes.values())
    assert np.mean([iou(mask, scenes[key].masks[n]) for (key, n), mask in found.items()]) > 0.85
    model = load_model(find_model("sam_nano"), "cpu")
    for key in ("a.png", "b.jpg"):
        with Image.open(tmp_path / "images" / key) as picture:
            image = np.asarray(ImageOps.exif_transpose(picture))
        [embedding] = model.embed([image])
        boxes = [Prompt(box_xyxy=tuple(box_of(mask))) for mask in scenes[key].masks]  # type: ignore[arg-type]
        for n, [mask] in enumerate(model.prompted(image, embedding, boxes, PromptParams())):
            assert iou(found[key, n], decode_counts(mask.counts, mask.size_hw)) >= 0.99
    usual = run(tmp_path / "images", "--out", tmp_path / "o", *words, "--dry-run")
    assert json.loads(usual.stdout)["model_version"] != json.loads(done.stdout)["model_version"]
    assert file.read_bytes() == as_exported


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "stub", "--decoder", "onnx"], "decoder=onnx: stub takes torch only"),
        (["--model", "sam_nano", "--decoder", "tensorrt"], "decoder='tensorrt': expected torch or onnx"),
    ],
)
def test_a_decoder_that_cannot_be_had_is_said_before_any_asset_is_touched(
    tmp_path: Path, words: list[str], said: str
) -> None:
    done = run(".", *words, "--out", tmp_path / "o", code=2)
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("library", "words"),
    [("timm", ["--model", "mobile_sam"]), ("onnxruntime", ["--model", "sam_nano", "--decoder", "onnx"])],
)
def test_a_missing_library_is_named_before_any_asset_is_touched(tmp_path: Path, library: str, words: list[str]) -> None:
    # Python reads it at its start, so the command does not find this library.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    done = run(".", *words, "--out", tmp_path / "o", code=2, PYTHONPATH=str(tmp_path))
    assert f'needs {library}, not installed here: run `pip install "maskfleet[models]"`' in " ".join(
        done.stderr.split()
    )
    assert not (tmp_path / "o").exists()


def test_export_goes_where_it_is_told_and_needs_a_model_with_such_a_decoder(tmp_path: Path) -> None:
    done = export_onnx("sam_nano", "--out", tmp_path / "deep" / "nano.onnx", weights=tmp_path / "weights")
    assert done.stdout.strip() == str(tmp_path / "deep" / "nano.onnx")
    assert (tmp_path / "deep" / "nano.onnx").stat().st_size > 1_000_000
    assert not (tmp_path / "weights").exists()

    done = export_onnx("sam_vit_b", weights=tmp_path / "weights")
    assert done.returncode == 2
    assert "run `maskfleet models pull sam_vit_b`" in " ".join(done.stderr.split())


def test_a_worker_without_onnxruntime_hands_the_chunk_back_without_a_verdict(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "images")
    monkeypatch.setenv("MASKFLEET_DATABASE_URL", database_url)
    monkeypatch.setenv("MASKFLEET_BROKER_URL", f"filesystem://{tmp_path / 'broker'}")
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    settings.cache_clear()
    with engine.begin() as db:
        job = submit_job(db, Request(source=str(tmp_path / "images"), model="sam_nano", params={"decoder": "onnx"}))
    tick(engine)
    with engine.begin() as db:
        [chunk_id] = db.execute(text("SELECT id FROM chunk WHERE job_id = :id"), {"id": job.id}).scalars()
    worker = Worker(
        name="one",
        engine=engine,
        settings=Settings(),
        load_model=lambda name: sam.load(find_model(name), "cpu"),  # not kept from an earlier test, its decoder loaded
        load_detector=lambda asked: detectors.load(asked, "cpu"),
        draining=lambda: False,
        on_hang=lambda: None,
    )

    with pytest.raises(ProcessUnfit, match="sam_nano cannot be loaded: --decoder onnx needs onnxruntime"):
        run_chunk(worker, chunk_id)

    with engine.begin() as db:
        counts = jobs.count_job(db, job_id=job.id)
        again = leases.claim_chunk(db, chunk_id=chunk_id, worker="another", lease_seconds=60)
        noted = db.execute(text("SELECT error FROM job WHERE id = :id"), {"id": job.id}).scalar_one()
    assert (counts.pending, counts.failed, counts.labeled) == (3, 0, 0)
    assert again is not None
    assert 'pip install "maskfleet[models]"' in noted
    settings.cache_clear()
