"""A reviewer's clicks, from photos to numbers: `run`, `assist`, `publish`, a real Label Studio in Chromium, `review`.

Everything is a command that the README shows, typed for a folder on one machine. MASKFLEET_SCREENSHOTS names a folder
that keeps what the browser showed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from db.session import open_engine
from orchestrator.assist.ahead import next_tasks
from orchestrator.assist.health import backend_faults, kept_embeddings
from orchestrator.label_studio.backend import BackendError, Service, register
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.drawn import mask_from_region
from orchestrator.label_studio.setup import SAMPLING, Wanted, set_up_project
from orchestrator.local.folder import folder_database
from tests.label_studio.browser import Browser
from tests.label_studio.editor import ALT, CONTROL, Editor
from tests.label_studio.server import Server, serve
from tests.label_studio.test_browser import Place, browser, keep, log_in, open_task, submit
from tests.pixels import decode_counts
from tests.waiting import wait_for
from workers.masks import BoolMask
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.training.scenes import draw_scene

pytestmark = [pytest.mark.label_studio, pytest.mark.usefixtures("logged_in")]

MASKFLEET = [sys.executable, "-P", "-m", "orchestrator.cli"]
PASSWORD = "only-on-loopback-1"
SHOWN = 3  # masks of a published task; the others can only be picked
SCENE_HW = (480, 640)
__all__ = ["browser"]


@dataclass(frozen=True, kw_only=True)
class Review:
    """A folder that was run and published, and its project."""

    server: Server
    client: LabelStudio
    out: Path
    project_id: int
    tasks: dict[str, int]
    masks: dict[str, list[dict[str, Any]]]

    def call(self, *words: str | Path, code: int = 0) -> str:
        done = subprocess.run(
            [*MASKFLEET, *map(str, words)],
            env=environment(self.server),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("review", self.out, "--project", str(self.project_id), "--json"))
        return found


def environment(server: Server) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    return {
        **kept,
        "MASKFLEET_LABEL_STUDIO_URL": server.url,
        "MASKFLEET_LABEL_STUDIO_API_KEY": server.token,
        "MASKFLEET_ASSIST_PASSWORD": PASSWORD,
    }


@contextmanager
def assisting(server: Server, log: Path, *words: str | Path) -> Iterator[str]:
    """`maskfleet assist` at a free port, until the end. Yields its address."""
    with log.open("wb") as said:
        command = [*MASKFLEET, "assist", *map(str, words), "--port", "0"]
        process = subprocess.Popen(command, env=environment(server), stdout=said, stderr=said)

    def address() -> str | None:
        assert process.poll() is None, log.read_text()
        lines = [line for line in log.read_text().splitlines() if "assist answers at " in line]
        return lines[0].partition("answers at ")[2].split()[0] if lines else None

    try:
        yield wait_for(address, "the assist service")
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture(scope="module")
def server(installed_label_studio: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Label Studio that may call addresses of this machine."""
    with serve(tmp_path_factory.mktemp("assist-ls"), ML_BLOCK_LOCAL_IP="false") as started:
        yield started


@pytest.fixture(scope="module")
def logged_in(browser: Browser, server: Server) -> None:
    log_in(browser, server)


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model(find_model("sam_nano"), "cpu")


@pytest.fixture(scope="module")
def review(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Review]:
    with reviewing(server, tmp_path_factory.mktemp("assist"), ("asked.png", "refined.png", "left.png")) as made:
        yield made


@contextmanager
def reviewing(server: Server, folder: Path, names: Sequence[str]) -> Iterator[Review]:
    """Drawn scenes of these names: run with their embeddings, assisted, published. folder: for what `run` writes."""
    with LabelStudio(server.url, server.token) as client:
        yield from _reviewing(server, client, folder / "out", names)


