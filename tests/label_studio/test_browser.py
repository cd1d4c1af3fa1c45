"""What a person sees and does: a real Chromium before a real Label Studio.

MASKFLEET_SCREENSHOTS names a folder that keeps what the browser showed.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import Engine

from db.jobs import Job
from db.publishing import LsProject
from db.results import StoredMask
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.drawn import mask_from_region
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import publish_job
from orchestrator.label_studio.review import pull
from orchestrator.label_studio.review_numbers import read_review
from orchestrator.label_studio.setup import Wanted, set_up_project
from tests.label_studio.browser import Browser, NoBrowser, open_browser
from tests.label_studio.reviewing import disc, labeled_job, stored
from tests.label_studio.server import PASSWORD, USER, Server
from tests.needs import miss
from tests.waiting import wait_for
from workers.masks import BoolMask

pytestmark = pytest.mark.label_studio

LANDSCAPE, UPRIGHT = (480, 640), (640, 480)
HOLES = disc(200, 220, 150, LANDSCAPE) & ~disc(150, 200, 45, LANDSCAPE) & ~disc(250, 260, 35, LANDSCAPE)
SMALL = disc(500, 120, 80, LANDSCAPE)
# Far from the middle, so that a photo that is not turned shows it elsewhere.
TURNED = disc(120, 500, 90, UPRIGHT)
OBJECTS: dict[str, tuple[tuple[int, int], list[BoolMask]]] = {
    "holes.jpg": (LANDSCAPE, [HOLES, SMALL]),
    "turned.jpg": (UPRIGHT, [TURNED]),
    "none.jpg": (LANDSCAPE, []),
}

# Where the photo is in the window, once the task with its photo and so many regions is there and stands still.
PLACE = """
const open = window.Htx?.annotationStore?.selected, image = document.querySelector('img[alt="image"]');
if (!open || !image?.complete || !image.naturalWidth || window.Htx.task?.id !== arguments[0]) return null;
if (open.regionStore.regions.length !== arguments[1]) return null;
const box = image.getBoundingClientRect(), place = [box.left, box.top, box.width, box.height];
const still = String(window.lastPlace) === String(place);
window.lastPlace = place;
return still ? place : null;
"""
TOGGLE = "for (const region of window.Htx.annotationStore.selected.regionStore.regions) region.toggleHidden();"
SELECTED = """
const region = window.Htx.annotationStore.selected.regionStore.regions.find(r => r.cleanId === arguments[0]);
return region?.selected;
"""
# Whether the first vertex of a region is elsewhere than before, in percent of the photo, and stands still there.
MOVED = """
const region = window.Htx.annotationStore.selected.regionStore.regions.find(r => r.cleanId === arguments[0]);
const [x, y] = arguments[1], place = [region.points[0].x, region.points[0].y];
const still = String(window.lastVertex) === String(place);
window.lastVertex = place;
return still && Math.hypot(place[0] - x, place[1] - y) > 1;
"""
SUBMIT = """
const button = document.querySelector('button[aria-label="Submit current annotation"]');
button?.click();
return Boolean(button);
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the photo is in the window, in pixels."""

    left: float
    top: float
    width: float
    height: float

    def crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.int16]:
        left, top = round(self.left), round(self.top)
        return pixels[top : top + round(self.height), left : left + round(self.width)].astype(np.int16)

    def window(self, point_percent: Sequence[float]) -> tuple[float, float]:
        """A point of the photo in the window."""
        x, y = point_percent
        return self.left + x / 100 * self.width, self.top + y / 100 * self.height


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    try:
        with open_browser(folder) as opened:
            yield opened
    except NoBrowser as error:
        miss(str(error))


def photo(size_hw: tuple[int, int], objects: list[BoolMask]) -> NDArray[np.uint8]:
    """Red things on grey."""
    noise = np.random.default_rng(7).integers(90, 130, (*size_hw, 1), np.uint8)
    pixels = np.repeat(noise, 3, axis=2)
    for mask in objects:
        pixels[mask] = (210, 40, 40)
    return pixels


def write_photos(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, (size_hw, objects) in OBJECTS.items():
        pixels = photo(size_hw, objects)
        exif = Image.Exif()
        if name == "turned.jpg":
            # Orientation 6: turn clockwise to see it upright, so it is stored turned the other way.
            exif[0x0112] = 6
            pixels = np.ascontiguousarray(np.rot90(pixels))
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "jpeg", quality=95, exif=exif)
        (folder / name).write_bytes(out.getvalue())


def published(engine: Engine, client: LabelStudio, server: Server, folder: Path) -> tuple[Job, int]:
    write_photos(folder)
    job = labeled_job(
        engine,
        sorted(OBJECTS),
        masks_of,
        sizes_hw={key: size_hw for key, (size_hw, _) in OBJECTS.items()},
        source=str(folder),
    )
    project = client.create_project(title=folder.name, label_config="<View></View>")
    set_up_project(client, project, Wanted(labels=["thing"], source=job.source, local_files=True))
    publish_job(engine, client, job, project.id, Options(local_files=str(server.files)))
    return job, project.id


def masks_of(key: str, asset_id: int) -> list[StoredMask]:
    objects = OBJECTS[key][1]
    return stored(asset_id, objects, scores=[0.97, 0.91][: len(objects)], labels=["thing"] * len(objects))


def log_in(browser: Browser, server: Server) -> None:
    browser.open(f"{server.url}/user/login/")
    browser.run(
        """document.querySelector("[name=email]").value = arguments[0];
           document.querySelector("[name=password]").value = arguments[1];
           document.querySelector("[name=password]").form.requestSubmit();""",
        USER,
        PASSWORD,
    )
    browser.wait("return !location.pathname.startsWith('/user/login')", what="the page after the login")


def open_task(browser: Browser, server: Server, project_id: int, task_id: int, regions: int) -> Place:
    """Open a task, wait until its photo and regions are there."""
    browser.open(f"{server.url}/projects/{project_id}/data?task={task_id}")
    what = f"task {task_id} with {regions} regions in the editor"
    left, top, width, height = browser.wait(PLACE, task_id, regions, what=what, seconds=300)
    return Place(left=left, top=top, width=width, height=height)


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("MASKFLEET_SCREENSHOTS"):
        (Path(folder) / f"{name}.png").write_bytes(browser.screenshot())


def look(browser: Browser, place: Place, *, other_than: NDArray[np.int16] | None = None) -> NDArray[np.int16]:
    """The photo as the window shows it, once that stands still and differs from other_than, (h, w, 3) RGB."""
    seen = [place.crop(browser.pixels())]

    def is_settled() -> bool:
        seen.append(place.crop(browser.pixels()))
        is_new = other_than is None or not np.array_equal(seen[-1], other_than)
        return is_new and np.array_equal(seen[-1], seen[-2])

    wait_for(is_settled, "the photo to stand still")
    return seen[-1]


def look_at_regions(browser: Browser, place: Place, count: int) -> tuple[BoolMask, BoolMask]:
    """What of the photo the regions cover, and what of it is an object by its colour, (h, w) of the window's pixels."""
    covered = look(browser, place)
    browser.run(TOGGLE)
    bare = look(browser, place, other_than=covered if count else None)
    browser.run(TOGGLE)
    look(browser, place, other_than=bare if count else None)
    overlay: BoolMask = np.abs(covered - bare).sum(axis=2) > 10
    objects: BoolMask = bare[:, :, 0] - bare[:, :, 1] > 60
    return overlay, objects


