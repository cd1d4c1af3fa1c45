"""Symptoms that users of other tools reported, as small inputs with their right answers: what prompt files mean."""

from __future__ import annotations

import json
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from orchestrator.jobs.listing import select
from orchestrator.prompts.detectors import read_detector
from orchestrator.prompts.files import PromptFile, read_prompts
from orchestrator.prompts.key_matching import Matched, match
from tests.deployment import MASKFLEET, Deployment
from tests.e2e.test_run import run
from workers.models.registry import find_model
from workers.prompts import fit_all
from workers.storage.source import open_source

SIZE_WH = (160, 120)
BOX = (30, 25, 80, 75)  # the red rectangle of every picture
Asked = dict[str, list[tuple[str | None, tuple[int, ...], float | None]]]


@pytest.fixture
def reports(testdata: Path) -> Path:
    return testdata / "reports"


def read(prompts: Path, source: Path) -> PromptFile:
    return read_prompts(str(prompts), source=str(source), spec=find_model("sam_vit_b"), s3_endpoint=None)


def ask(prompts: Path, source: Path) -> tuple[Asked, PromptFile, Matched]:
    """What each asset of a source is asked: label, box in whole pixels, score."""
    found = read(prompts, source)
    pages = select(open_source(str(source)), asked={}, after=None, found=0)
    keys = [asset.key for page in pages for asset in page.assets]
    stored: dict[str, list[Any]] = {}
    for key, text in found.rows():
        stored.setdefault(key, []).extend(json.loads(text))
    asked: Asked = {key: [] for key in keys}
    with match(stored, enumerate(keys), source=str(source)) as matching, found.stored:
        for pair in matching.pairs():
            usable, wrong = fit_all(stored[pair.key], SIZE_WH)
            assert wrong == []
            for prompt in usable.values():
                box = tuple(round(value) for value in prompt.box_xyxy or ())
                asked[keys[pair.asset]].append((prompt.label, box, prompt.score))
        return asked, found, matching.report()


@pytest.mark.parametrize(
    ("case", "prompts", "source", "expected"),
    [
        ("04-yolo-segment-line-with-confidence", "labels", "images", {"a.png": [("car", BOX, 0.87)]}),
        (
            "05-yolo-track-lines-with-id",
            "labels",
            "images",
            {"a.png": [("car", BOX, None)], "b.png": [("car", BOX, 0.62)]},
        ),
        ("06-yolo-pose-lines", "labels", "images", {"a.png": [("person", BOX, None)]}),
        (
            "08-cvat-yolo-1.1-layout",
            "labels",
            "images",
            {"f0.png": [("car", BOX, None)], "f1.png": [("dog", BOX, None)]},
        ),
        ("09-ultralytics-archive-with-lists", "ds", "ds", {"images/train/f0.png": [("car", BOX, None)]}),
        (
            "10-yolo-class-named-no",
            "labels",
            "images",
            {"a.png": [("no", BOX, None), ("yes", (95, 40, 145, 100), None)]},
        ),
        (
            "01-detections-image-number-zero",
            "predictions.json",
            "images",
            {"000000.png": [("1", BOX, 0.9)], "000001.png": [("1", BOX, 0.9)]},
        ),
        (
            "02-detections-stem-with-dots",
            "predictions.json",
            "images",
            {"lot_jpg.rf.0a1b2c3d.jpg": [("1", BOX, 0.9)]},
        ),
        (
            "15-coco-backslash-and-export-prefix",
            "coco.json",
            "images",
            {name: [("car", BOX, None)] for name in ("a.png", "sub/b.png", "sub/c.png")},
        ),
        (
            "16-coco-polygon-without-bbox",
            "coco.json",
            "images",
            {name: [("car", BOX, None)] for name in ("a.png", "b.png", "c.png")},
        ),
        ("33-json-array-of-our-own-lines", "prompts.json", "images", {"a.png": [("car", BOX, None)]}),
    ],
)
def test_every_object_is_asked_for_where_the_file_has_it(
    reports: Path, case: str, prompts: str, source: str, expected: Asked
) -> None:
    asked, found, matched = ask(reports / case / prompts, reports / case / source)

    assert asked == expected
    assert (found.bad_count, matched.unmatched, matched.several) == (0, 0, 0)


def test_lists_and_prose_beside_labels_are_passed_over_by_name(reports: Path) -> None:
    found = read(reports / "09-ultralytics-archive-with-lists" / "ds", Path("/anywhere"))
    found.stored.close()
    assert found.passed_over == ("README.dataset.txt", "train.txt")


def test_a_composed_name_means_the_file_whose_name_is_decomposed(reports: Path, tmp_path: Path) -> None:
    name = unicodedata.normalize("NFD", "müllé.png")
    (tmp_path / name).touch()
    asked, _, matched = ask(reports / "24-nfd-file-nfc-prompt" / "prompts.jsonl", tmp_path)
    assert asked == {name: [("car", BOX, None)]}
    assert matched.by_rule == {"other spelling": 1}