def _reviewing(server: Server, client: LabelStudio, out: Path, names: Sequence[str]) -> Iterator[Review]:
    photos = server.files / "scenes"
    photos.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(draw_scene(90_000_000_000_000 + number, SCENE_HW).image).save(photos / name)
    made = Review(server=server, client=client, out=out, project_id=0, tasks={}, masks={})
    made.call("run", "--devices", "cpu", photos, "--out", out, "--model", "sam_nano", "--keep-embeddings", "all")
    setup = ["label-studio", "setup", "--job", out, "--local-files"]
    project_id = int(made.call(*setup, "--title", "assisted"))
    published = ["publish", out, "--project", str(project_id), "--max-masks", str(SHOWN)]
    made.call(*published, "--local-files", server.files)
    with assisting(server, out / "assist.log", out, "--project", str(project_id)) as url:
        made.call("label-studio", "setup", "--project", str(project_id), "--assist", url)
        cores = len(os.sched_getaffinity(0))
        wait_for(lambda: decoders(url) == cores, "the decoders with their models", seconds=300)
        yield Review(
            server=server,
            client=client,
            out=out,
            project_id=project_id,
            tasks={t["data"]["image"].rpartition("/")[2]: t["id"] for t in client.list_tasks(project_id)},
            masks=masks_of(out),
        )


def decoders(url: str) -> int:
    return int(httpx.get(f"{url}/health", auth=("maskfleet", PASSWORD), timeout=120).json()["decoders"])