def iou(a: BoolMask, b: BoolMask) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_a_person_sees_regions_on_the_objects_moves_a_vertex_and_review_says_so(
    engine: Engine, client: LabelStudio, label_studio: Server, browser: Browser
) -> None:
    folder = label_studio.files / f"photos-{secrets.token_hex(3)}"
    job, project_id = published(engine, client, label_studio, folder)
    tasks = {task["data"]["image"].rpartition("/")[2]: task["id"] for task in client.list_tasks(project_id)}
    log_in(browser, label_studio)

    # See each photo: the regions cover its objects, upright, with their holes; one has neither.
    for name, (size_hw, objects) in OBJECTS.items():
        place = open_task(browser, label_studio, project_id, tasks[name], len(objects))
        overlay, red = look_at_regions(browser, place, len(objects))
        keep(browser, name.removesuffix(".jpg"))
        assert overlay.shape[0] / overlay.shape[1] == pytest.approx(size_hw[0] / size_hw[1], abs=0.01)
        if not objects:
            assert not overlay.any()
            continue
        masks = np.any(objects, axis=0).astype(np.uint8)
        stored_masks = cv2.resize(masks, overlay.shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
        assert iou(overlay, red) > 0.95, name
        assert iou(overlay, stored_masks) > 0.95, name

    # Accept the turned photo, as it is.
    open_task(browser, label_studio, project_id, tasks["turned.jpg"], 1)
    submit(browser, client, tasks["turned.jpg"])

    # Move a vertex of the small disc, and submit.
    place = open_task(browser, label_studio, project_id, tasks["holes.jpg"], 2)
    (predicted,) = client.get_task(tasks["holes.jpg"])["predictions"]
    small = next(region for region in predicted["result"] if region["id"].endswith("-1"))
    unselected = look(browser, place)
    browser.drag(place.window((100 * 500 / 640, 100 * 120 / 480)))
    browser.wait(SELECTED, small["id"], what="a selection")
    look(browser, place, other_than=unselected)  # with the vertices to take hold of
    x, y = place.window(small["value"]["points"][0])
    browser.drag((x, y), (x - 15, y - 15), (x - 50, y - 40))
    browser.wait(MOVED, small["id"], small["value"]["points"][0], what="the vertex in its new place")
    keep(browser, "moved")
    annotation = submit(browser, client, tasks["holes.jpg"])

    # The annotation differs by that vertex, and review says exactly that.
    edited = next(region for region in annotation["result"] if region["id"] == small["id"])
    points = zip(small["value"]["points"], edited["value"]["points"], strict=True)
    assert [n for n, (one, other) in enumerate(points) if one != pytest.approx(other, abs=1e-3)] == [0]
    pull(engine, client, project_id)
    found = read_review(engine, job, LsProject(client.url, project_id))
    assert (found.masks.kept, found.masks.edited, found.masks.deleted, found.masks.added) == (2, 1, 0, 0)
    assert (found.assets.untouched, found.assets.corrected, found.assets.waiting) == (1, 1, 1)
    assert found.masks.mean_iou == pytest.approx(iou(mask_from_region(small), mask_from_region(edited)), abs=1e-6)
    assert found.seconds_total > 0


def submit(browser: Browser, client: LabelStudio, task_id: int) -> dict[str, Any]:
    """Press Submit, and return the annotation that the server then has."""
    assert browser.run(SUBMIT)
    (annotation,) = wait_for(lambda: client.get_task(task_id)["annotations"], "the annotation")
    return annotation
