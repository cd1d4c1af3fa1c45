"""Jobs with a detector through the real `maskfleet run`: masks in its boxes, its classes as labels, and counts."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from sqlalchemy import Engine

from db import jobs, listing
from db.listing import NewAsset
from db.settings import Settings
from orchestrator.jobs.request import Request, submit_job
from orchestrator.local.postgres import EmbeddedPostgres
from orchestrator.prompts.detectors import read_detector
from tests.e2e.test_run import MASKFLEET, environment, run
from tests.factories import chunk_ids, claim
from tests.onnx_detectors import CLASSES, write_colour_detector
from workers.detectors import detector as detectors
from workers.models.files import is_present
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.running.chunk import run_chunk
from workers.running.outcomes import ProcessUnfit
from workers.running.worker import Worker

pytestmark = pytest.mark.integration

SQUARES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "side.jpg": {"red": (180, 40, 280, 120), "blue": (30, 130, 110, 210)},
    "two.png": {"red": (20, 20, 90, 100), "green": (150, 110, 230, 200)},
    "dark.png": {},
}


def draw(folder: Path) -> Path:
    """Coloured rectangles on images of 320 x 240. One image is stored rotated; its EXIF tag makes it upright."""
    folder.mkdir(parents=True)
    for name, squares in SQUARES.items():
        pixels = np.zeros((240, 320, 3), np.uint8)
        for colour, (x0, y0, x1, y1) in squares.items():
            pixels[y0:y1, x0:x1, ("red", "green", "blue").index(colour)] = 255
        image, exif = Image.fromarray(pixels), Image.Exif()
        if name == "side.jpg":
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / name, exif=exif, **({"quality": 98, "subsampling": 0} if name == "side.jpg" else {}))
    return folder


def masks_of(out: Path) -> dict[tuple[str, str], tuple[dict[str, Any], np.ndarray]]:
    """From (key, detector's class) to annotation and pixels."""
    coco = COCO(out / "coco.json")
    found = {}
    for annotation in coco.anns.values():
        key = coco.imgs[annotation["image_id"]]["file_name"]
        annotation["label"] = coco.cats[annotation["category_id"]]["name"]
        found[key, annotation["prompt"]["class"]] = annotation, coco.annToMask(annotation).astype(bool)
    assert len(found) == len(coco.anns)
    return found


def iou_with_box(mask: np.ndarray, box: tuple[int, int, int, int]) -> float:
    other = np.zeros_like(mask)
    other[box[1] : box[3], box[0] : box[2]] = True
    return float((mask & other).sum() / (mask | other).sum())


@pytest.mark.skipif(not is_present(find_model("sam_nano")), reason="sam_nano's weights are not here")
def test_a_detectors_boxes_become_masks_with_its_classes_and_scores_and_show_counts_them(tmp_path: Path) -> None:
    source, out = draw(tmp_path / "images"), tmp_path / "out"
    broken = [(math.nan, 1, 5, 5, 0.95, 0), (500, 500, 600, 600, 0.95, 2)]
    detector = write_colour_detector(tmp_path / "d.onnx", constant=broken, classes="\n".join(CLASSES))
    (tmp_path / "map.yaml").write_text("red: bus\ngreen: null\nyellow: taxi\n")
    words = [source, "--model", "sam_nano", "--detector", detector, "--label-map", tmp_path / "map.yaml"]

    done = run(*words, "--out", out, "--devices", "cpu", "--json")

    summary = json.loads(done.stdout)
    assert summary["assets"] == {"listed": 3, "labeled": 3, "failed": 0}
    report = summary["detector"]
    assert report["found"] == {"red": 2, "blue": 1}
    assert report["unmapped"] == {"blue": 1}
    assert report["unused"] == 3
    assert "2 of 2 boxes cannot be used: box 0 (blue): box_xyxy: [nan" in report["unused_first"][0]["error"]
    assert "box 1 (red): box_xyxy" in report["unused_first"][0]["error"]

    found = masks_of(out)
    assert set(found) == {("side.jpg", "red"), ("side.jpg", "blue"), ("two.png", "red")}
    for (key, colour), (annotation, pixels) in found.items():
        assert pixels.shape == (240, 320)
        assert iou_with_box(pixels, SQUARES[key][colour]) > 0.9
        assert annotation["label"] == {"red": "bus", "blue": "blue"}[colour]
        assert annotation["prompt"]["score"] == pytest.approx({"red": 0.7, "blue": 0.9}[colour])
        assert annotation["predicted_iou"] != annotation["prompt"]["score"]

    with EmbeddedPostgres(out / ".maskfleet" / "postgres") as server:
        shown = subprocess.run(
            [*MASKFLEET, "show", "1"],
            env=environment(MASKFLEET_DATABASE_URL=server.url, COLUMNS="200"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert "2 red, 1 blue" in shown
    assert "1 blue; kept under their own names" in shown
    assert "not in the label map: 1 blue" in done.stderr

    again = json.loads(run(*words, "--out", out, "--devices", "cpu", "--json").stdout)
    assert again["answered_from_stored"] == 3
    assert again["detector"]["found"] == {"red": 2, "blue": 1}
    fewer = json.loads(run(*words, "--classes", "green,blue", "--out", out, "--devices", "cpu", "--json").stdout)
    assert (fewer["answered_from_stored"], fewer["detector"]["found"]) == (0, {"blue": 1})


def test_a_worker_with_other_detector_files_gives_the_chunk_back_and_names_both(tmp_path: Path, engine: Engine) -> None:
    source = draw(tmp_path / "images")
    path = write_colour_detector(tmp_path / "d.onnx", classes="\n".join(CLASSES))
    asked = read_detector(str(path))
    with engine.begin() as db:
        job = submit_job(db, Request(source=str(source), model="sam_nano", detector=asked))
        listed = [NewAsset(key=name, size_bytes=1, etag=name) for name in SQUARES]
        listing.add_assets(db, job=job, assets=listed, cursor=None, skipped={}, complete=True, chunk_size=9)
    write_colour_detector(path, classes="b\ng\nr")
    worker = Worker(
        name="one",
        engine=engine,
        settings=Settings(),
        load_model=lambda name: load_model(find_model(name), "cpu"),
        load_detector=lambda asked: detectors.load(asked, "cpu"),
        draining=lambda: False,
        on_hang=lambda: None,
    )
    [chunk_id] = chunk_ids(engine, job)

    with pytest.raises(ProcessUnfit, match=rf"is sha256:\w+, but the job was submitted with {asked.identity}; put"):
        run_chunk(worker, chunk_id)

    with engine.begin() as db:
        found = jobs.get_job(db, job_id=job.id)
        assert found is not None
        assert f"but the job was submitted with {asked.identity}" in (found.error or "")
        assert jobs.count_job(db, job_id=job.id).pending == 3
    assert claim(engine, chunk_id) is not None


def test_a_checkpoint_of_the_hub_is_pinned_to_its_commit_and_run_from_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_checkpoints import save_detector

    source, commit = draw(tmp_path / "images"), "ab" * 20
    repository = tmp_path / "hub" / "models--team--detector"
    save_detector("rt_detr_v2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [source, "--out", tmp_path / "out", "--model", "stub", "--devices", "cpu", "--json"]

    done = run(*words, "--detector", "team/detector", "--detector-threshold", "0", **offline)

    summary = json.loads(done.stdout)
    assert (summary["detector"]["name"], summary["detector"]["identity"]) == ("team/detector", f"commit:{commit}")
    assert sum(summary["detector"]["found"].values()) == summary["masks"] > 0
    assert summary["assets"]["labeled"] == 3
    gone = run(*words, "--detector", "team/another", code=2, **offline)
    assert "and not on the hub" in gone.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "red"], "go with --detector"),
        (["--detector", "d.onnx", "--prompts", "p.jsonl"], "give one of them"),
        (["--detector", "d.onnx", "--label", "thing"], "--label cannot be used here"),
        (["--detector", "d.onnx", "--classes", "red,bus"], "has no class 'bus'; it has blue, green, red"),
        (["--detector", "d.onnx", "--label-map", "none.yaml"], "none.yaml: cannot be read"),
        (["--detector", "d.onnx", "--param", "points_per_side=3"], "known: multimask"),
        (["--detector", "./gone.onnx"], "no such file or folder, here or in"),
    ],
)
def test_wrong_usage_of_a_detector_is_said_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    write_colour_detector(tmp_path / "d.onnx", classes="\n".join(CLASSES))
    done = run(".", "--out", "out", "--model", "stub", *words, code=2, cwd=tmp_path)
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / ".maskfleet" / "postgres").exists()


