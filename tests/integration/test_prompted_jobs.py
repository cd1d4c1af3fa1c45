"""Jobs with prompts through the real `maskfleet run`, with sam_nano: the masks, their places, and the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.e2e.test_run import run
from workers.models.files import is_present
from workers.models.registry import find_model
from workers.training.scenes import Scene, draw_scene

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_present(find_model("sam_nano")), reason="sam_nano's weights are not here"),
]


def box_of(mask: np.ndarray) -> list[int]:
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    return [x, y, x + w, y + h]


def draw(folder: Path) -> dict[str, Scene]:
    """Three scenes that are not square. One is stored rotated; its EXIF tag makes it upright."""
    folder.mkdir(parents=True)
    scenes = {
        name: draw_scene(77_000_000_000_000 + n, (240, 320)) for n, name in enumerate(("a.png", "b.jpg", "c.png"))
    }
    for name, scene in scenes.items():
        image, exif = Image.fromarray(scene.image), Image.Exif()
        if name == "b.jpg":
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / name, exif=exif, quality=95)
    return scenes


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_a_prompt_files_masks_lie_where_it_says_and_all_else_is_reported(tmp_path: Path) -> None:
    scenes = draw(tmp_path / "images")
    (tmp_path / "images" / "d.png").write_bytes(b"not fetched, so nobody knows that this is no picture")
    asked: dict[str, list[dict[str, Any]]] = {
        name: [{"label": f"object {n}", "box_xyxy": box_of(mask)} for n, mask in enumerate(scenes[name].masks)]
        for name in ("a.png", "b.jpg")
    }
    asked["a.png"].append({"box_xyxy": [900, 900, 950, 950]})
    asked["c.png"] = [{"box_xyxy": [9, 9, 1, 1]}]
    asked["gone.png"] = [{"box_xyxy": [1, 1, 9, 9]}]
    lines = [json.dumps({"key": key, "prompts": prompts}) for key, prompts in asked.items()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join([*lines, "{broken"]) + "\n")

    words = [tmp_path / "images", "--out", tmp_path / "out", "--model", "sam_nano", "--devices", "cpu", "--json"]
    done = run(*words, "--prompts", prompts, code=1)

    summary = json.loads(done.stdout)
    assert summary["assets"] == {"listed": 4, "labeled": 3, "failed": 1}
    assert summary["without_prompts"] == 1
    [failed] = summary["failed"]
    assert (failed["key"], failed["error_kind"]) == ("c.png", "bad_prompt")
    assert "prompts.jsonl:3: box_xyxy: [9, 9, 1, 1] is inverted" in failed["error"]
    assert (summary["prompts"]["unmatched"], summary["prompts"]["unmatched_first"]) == (1, ["gone.png"])
    [unused] = summary["prompts"]["unused_first"]
    assert unused["key"] == "a.png"
    assert "lies outside the image of 320 x 240 pixels" in unused["error"]
    assert "prompts.jsonl:5: not JSON" in done.stderr

    coco = COCO(tmp_path / "out" / "coco.json")
    keys = {image["id"]: image["file_name"] for image in coco.imgs.values()}
    assert sorted(keys.values()) == ["a.png", "b.jpg"]
    ious = []
    for annotation in coco.anns.values():
        key, index = keys[annotation["image_id"]], annotation["prompt"]["index"]
        assert annotation["prompt"]["box_xyxy"] == asked[key][index]["box_xyxy"]
        assert coco.cats[annotation["category_id"]]["name"] == f"object {index}"
        ious.append(iou(coco.annToMask(annotation).astype(bool), scenes[key].masks[index]))
    assert len(ious) == sum(len(scenes[name].masks) for name in ("a.png", "b.jpg"))
    assert np.mean(ious) > 0.85

    # Our own export as a prompt file gives the boxes of its masks. For them sam_nano finds nearly the same masks.
    again = json.loads(
        run(*words[:2], tmp_path / "again", *words[3:], "--prompts", tmp_path / "out" / "coco.json").stdout
    )
    assert again["prompts"]["format"] == "coco-instances"
    assert again["masks"] == len(ious)
    boxes = {tuple(a["bbox"]) for a in coco.anns.values()}
    for annotation in COCO(tmp_path / "again" / "coco.json").anns.values():
        x0, y0, x1, y1 = annotation["prompt"]["box_xyxy"]
        assert (x0, y0, x1 - x0, y1 - y0) in boxes


@pytest.mark.parametrize(
    ("line", "words", "said"),
    [
        ('{"key": "a.png", "prompts": [{"text": "bus"}]}', [], "p.jsonl:1: a prompt by text, expected box or points"),
        ("nothing", [], "no usable prompt"),
        (
            '{"key": "a.png", "prompts": [{"points": [[1, 1, 1]]}]}',
            ["--param", "points_per_side=3"],
            "known: multimask",
        ),
    ],
)
def test_wrong_usage_is_said_before_any_asset_is_touched(
    tmp_path: Path, line: str, words: list[str], said: str
) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    done = run(".", "--model", "sam_nano", "--prompts", tmp_path / "p.jsonl", *words, "--out", tmp_path / "o", code=2)
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "o" / ".maskfleet" / "postgres").exists()