def masks_of(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The masks of each image, in the model's order: their pixels and the number of their row."""
    coco = json.loads((out / "coco.json").read_text())
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for annotation in coco["annotations"]:
        masks = found[names[annotation["image_id"]]]
        masks.append({"n": len(masks), "pixels": decode_counts(annotation["segmentation"]["counts"], SCENE_HW)})
    return found


def iou(a: BoolMask, b: BoolMask) -> float:
    return float((a & b).sum() / (a | b).sum())


def middle(pixels: BoolMask) -> tuple[int, int]:
    """x and y of the pixel of a mask that is farthest from its border."""
    import cv2

    padded = np.pad(pixels.astype(np.uint8), 1)
    y, x = np.unravel_index(cv2.distanceTransform(padded, cv2.DIST_L2, 5).argmax(), padded.shape)
    return int(x) - 1, int(y) - 1


def at(place: Place, x: float, y: float) -> tuple[float, float]:
    """A pixel of the photo in the window."""
    return place.window((100 * (x + 0.5) / SCENE_HW[1], 100 * (y + 0.5) / SCENE_HW[0]))


def pixels_of(annotation: dict[str, Any], own: str) -> BoolMask:
    parts = [r for r in annotation["result"] if r["id"] == own or r.get("parentID") == own]
    regions = [part for part in parts if part["type"] != "labels"]
    found: BoolMask = np.any([mask_from_region(region) for region in regions], axis=0)
    return found


def shown_ids(review: Review, name: str) -> list[str]:
    (prediction,) = review.client.get_task(review.tasks[name])["predictions"]
    return [region["id"] for region in prediction["result"] if "parentID" not in region]


def test_the_next_tasks_are_those_that_nobody_annotated_in_the_order_of_the_label_stream(review: Review) -> None:
    tasks = {task["id"]: task for task in review.client.list_tasks(review.project_id, whole=True)}
    waiting = [task for task in tasks.values() if not task["annotations"]]
    by_number = sorted(waiting, key=lambda task: task["id"])
    by_score = sorted(waiting, key=lambda task: (task["predictions"][0]["score"], task["id"]))

    review.client.update_project(review.project_id, sampling="Sequential sampling")
    assert next_tasks(review.client, review.project_id, 10) == [task["data"]["asset_id"] for task in by_number]
    review.client.update_project(review.project_id, sampling=SAMPLING)
    assert next_tasks(review.client, review.project_id, 10) == [task["data"]["asset_id"] for task in by_score]
    assert next_tasks(review.client, review.project_id, 1) == [task["data"]["asset_id"] for task in by_score[:1]]


def test_points_boxes_and_picks_are_answered_accepted_and_counted(
    review: Review, nano: Model, browser: Browser
) -> None:
    name = "asked.png"
    image = np.asarray(Image.open(review.server.files / "scenes" / name).convert("RGB"))
    (embedding,) = nano.embed([image])

    def expected(prompt: Prompt) -> BoolMask:
        ((mask,),) = nano.prompted(image, embedding, [prompt], PromptParams())
        return decode_counts(mask.counts, SCENE_HW)

    shown = shown_ids(review, name)
    hidden = [mask for mask in review.masks[name] if not any(own.endswith(f"-{mask['n']}") for own in shown)]
    assert len(hidden) >= 3, "the scene has too few masks for this test"
    place = open_task(browser, review.server, review.project_id, review.tasks[name], len(regions(review, name)))
    editor = Editor(browser=browser)
    editor.use_auto_annotation()

    # A point, then a point outside: both reach the decoder, and the second answer takes the place of the first.
    x, y = middle(hidden[0]["pixels"])
    editor.choose_tool("click")
    editor.choose_label("1", "object")
    first, *_ = editor.prompt(at(place, x, y))
    editor.choose_label("1", "object")
    second, *_ = editor.prompt(at(place, 3, 3), held=(ALT,))
    assert first.startswith("assist-")
    assert second != first
    keep(browser, "assist-points")
    editor.accept()
    by_points = Prompt(points=((x + 0.5, y + 0.5, 1), (3.5, 3.5, 0)))

    # A box, then a point outside: the service remembers the box.
    rows, columns = np.nonzero(hidden[1]["pixels"])
    box = (columns.min() - 3, rows.min() - 3, columns.max() + 3, rows.max() + 3)
    editor.choose_tool("box")
    editor.choose_label("1", "object")
    editor.prompt(at(place, *box[:2]), at(place, box[0] + 9, box[1] + 9), at(place, *box[2:]))
    editor.choose_tool("click")
    editor.choose_label("1", "object")
    boxed, *_ = editor.prompt(at(place, 3, 3), held=(ALT,))
    keep(browser, "assist-box")
    editor.accept()

    # Two picks far apart inside a mask that was not shown: exactly that mask.
    wanted = hidden[2]
    rows, columns = np.nonzero(wanted["pixels"])
    editor.choose_tool("pick")
    editor.choose_label("1", "object")
    editor.prompt(at(place, columns[0] + 2, rows[0]))
    editor.choose_label("1", "object")
    picked, *_ = editor.prompt(at(place, columns[-1] - 2, rows[-1]))
    keep(browser, "assist-pick")
    editor.accept()
    assert picked.endswith(f"-{wanted['n']}")
    assert {second, boxed, picked} <= set(editor.regions())

    annotation = submit(browser, review.client, review.tasks[name])
    assert iou(pixels_of(annotation, second), expected(by_points)) > 0.9
    assert iou(pixels_of(annotation, picked), wanted["pixels"]) > 0.95
    assert pixels_of(annotation, boxed).any()
    numbers = review.numbers()
    assert (numbers["masks"]["kept"], numbers["masks"]["added"], numbers["masks"]["deleted"]) == (SHOWN + 1, 2, 0)
    assert numbers["assets"]["unreadable_regions"] == 0
    (clicks,) = numbers["clicks"]
    assert (clicks["label"], clicks["objects"], clicks["clicks"], clicks["accepted"]) == ("object", 3, 6, 3)
    assert clicks["by_decoder"] == 4


def regions(review: Review, name: str) -> list[dict[str, Any]]:
    (prediction,) = review.client.get_task(review.tasks[name])["predictions"]
    found: list[dict[str, Any]] = prediction["result"]
    return found


def test_a_published_mask_is_refined_and_review_calls_it_edited(review: Review, browser: Browser) -> None:
    name = "refined.png"
    own = shown_ids(review, name)[0]
    n = int(own.rpartition("-")[2])
    pixels = review.masks[name][n]["pixels"]
    place = open_task(browser, review.server, review.project_id, review.tasks[name], len(regions(review, name)))
    editor = Editor(browser=browser)
    editor.use_auto_annotation()
    before = editor.regions()

    # Alt alone on a shown mask takes a part away; the answer has the mask's own id.
    x, y = middle(pixels)
    editor.choose_tool("click")
    editor.choose_label("1", "object")
    suggested = editor.prompt(at(place, x, y), held=(ALT, CONTROL))
    keep(browser, "assist-refine")
    assert suggested[0] == own
    editor.accept()
    assert sorted(set(editor.regions())) == sorted(set(before))

    annotation = submit(browser, review.client, review.tasks[name])
    assert iou(pixels_of(annotation, own), pixels) < 1
    numbers = review.numbers()
    assert numbers["masks"]["edited"] == 1
    assert 0 < numbers["masks"]["mean_iou_edited"] < 1


def test_prompts_that_stay_in_an_annotation_are_neither_masks_nor_unreadable(review: Review, browser: Browser) -> None:
    """Accept with the tick on the region itself, which leaves the prompts, and submit."""
    name = "left.png"
    place = open_task(browser, review.server, review.project_id, review.tasks[name], len(regions(review, name)))
    editor = Editor(browser=browser)
    editor.use_auto_annotation()
    before = review.numbers()["masks"]
    editor.choose_tool("box")
    editor.choose_label("1", "object")
    editor.prompt(at(place, 20, 20), at(place, 40, 40), at(place, 100, 100))
    editor.tick()
    annotation = submit(browser, review.client, review.tasks[name])

    assert any(region["from_name"] == "box" for region in annotation["result"])
    after = review.numbers()
    assert after["masks"]["added"] == before["added"] + 1
    assert after["masks"]["kept"] == before["kept"] + SHOWN
    assert after["assets"]["unreadable_regions"] == 0


def test_a_task_without_predictions_that_is_opened_twice_gets_none(review: Review, browser: Browser) -> None:
    shutil.copy(review.server.files / "scenes" / "left.png", review.server.files / "scenes" / "other.png")
    data = {"image": "/data/local-files/?d=scenes/other.png", "asset_id": "nobody", "width": 640, "height": 480}
    imported = review.client.import_tasks(review.project_id, json.dumps([{"data": data}]).encode())
    version = review.client.get_project(review.project_id).model_version
    for _ in range(2):
        open_task(browser, review.server, review.project_id, imported.task_ids[0], 0)

    assert review.client.get_task(imported.task_ids[0])["predictions"] == []
    assert review.client.get_project(review.project_id).model_version == version
    review.client.delete_task(imported.task_ids[0])


def test_doctor_says_whether_reviewers_get_masks(review: Review) -> None:
    assert backend_faults(review.client, review.project_id) == []
    (registered,) = review.client.list_backends(review.project_id)
    other = review.client.create_project(title="not assisted", label_config="<View></View>")
    assert backend_faults(review.client, other.id) == [
        f"project {other.id} has no 'maskfleet assist' among its backends"
    ]
    with folder_database(review.out) as url:
        engine = open_engine(url)
        assert re.match(r"\d embeddings, \d MB", kept_embeddings(engine))  # annotated tasks need none
        engine.dispose()
    assert registered["is_interactive"]


def service_at(url: str) -> Service:
    return Service(url=url, user="maskfleet", password=PASSWORD)


def test_registering_twice_is_once_and_a_wrong_password_is_named(review: Review) -> None:
    (registered,) = review.client.list_backends(review.project_id)
    service = service_at(registered["url"])

    done = set_up_project(review.client, review.client.get_project(review.project_id), Wanted(assist=service)).done
    assert [line for line in done if "backend" in line] == [f"checked backend {registered['id']}"]
    assert len(review.client.list_backends(review.project_id)) == 1
    wrong = Service(url=registered["url"], user="maskfleet", password="not-the-right-one")
    with pytest.raises(BackendError, match="the same MASKFLEET_ASSIST_USER and MASKFLEET_ASSIST_PASSWORD"):
        register(review.client, review.project_id, wrong)


def test_a_service_that_does_not_run_is_named_and_nothing_is_registered(review: Review) -> None:
    project = review.client.create_project(title="nobody there", label_config="<View></View>")
    with pytest.raises(BackendError, match="is `maskfleet assist` running"):
        register(review.client, project.id, service_at("http://127.0.0.1:9"))
    assert review.client.list_backends(project.id) == []


def test_a_label_studio_that_calls_no_private_address_names_its_switch(review: Review, label_studio: Server) -> None:
    (registered,) = review.client.list_backends(review.project_id)
    with LabelStudio(label_studio.url, label_studio.token) as client:
        project = client.create_project(title="closed", label_config="<View></View>")
        with pytest.raises(BackendError, match="ML_BLOCK_LOCAL_IP=false"):
            register(client, project.id, service_at(registered["url"]))
        assert client.list_backends(project.id) == []


def test_a_label_studio_without_any_protection_registers_too(
    review: Review, installed_label_studio: None, tmp_path: Path
) -> None:
    (registered,) = review.client.list_backends(review.project_id)
    with (
        serve(tmp_path / "open", ML_BLOCK_LOCAL_IP="false", SSRF_PROTECTION_ENABLED="false") as server,
        LabelStudio(server.url, server.token) as client,
    ):
        project = client.create_project(title="open", label_config="<View></View>")
        assert "registered" in register(client, project.id, service_at(registered["url"]))
        assert [backend["url"] for backend in client.list_backends(project.id)] == [registered["url"]]