def test_phrases_are_boxed_by_a_detector_masked_by_the_model_and_counted_apart(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_checkpoints import save_phrase_detector

    source, checkpoint = draw(tmp_path / "images"), save_phrase_detector("owlv2", tmp_path / "owl")
    words = [source, "--out", tmp_path / "out", "--model", "stub", "--devices", "cpu", "--json"]
    words += ["--detector", checkpoint, "--detector-threshold", "0"]

    done = run(*words, "--text", "red bus", "--text", "person:pedestrian")

    summary = json.loads(done.stdout)
    assert summary["assets"] == {"listed": 3, "labeled": 3, "failed": 0}
    assert [(p["text"], p["label"]) for p in summary["text"]] == [("red bus", "red bus"), ("person", "pedestrian")]
    assert sum(p["masks"] for p in summary["text"]) == summary["masks"]
    assert all(p["masks"] > 3 for p in summary["text"])
    coco = COCO(tmp_path / "out" / "coco.json")
    for annotation in coco.anns.values():
        prompt = annotation["prompt"]
        assert coco.cats[annotation["category_id"]]["name"] == prompt["label"]
        assert (prompt["index"], prompt["text"], prompt["label"]) in (
            (0, "red bus", "red bus"),
            (1, "person", "pedestrian"),
        )
        x0, y0, x1, y1 = (round(v) for v in prompt["box_xyxy"])
        assert coco.annToMask(annotation)[y0:y1, x0:x1].all()
        assert coco.annToMask(annotation).sum() == (y1 - y0) * (x1 - x0)
    assert "person as pedestrian" in done.stderr

    lines = {
        "side.jpg": [{"text": "car"}, {"box_xyxy": [1, 2, 30, 40], "label": "place"}],
        "two.png": [{"text": "a" * 99}],
        "dark.png": [{"text": "b" * 99}, {"box_xyxy": [5, 5, 15, 15]}],
    }
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"key": key, "prompts": prompts}) for key, prompts in lines.items()))
    mixed = json.loads(run(*words, "--prompts", file, code=1).stdout)
    [failed] = mixed["failed"]
    assert (failed["key"], failed["error_kind"]) == ("two.png", "bad_prompt")
    assert "tokens long, expected at most 16" in failed["error"]
    [unused] = mixed["prompts"]["unused_first"]
    assert unused["key"] == "dark.png"
    assert unused["error"].startswith("1 of 2 prompts cannot be used: prompt 0: text: 'bbb")
    assert mixed["detector"]["found"].keys() == {"car"}
    assert mixed["masks"] == mixed["detector"]["found"]["car"] + 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", "bus"], "stub takes no text: choose a model that does"),
        (["--text", "bus", "--prompts", "p.jsonl"], "a prompt line of the file may hold a text"),
        (["--text", "bus", "--detector", "d.onnx"], "text needs a detector that takes phrases"),
        (["--text", "a:b:c"], "expected a phrase, or phrase:label"),
    ],
)
def test_wrong_usage_of_text_is_said_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    write_colour_detector(tmp_path / "d.onnx", classes="\n".join(CLASSES))
    done = run(".", "--out", "out", "--model", "stub", *words, code=2, cwd=tmp_path)
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / ".maskfleet" / "postgres").exists()