@pytest.mark.parametrize(
    ("file", "reported"),
    [
        ("list-category.json", "annotation 2: category_id [1, 2], expected one number"),
        ("list-image-id.json", "annotation 2: image_id [1] has no file_name"),
        ("list-id-of-image.json", "image 2: id [2], expected one number"),
    ],
)
def test_a_list_for_an_id_is_reported_by_its_entry_and_nothing_else_is_lost(
    reports: Path, file: str, reported: str
) -> None:
    case = reports / "31-coco-list-category-and-list-image-id"
    found = read(case / file, case / "images")
    rows = [(key, json.loads(text)[0]) for key, text in found.rows()]
    found.stored.close()
    assert found.bad_count == 1
    assert reported in found.bad[0]
    assert rows[0][0] == "a.png"
    assert rows[0][1]["box_xyxy"] == list(BOX)


def test_an_onnx_detectors_names_keep_their_numbers(reports: Path) -> None:
    case = reports / "48-classes-file-with-an-empty-line"
    classes = {path.stem: read_names(path) for path in sorted(case.glob("*.onnx"))}
    assert classes["colours"] == ("blue", "class 1", "red")
    assert classes["crlf"] == ("blue", "green", "red")
    assert classes["meta"][1:] == ("class 1", "red")
    assert classes["meta2"] == ('it\'s "blue"', "gr,een", "rød")
    asked = read_detector(str(case / "crlf.onnx"), label_map=case / "map.yaml")
    assert asked.label_map == {"blue": "Bläu", "green": None}


def read_names(path: Path) -> tuple[str, ...]:
    from workers.detectors.files import examine

    return examine(str(path)).classes


@pytest.mark.integration
def test_a_number_that_means_several_pictures_is_said(reports: Path, tmp_path: Path) -> None:
    case = reports / "34-same-number-in-two-folders"
    words = [case / "images", "--model", "stub", "--prompts", case / "predictions.json", "--out", tmp_path / "out"]
    said = "keys of several assets: 1: 1 means left/0001.png, right/0001.png"

    assert said in " ".join(run(*words, "--dry-run").stderr.split())
    done = run(*words, "--devices", "cpu", "--json")

    assert said in " ".join(done.stderr.split())
    prompts = json.loads(done.stdout)["prompts"]
    assert (prompts["several"], prompts["by_rule"]) == (1, {"number": 1})
    assert prompts["several_first"] == [{"key": "1", "assets": ["left/0001.png", "right/0001.png"]}]


@pytest.mark.integration
def test_a_folder_of_links_out_of_it_is_no_success(reports: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    (source / "a.png").symlink_to(reports / "25-photos-that-are-links" / "store" / "ab" / "cd1.png")
    (source / "b.png").symlink_to("../not/fetched")
    words = [source, "--model", "stub", "--out", tmp_path / "out"]

    for more in (["--dry-run"], ["--devices", "cpu"]):
        said = " ".join(run(*words, *more, code=1).stderr.split())
        assert "no asset found; skipped 2 link_out_of_source" in said
        assert "give the folder that they lead to" in said


@pytest.mark.integration
def test_prompts_that_mean_no_asset_are_no_success(reports: Path, tmp_path: Path) -> None:
    source = reports / "10-yolo-class-named-no" / "images"
    (tmp_path / "p.jsonl").write_text('{"key": "other.png", "prompts": [{"box_xyxy": [1, 2, 3, 4]}]}\n')
    words = [source, "--model", "stub", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out"]
    for more in (["--dry-run"], ["--devices", "cpu"]):
        said = " ".join(run(*words, *more, code=1).stderr.split())
        assert "none of the prompts' 1 keys means one of its 1 assets: other.png" in said


def say(deployment: Deployment, *words: str | Path, code: int) -> str:
    """What a command of the deployment says on stderr."""
    command = [*MASKFLEET, *map(str, words)]
    done = subprocess.run(command, env=deployment.environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return " ".join(done.stderr.split())


@pytest.mark.integration
def test_a_deployment_says_what_prompts_mean_and_that_nothing_is_no_success(
    reports: Path, tmp_path: Path, deployment: Deployment
) -> None:
    case = reports / "34-same-number-in-two-folders"
    prompts = tmp_path / "p.json"
    prompts.write_text(
        json.dumps([{"image_id": n, "bbox": [30, 25, 50, 50]} for n in (1, "gone", "images/left/0001.png")])
    )
    (tmp_path / "empty").mkdir()
    rules = "keys matched: 1 by other folders, 1 by number"

    submitted = say(deployment, "submit", case / "images", "--model", "stub", "--prompts", prompts, code=0)
    nothing = say(deployment, "submit", tmp_path / "empty", "--model", "stub", code=1)
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")
    watched = say(deployment, "watch", "1", code=0)
    watched_nothing = say(deployment, "watch", "2", code=1)
    shown = deployment.call_json("show", "1")["prompts"]
    page = " ".join(deployment.call("show", "1").split())

    for said in (submitted, watched):
        assert rules in said
        assert "keys not in the job: 1: gone" in said
        assert "keys of several assets: 1: 1 means left/0001.png, right/0001.png" in said
    assert "no asset found" in nothing
    assert "no asset found" in watched_nothing
    assert (shown["by_rule"], shown["unmatched"], shown["several"]) == ({"other folders": 1, "number": 1}, 1, 1)
    assert "1 by other folders, 1 by number" in page
    assert "1 means left/0001.png, right/0001.png" in page
