"""What people do in a real Label Studio is what `review` reports, and what `export --reviewed` writes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pycocotools.coco import COCO
from sqlalchemy import Engine, text

from db.publishing import LsProject
from db.results import StoredMask
from orchestrator.export.label_studio import export_label_studio
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.drawn import mask_from_region
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import publish_job
from orchestrator.label_studio.review import pull
from orchestrator.label_studio.review_numbers import Review, read_review
from orchestrator.label_studio.wake import SECRET_HEADER
from orchestrator.prompts.files import read_prompts
from tests.json_page import documented_keys
from tests.label_studio.reviewing import BLOCK, RING, SIZE_HW, TWO_PARTS, Project, labeled_job, publish, stored
from tests.label_studio.server import Server
from tests.redis_server import free_port
from workers.models.registry import find_model

pytestmark = pytest.mark.label_studio

KEYS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "none.jpg"]


def masks(key: str, asset_id: int) -> Sequence[StoredMask]:
    if key == "none.jpg":
        return []
    scores = [0.97, 0.88, 0.6] if key != "b.jpg" else [0.96, 0.87, 0.55]
    return stored(asset_id, [RING, TWO_PARTS, BLOCK], scores=scores, labels=["ring", "pair", None])


def review(engine: Engine, project: Project, job: Any) -> Review:
    pull(engine, project.client, project.id)
    return read_review(engine, job, LsProject(project.client.url, project.id))


def moved(region: dict[str, Any], percent: float) -> dict[str, Any]:
    changed = copy.deepcopy(region)
    changed["value"]["points"] = [[min(x + percent, 100), y] for x, y in region["value"]["points"]]
    return {**changed, "origin": "prediction-changed"}


def drawn(region_id: str, label: str = "ring") -> dict[str, Any]:
    points = [[70, 60], [90, 60], [90, 80], [70, 80]]
    return {
        "id": region_id,
        "type": "polygonlabels",
        "from_name": "polygon",
        "to_name": "image",
        "original_width": SIZE_HW[1],
        "original_height": SIZE_HW[0],
        "image_rotation": 0,
        "value": {"points": points, "closed": True, "polygonlabels": [label]},
        "origin": "manual",
    }


def prediction(task: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = task["predictions"][0]["result"]
    return found


def test_review_reports_what_people_did(engine: Engine, client: LabelStudio, label_studio: Server) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()

    # a: untouched. b: the block's vertex moved, the ring gone, one drawn. c: a part of the pair gone. d: skipped.
    project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]), seconds=4)
    regions = prediction(tasks["b.jpg"])
    block = next(r for r in regions if r["id"].endswith("-2"))
    others = [r for r in regions if r["id"].partition("-p")[0].endswith("-1")]
    project.submit(tasks["b.jpg"], [moved(block, 5), *others, drawn("xYz12")], seconds=20)
    without_part = [region for region in prediction(tasks["c.jpg"]) if "-p1" not in region["id"]]
    project.submit(tasks["c.jpg"], without_part, seconds=6)
    project.submit(tasks["d.jpg"], [], skip=True, seconds=2)
    found = review(engine, project, job)

    assert found.assets.published == 6
    assert (found.assets.untouched, found.assets.corrected) == (1, 2)
    assert (found.assets.skipped, found.assets.waiting, found.assets.elsewhere) == (1, 2, 0)
    assert (found.masks.kept, found.masks.edited, found.masks.deleted, found.masks.added) == (6, 2, 1, 1)
    assert found.by_label["ring"].deleted == 1
    assert found.by_label["object"].edited == found.by_label["pair"].edited == 1
    assert found.by_band[19].kept == 2
    assert sum(numbers.added for numbers in found.by_band.values()) == 0
    assert sum(numbers.predicted for numbers in found.by_band.values()) == 9
    assert found.timed_tasks == 3
    assert found.seconds_total == 30
    assert found.masks.mean_iou is not None
    assert 0.5 < found.masks.mean_iou < 0.95
    assert [asset.key for asset in found.worst] == ["b.jpg", "c.jpg"]


def test_what_was_annotated_while_its_prediction_was_sending_is_read_when_that_is_known(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()
    with engine.begin() as db:  # as a publisher leaves it that died before the answer came
        db.execute(text("UPDATE ls_prediction SET state = 'sending'"))
        db.execute(text("UPDATE ls_task SET task_id = NULL"))
    project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]))
    project.submit(tasks["b.jpg"], [], skip=True)

    assert pull(engine, client, project.id) == 0
    publish_job(engine, client, job, project.id, Options())
    project.submit(tasks["c.jpg"], prediction(tasks["c.jpg"]))
    with engine.begin() as db:  # long after
        db.execute(text("UPDATE ls_pull SET watermark = watermark + interval '5 minutes'"))
    found = review(engine, project, job)

    assert (found.assets.untouched, found.assets.skipped, found.assets.waiting) == (1, 1, 4)
    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM ls_unjudged")).scalar_one() == 0


def test_an_annotation_of_a_second_version_that_is_still_sending_is_judged_by_it_later(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    source = "s3://bucket/two-versions"
    first = labeled_job(engine, KEYS[:1], masks, source=source)
    second = labeled_job(engine, KEYS[:1], masks, source=source, model_version="stub@66666666+00000000")
    project = publish(engine, client, label_studio, first)
    publish_job(engine, client, second, project.id, Options())
    task = project.tasks()["a.jpg"]
    (newer,) = (p for p in task["predictions"] if p["model_version"] == second.model_version)
    with engine.begin() as db:
        db.execute(text("UPDATE ls_prediction SET state = 'sending' WHERE job_id = :id"), {"id": second.id})
    project.submit(task, newer["result"], parent_prediction=newer["id"])

    pull(engine, client, project.id)
    with engine.begin() as db:
        db.execute(text("UPDATE ls_prediction SET state = 'done'"))
        db.execute(text("UPDATE ls_pull SET watermark = watermark + interval '5 minutes'"))
    found = review(engine, project, second)

    assert (found.assets.untouched, found.assets.elsewhere) == (1, 0)


def test_tasks_imported_by_hand_and_annotated_before_publish_adopts_them_are_read(
    engine: Engine, client: LabelStudio, label_studio: Server, tmp_path: Path
) -> None:
    job = labeled_job(engine, KEYS, masks)
    with engine.connect() as db:
        export_label_studio(db, job, tmp_path / "tasks.json")
    made = client.create_project(title="by hand", label_config=label_config(["ring", "pair", "object"]))
    client.import_tasks(made.id, (tmp_path / "tasks.json").read_bytes())
    project = Project(id=made.id, client=client, server=label_studio)
    tasks = project.tasks()
    project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]))
    project.submit(tasks["b.jpg"], prediction(tasks["b.jpg"])[1:])

    assert pull(engine, client, project.id) == 0
    report = publish_job(engine, client, job, project.id, Options())
    with engine.begin() as db:
        db.execute(text("UPDATE ls_pull SET watermark = watermark + interval '5 minutes'"))
    found = review(engine, project, job)

    assert (report.adopted, report.created) == (6, 0)
    assert (found.assets.untouched, found.assets.corrected, found.assets.waiting) == (1, 1, 4)
    assert (found.masks.kept, found.masks.deleted, found.masks.added) == (5, 1, 0)


def test_a_second_label_counts_as_relabelled_and_attributes_as_nothing(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, KEYS[:2], masks)
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()
    regions = copy.deepcopy(prediction(tasks["a.jpg"]))
    regions[0]["value"]["polygonlabels"].append("pair")
    number = {"id": regions[0]["id"], "type": "number", "from_name": "n", "to_name": "image", "value": {"number": 3}}
    project.submit(tasks["a.jpg"], regions)
    project.submit(tasks["b.jpg"], [*prediction(tasks["b.jpg"]), number | {"original_width": SIZE_HW[1]}])

    found = review(engine, project, job)

    assert (found.assets.untouched, found.assets.corrected, found.assets.unreadable_regions) == (1, 1, 0)
    assert (found.masks.kept, found.masks.edited, found.masks.relabelled) == (5, 1, 1)


def test_the_command_prints_one_document_and_writes_a_page(
    engine: Engine, database_url: str, client: LabelStudio, label_studio: Server, tmp_path: Path
) -> None:
    job = labeled_job(engine, ["<b>.jpg", "b.jpg"], masks)
    project = publish(engine, client, label_studio, job)
    task = project.tasks()["<b>.jpg"]
    project.submit(task, [moved(prediction(task)[0], 4)])
    page = tmp_path / "review.html"

    done = run_maskfleet(
        database_url, label_studio, "review", job.id, "--project", project.id, "--json", "--html", page
    )
    shown = run_maskfleet(database_url, label_studio, "review", job.id, "--project", project.id)

    document = json.loads(done)
    assert set(document) == documented_keys("review")
    assert document["masks"]["deleted"] == 2
    assert document["assets"]["corrected"] == 1
    assert document["by_label"]["ring"]["edited"] == 1
    assert document["worst"][0]["key"] == "<b>.jpg"
    assert "&lt;b&gt;.jpg" in page.read_text()
    assert "<b>.jpg" not in page.read_text()
    assert "1 corrected" in shown


def test_a_webhook_wakes_a_review_that_follows(
    engine: Engine, database_url: str, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, ["a.jpg"], masks)
    project = publish(engine, client, label_studio, job)
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "orchestrator.cli", "review", str(job.id), "--project", str(project.id)]
    command += ["--json", "--follow", "--every", "600", "--listen", address]
    environment = maskfleet_environment(database_url, label_studio) | {"MASKFLEET_WEBHOOK_SECRET": "a secret"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            before = json.loads(process.stdout.readline())
            project.submit(project.tasks()["a.jpg"], [])
            httpx.post(f"http://{address}/", headers={SECRET_HEADER: "a secret"}, json={}, timeout=60)
            after = json.loads(process.stdout.readline())
        finally:
            process.terminate()

    assert (before["assets"]["waiting"], after["assets"]["waiting"]) == (1, 0)
    assert after["masks"]["deleted"] == 3


def maskfleet_environment(database_url: str, server: Server) -> dict[str, str]:
    return {
        **os.environ,
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": server.url,
        "MASKFLEET_LABEL_STUDIO_API_KEY": server.token,
        "COLUMNS": "200",
    }


def run_maskfleet(database_url: str, server: Server, *arguments: object) -> str:
    environment = maskfleet_environment(database_url, server)
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reviewed_export_is_what_people_left_to_the_pixel(
    engine: Engine, database_url: str, client: LabelStudio, label_studio: Server, tmp_path: Path
) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()
    changed = moved(prediction(tasks["b.jpg"])[0], 4)
    project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]))
    project.submit(tasks["b.jpg"], [changed, drawn("xYz12", "pair")])
    project.submit(tasks["c.jpg"], [])
    project.submit(tasks["d.jpg"], [], skip=True)
    run_maskfleet(database_url, label_studio, "review", job.id, "--project", project.id)

    def export(file_format: str, name: str, *more: object) -> Path:
        out = tmp_path / name
        arguments = ("export", job.id, "--reviewed", "--format", file_format, "--out", out, *more)
        run_maskfleet(database_url, label_studio, *arguments)
        return out

    coco = COCO(export("coco", "coco.json"))
    images = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    found = {
        key: {
            coco.cats[a["category_id"]]["name"]: (coco.annToMask(a).astype(bool), a["verdict"])
            for a in coco.imgToAnns[number]
        }
        for key, number in images.items()
    }

    # Untouched: the stored masks, hole and parts. Edited and drawn: what the page shows. Deleted: an image without.
    assert sorted(found) == ["a.jpg", "b.jpg", "c.jpg"]
    assert found["c.jpg"] == {}
    for label, pixels in (("ring", RING), ("pair", TWO_PARTS), ("object", BLOCK)):
        assert found["a.jpg"][label][1] == "kept"
        assert (found["a.jpg"][label][0] == pixels).all()
    assert {label: verdict for label, (_, verdict) in found["b.jpg"].items()} == {"ring": "edited", "pair": "added"}
    assert (found["b.jpg"]["ring"][0] == mask_from_region(changed)).all()
    assert (found["b.jpg"]["pair"][0] == mask_from_region(drawn(""))).all()

    # With --min-score the others come along, with their best predictions.
    more = COCO(export("coco", "more.json", "--min-score", 0.8))
    others = {image["file_name"]: len(more.imgToAnns[image["id"]]) for image in more.dataset["images"]}
    assert others == {"a.jpg": 3, "b.jpg": 2, "c.jpg": 0, "d.jpg": 2, "e.jpg": 2, "none.jpg": 0}

    # The boxes of the file are prompts again.
    prompts = read_prompts(
        str(tmp_path / "coco.json"), source=job.source, spec=find_model("sam_nano"), s3_endpoint=None
    )
    boxes = [p["box_xyxy"] for key, listed in prompts.rows() if key == "a.jpg" for p in json.loads(listed)]
    prompts.stored.close()
    stored_boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in coco.imgToAnns[images["a.jpg"]])]
    assert sorted(boxes) == sorted(stored_boxes)

    # The other formats have the same masks.
    yolo = export("yolo", "yolo")
    assert len(list(yolo.glob("segment/labels/*/*.txt"))) == len(list(yolo.glob("detect/labels/*/*.txt"))) == 3
    written = json.loads((export("png", "png") / "index.json").read_text())
    assert {entry["key"]: len(entry["masks"]) for entry in written} == {"a.jpg": 3, "b.jpg": 2, "c.jpg": 0}
    again = json.loads(export("label-studio", "tasks.json").read_text())
    assert [len(task["annotations"]) for task in again] == [1, 1, 1]
    assert "predictions" not in again[0]


def test_an_untouched_empty_task_counts_as_accepted(engine: Engine, client: LabelStudio, label_studio: Server) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)

    project.submit(project.tasks()["none.jpg"], [])

    assert review(engine, project, job).assets.untouched == 1


def test_changed_and_deleted_annotations_replace_what_was_read(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()
    first = project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]))
    second = project.submit(tasks["b.jpg"], [])
    before = review(engine, project, job)

    # Resubmitted: the same annotation, changed. Then another one by the same person, newer. Then it is deleted.
    project.update(first["id"], result=prediction(tasks["a.jpg"])[1:])
    changed = review(engine, project, job)
    newer = project.submit(tasks["a.jpg"], prediction(tasks["a.jpg"]))
    again = review(engine, project, job)
    project.delete(newer["id"])
    project.delete(second["id"])
    after = review(engine, project, job)

    assert (before.assets.untouched, before.assets.corrected, before.masks.deleted) == (1, 1, 3)
    assert (changed.assets.untouched, changed.assets.corrected, changed.masks.deleted) == (0, 2, 4)
    assert (again.assets.untouched, again.masks.deleted, again.assets.several_annotators) == (1, 3, 0)
    assert (after.assets.untouched, after.assets.corrected, after.assets.waiting) == (0, 1, 5)
    assert after.masks.deleted == 1


def test_of_several_annotators_the_newest_counts_unless_one_is_ground_truth(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, KEYS, masks)
    project = publish(engine, client, label_studio, job)
    task = project.tasks()["a.jpg"]
    theirs = project.submit(task, prediction(task), seconds=3, completed_by=project.add_person("other"))
    project.submit(task, [], seconds=5)

    newest = review(engine, project, job)
    project.update(theirs["id"], ground_truth=True)
    marked = review(engine, project, job)

    assert (newest.assets.corrected, newest.masks.deleted, newest.assets.several_annotators) == (1, 3, 1)
    assert (marked.assets.untouched, marked.masks.kept, marked.masks.deleted) == (1, 3, 0)
    assert marked.seconds_total == 8
    assert {person.submitted for person in marked.annotators} == {1}
    assert len(marked.annotators) == 2
