"""Jobs whose masks are named by a classifier, through the real `maskfleet run`: labels, scores, exports, and usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.deployment import draw_pictures
from tests.e2e.test_run import run
from tests.reviewed_job import draw_scenes

pytestmark = [pytest.mark.integration, pytest.mark.slow]

transformers = pytest.importorskip("transformers")


def test_masks_are_named_or_stay_objects_and_the_export_follows(tmp_path: Path) -> None:
    from tests.tiny_checkpoints import save_classifier

    checkpoint = save_classifier("clip", tmp_path / "clip")
    words = [draw_pictures(tmp_path / "pictures", 3), "--model", "stub", "--devices", "cpu", "--json"]
    words += ["--classify", "cat,dog,bus", "--classifier", checkpoint, "--out", tmp_path / "out"]

    summary = json.loads(run(*words, "--classify-threshold", "0").stdout)

    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    named = {category["id"]: category["name"] for category in coco["categories"]}
    assert summary["assets"]["labeled"] == 3
    assert len(coco["annotations"]) == summary["masks"] == 6
    for annotation in coco["annotations"]:
        best = annotation["prompt"]["class"]
        assert named[annotation["category_id"]] == ("object" if best == "background" else best)
        assert 0.25 <= annotation["prompt"]["score"] <= 1
        assert annotation["predicted_iou"] != annotation["prompt"]["score"]

    again = json.loads(run(*words, "--classify-threshold", "0").stdout)
    assert again["answered_from_stored"] == 3
    above = json.loads(run(*words, "--classify-threshold", "1").stdout)
    assert above["model_version"] != summary["model_version"]
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["object"]
    assert len(coco["annotations"]) == 6


def test_a_named_mask_still_says_at_which_point_it_was_found(tmp_path: Path) -> None:
    from tests.tiny_checkpoints import save_classifier

    draw_scenes(tmp_path / "scenes", 1)
    checkpoint = save_classifier("clip", tmp_path / "clip")
    words = [tmp_path / "scenes", "--model", "sam_nano", "--devices", "cpu", "--out", tmp_path / "out"]

    run(*words, "--classify", "cat,dog", "--classifier", checkpoint)

    annotations = json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"]
    assert annotations
    assert {frozenset(annotation["prompt"]) for annotation in annotations} == {frozenset(("points", "class", "score"))}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classifier", "x"], "go with --classify"),
        (["--classify", "cat"], "--classify needs --classifier"),
        (["--classify", "cat", "--classifier", "x", "--label", "dog"], "give one of them"),
        (["--classify", "cat", "--classifier", "x", "--prompts", "p.jsonl"], "bring their own labels"),
        (["--classify", "cat", "--classifier", "./gone"], "no such folder, here or in"),
    ],
)
def test_wrong_usage_of_a_classifier_is_said_before_anything_starts(
    tmp_path: Path, words: list[str], said: str
) -> None:
    done = run(".", "--out", "out", "--model", "stub", *words, code=2, cwd=tmp_path)
    assert said in " ".join(done.stderr.split())
