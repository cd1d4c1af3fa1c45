"""Clicks on real rows: which stored mask is picked, what a request means, and who may ask."""

from __future__ import annotations

import base64
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import Engine, text

from db.clicks import ClickedTask
from orchestrator.assist.answers import NOTHING, AnswerKind, Assistant, Decode
from orchestrator.assist.credential import AssistError, Credential
from orchestrator.assist.service import MAX_BODY_BYTES, serve
from orchestrator.label_studio.config import faults, find_controls
from orchestrator.label_studio.drawn import mask_from_region
from orchestrator.shapes.runs import edges_from_counts, pixels_from_edges
from tests.assisted import CONFIG, PROJECT, SERVER, PublishedAsset, published_asset
from tests.label_studio.reviewing import disc
from workers.masks import BoolMask, Mask, mask_from_pixels
from workers.prompts import Prompt

pytestmark = pytest.mark.integration

SIZE_HW = (240, 320)
BIG = disc(100, 120, 80, SIZE_HW)
SMALL = disc(100, 120, 30, SIZE_HW)
RIGHT = disc(250, 120, 40, SIZE_HW)
PASSWORD = "only-for-this-test"


def no_decoder(task: ClickedTask, prompt: Prompt, mask_counts: str | None) -> Mask | None:
    return None


def assistant(engine: Engine, decode: Decode = no_decoder, as_: AnswerKind = "auto") -> Assistant:
    return Assistant(engine, SERVER, [PROJECT], decode=decode, as_=as_)


@pytest.fixture
def asset(engine: Engine) -> PublishedAsset:
    return published_asset(engine, [BIG, SMALL, RIGHT])


def regions_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    (one,) = answer["results"]
    found: list[dict[str, Any]] = one["result"]
    return found


def pixels_of(regions: list[dict[str, Any]]) -> BoolMask:
    return np.any([mask_from_region(region, size_hw=SIZE_HW) for region in regions], axis=0)


def iou(a: BoolMask, b: BoolMask) -> float:
    return float((a & b).sum() / (a | b).sum())


def picked(engine: Engine, asset: PublishedAsset, *points: tuple[float, float]) -> str:
    prompts = [asset.point(x, y, own=f"p{n}", control="pick") for n, (x, y) in enumerate(points)]
    return str(regions_of(assistant(engine).answer(asset.body(*prompts)))[0]["id"])


def test_a_pick_is_the_smallest_stored_mask_that_holds_its_points(engine: Engine, asset: PublishedAsset):
    assert picked(engine, asset, (100, 120)) == f"m{asset.asset_id}-1"
    assert picked(engine, asset, (100, 120), (30, 120)) == f"m{asset.asset_id}-0"
    assert picked(engine, asset, (260, 120)) == f"m{asset.asset_id}-2"


def test_points_that_no_mask_holds_together_pick_the_mask_of_the_newest(engine: Engine, asset: PublishedAsset):
    assert picked(engine, asset, (100, 120), (250, 120)) == f"m{asset.asset_id}-2"


def test_a_point_outside_rules_a_mask_out(engine: Engine, asset: PublishedAsset):
    inside = asset.point(100, 120, own="a", control="pick")
    outside = asset.point(110, 120, own="b", control="pick", inside=False)
    outside_big = asset.point(30, 120, own="b", control="pick", inside=False)

    assert regions_of(assistant(engine).answer(asset.body(inside, outside))) == []
    (region,) = regions_of(assistant(engine).answer(asset.body(inside, outside_big)))
    assert region["id"] == f"m{asset.asset_id}-1"


def test_a_pick_far_from_every_mask_is_an_empty_answer(engine: Engine, asset: PublishedAsset):
    answer = assistant(engine).answer(asset.body(asset.point(318, 2, control="pick")))
    assert regions_of(answer) == []


def test_every_pixel_of_random_masks_picks_as_painted_pixels_do(engine: Engine):
    rng = np.random.default_rng(5)
    masks = [disc(*rng.uniform(20, 200, 2), rng.uniform(5, 60), SIZE_HW) for _ in range(30)]
    asset = published_asset(engine, masks)
    areas = [mask.sum() for mask in masks]
    for x, y in rng.integers(0, (SIZE_HW[1], SIZE_HW[0]), (40, 2)).tolist():
        holding = [n for n in range(len(masks)) if masks[n][y, x]]
        if holding:
            smallest = min(holding, key=lambda n: (areas[n], n))
            assert picked(engine, asset, (x + 0.5, y + 0.5)) == f"m{asset.asset_id}-{smallest}"


def test_without_an_embedding_points_and_boxes_are_answered_from_stored_masks(engine: Engine, asset: PublishedAsset):
    by_point = assistant(engine).answer(asset.body(asset.point(250, 120)))
    by_box = assistant(engine).answer(asset.body(asset.box(68, 92, 132, 150)))

    assert [region["id"] for region in regions_of(by_point)] == [f"m{asset.asset_id}-2"]
    assert [region["id"] for region in regions_of(by_box)] == [f"m{asset.asset_id}-1"]
    assert by_point["results"][0]["model_version"].endswith("/stored")
    assert iou(pixels_of(regions_of(by_box)), SMALL) > 0.95


def test_without_an_embedding_a_click_with_alt_after_a_box_leaves_the_boxs_answer(
    engine: Engine, asset: PublishedAsset
):
    """Without an answer, the suggestion would go from the reviewer's screen."""
    service = assistant(engine)
    of_box = service.answer(asset.body(asset.box(25, 45, 175, 195)))

    of_both = service.answer(asset.body(asset.point(35, 120, own="o", inside=False)))

    assert [region["id"] for region in regions_of(of_both)] == [f"m{asset.asset_id}-0"]
    assert regions_of(of_both) == regions_of(of_box)


@pytest.mark.parametrize("as_", ["auto", "polygon", "brush", "rectangle", "all"])
def test_answers_have_the_wanted_kinds_and_fit_the_projects_config(
    engine: Engine, asset: PublishedAsset, as_: AnswerKind
):
    answer = assistant(engine, as_=as_).answer(asset.body(asset.point(250, 120, label="other")))
    regions = regions_of(answer)

    kinds = {"auto": ["polygon"], "all": ["polygon", "brush", "rectangle"]}.get(as_, [as_])
    assert [region["type"].removesuffix("labels") for region in regions] == kinds
    assert faults(find_controls(CONFIG), answer["results"][0]) == []
    assert all(region["value"][region["type"]] == ["other"] for region in regions)
    assert len({region["id"] for region in regions}) == len(regions)
    if as_ != "rectangle":
        assert iou(pixels_of(regions[:1]), RIGHT) > 0.95


class Recorder:
    """A decoder that answers every prompt with one disc, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, str | None]] = []

    def __call__(self, task: ClickedTask, prompt: Prompt, mask_counts: str | None) -> Mask | None:
        self.asked.append((prompt, mask_counts))
        return mask_from_pixels(disc(200, 200, 20, SIZE_HW), predicted_iou=0.8)


def test_points_reach_the_decoder_in_pixels_and_get_ids_of_their_own(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    service = assistant(engine, decoder)
    prompts = [asset.point(100, 120, own="a"), asset.point(30, 40, own="b", inside=False)]
    first, second = (regions_of(service.answer(asset.body(*prompts)))[0]["id"] for _ in range(2))

    (prompt, mask_counts), _ = decoder.asked
    assert prompt.points == ((pytest.approx(100), pytest.approx(120), 1), (pytest.approx(30), pytest.approx(40), 0))
    assert (prompt.box_xyxy, mask_counts) == (None, None)
    assert first != second
    assert first.startswith("assist-")


def test_points_after_a_box_reach_the_decoder_with_it(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    service = assistant(engine, decoder)
    service.answer(asset.body(asset.box(60, 80, 140, 160)))
    service.answer(asset.body(asset.point(70, 90, inside=False)))

    assert [prompt.box_xyxy for prompt, _ in decoder.asked] == [pytest.approx((60, 80, 140, 160))] * 2
    assert len(decoder.asked[1][0].points) == 1


def test_a_click_after_the_answer_to_a_box_was_accepted_is_asked_alone(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    service = assistant(engine, decoder)
    (answer,) = regions_of(service.answer(asset.body(asset.box(60, 80, 140, 160))))
    accepted = [{"result": [{"id": answer["id"]}]}]
    service.answer(asset.body(asset.point(70, 90), drafts=accepted))

    assert [prompt.box_xyxy is None for prompt, _ in decoder.asked] == [False, True]


def test_clicks_beside_a_pick_refine_the_picked_mask_under_its_own_id(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    prompts = [asset.point(100, 120, own="a", control="pick"), asset.point(150, 120, own="b")]
    (region,) = regions_of(assistant(engine, decoder).answer(asset.body(*prompts)))

    ((prompt, mask_counts),) = decoder.asked
    assert mask_counts is not None
    assert (pixels_from_edges(edges_from_counts(mask_counts, SIZE_HW), SIZE_HW) == SMALL).all()
    assert [inside for _, _, inside in prompt.points] == [1, 1]
    assert region["id"] == f"m{asset.asset_id}-1"


def test_a_click_with_alt_alone_takes_a_part_from_the_shown_mask_under_it(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    service = assistant(engine, decoder)
    outside = asset.point(100, 120, inside=False)
    shown = regions_of(service.answer(asset.body(outside, shown=[f"m{asset.asset_id}-0"])))

    ((prompt, mask_counts),) = decoder.asked
    assert prompt.box_xyxy == (21, 41, 180, 200)
    assert mask_counts is not None
    assert shown[0]["id"] == f"m{asset.asset_id}-0"
    assert service.answer(asset.body(outside)) == NOTHING  # no mask is on screen


def test_each_answer_leaves_a_row_with_its_kind_and_who_answered(engine: Engine, asset: PublishedAsset):
    decoder = Recorder()
    service = assistant(engine, decoder)
    service.answer(asset.body(asset.point(100, 120, own="one")))
    service.answer(asset.body(asset.box(10, 10, 50, 50, own="two")))
    service.answer(asset.body(asset.point(20, 20, own="three", inside=False)))
    service.answer(asset.body(asset.point(100, 120, own="four", control="pick")))

    with engine.begin() as db:
        rows = db.execute(text("SELECT kind, answered_by, prompt_id, label, region_id FROM click ORDER BY id")).all()
    assert [row[:4] for row in rows] == [
        ("point", "decoder", "one", "thing"),
        ("box", "decoder", "two", "thing"),
        ("mixed", "decoder", "two", "thing"),
        ("pick", "stored", "four", "thing"),
    ]
    assert rows[3].region_id == f"m{asset.asset_id}-1"


def test_another_project_another_task_and_a_foreign_asset_get_nothing(engine: Engine, asset: PublishedAsset):
    other = published_asset(engine, [BIG], key="b.jpg", task_id=31)
    service = assistant(engine)
    click = asset.point(100, 120)

    assert service.answer(asset.body(click, project=PROJECT + 1)) == NOTHING
    assert service.answer(asset.body(click, id=other.task_id)) == NOTHING
    assert service.answer(asset.body(click, data={"asset_id": other.uid})) == NOTHING
    assert regions_of(service.answer(asset.body(click))) != []


def test_a_decoder_that_finds_no_pixel_is_answered_from_stored_masks(engine: Engine, asset: PublishedAsset):
    def empty(task: ClickedTask, prompt: Prompt, mask_counts: str | None) -> Mask:
        return mask_from_pixels(np.zeros(SIZE_HW, bool), predicted_iou=0.1)

    (region,) = regions_of(assistant(engine, empty).answer(asset.body(asset.point(250, 120))))
    assert region["id"] == f"m{asset.asset_id}-2"


@contextmanager
def served(answer: Callable[[bytes], dict[str, Any]]) -> Iterator[str]:
    stop, started, ports = threading.Event(), threading.Event(), list[int]()

    def say(port: int) -> None:
        ports.append(port)
        started.set()

    credential = Credential("maskfleet", PASSWORD)
    settings = {"host": "127.0.0.1", "port": 0, "threads": 4, "started": say}
    thread = threading.Thread(target=serve, args=(answer, credential, stop), kwargs=settings)
    thread.start()
    assert started.wait(120)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        stop.set()
        thread.join()


PATHS = [("GET", "/health"), ("POST", "/setup"), ("GET", "/versions"), ("POST", "/predict"), ("POST", "/webhook")]


@pytest.mark.parametrize(("method", "path"), [*PATHS, ("GET", "/"), ("GET", "/../etc/passwd")])
@pytest.mark.parametrize("auth", [None, ("maskfleet", "wrong"), ("other", PASSWORD)])
def test_every_path_wants_the_password(method: str, path: str, auth: tuple[str, str] | None):
    asked: list[bytes] = []
    with served(lambda body: asked.append(body) or NOTHING) as url:  # type: ignore[func-returns-value]
        answer = httpx.request(method, url + path, auth=auth, content=b"{}" if method == "POST" else None, timeout=60)
    assert answer.status_code == 401
    assert asked == []


def test_a_refused_request_is_answered_before_its_body_is_read():
    def endless() -> Iterator[bytes]:
        give_up_at = time.monotonic() + 120
        while time.monotonic() < give_up_at:
            yield b"x" * 65536

    with served(lambda body: NOTHING) as url:
        try:
            answer = httpx.post(f"{url}/predict", content=endless(), timeout=60)
            assert answer.status_code == 401
        except httpx.WriteError:
            pass  # the service closed the connection while we were still sending


def test_the_protocols_paths_answer_and_others_are_unknown():
    answer = {"results": [{"result": []}]}
    login = ("maskfleet", PASSWORD)
    with served(lambda body: answer) as url, httpx.Client(auth=login, base_url=url, timeout=60) as http:
        assert http.get("/health").json()["status"] == "UP"
        assert http.post("/setup", json={"access_token": "secret"}).json() == {"model_version": "maskfleet"}
        assert http.get("/versions?project=3").json() == {"versions": ["maskfleet"]}
        assert http.post("/predict", json={}).json() == answer
        assert http.get("/metrics").status_code == 404


def test_a_body_that_is_too_large_is_refused():
    asked: list[bytes] = []
    header = base64.b64encode(f"maskfleet:{PASSWORD}".encode()).decode()
    with served(lambda body: asked.append(body) or NOTHING) as url:  # type: ignore[func-returns-value]
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            lines = ["POST /predict HTTP/1.1", "Host: x", f"Authorization: Basic {header}"]
            head = "\r\n".join([*lines, f"Content-Length: {MAX_BODY_BYTES + 1}", "", ""])
            connection.sendall(head.encode() + b"x" * 1000)
            said = connection.recv(1000)
    assert not said.startswith(b"HTTP/1.1 200")
    assert asked == []


def test_health_is_answered_while_a_click_is_under_way():
    begun, go_on = threading.Event(), threading.Event()

    def slow(body: bytes) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(60)
        return NOTHING

    with served(slow) as url, httpx.Client(auth=("maskfleet", PASSWORD), base_url=url) as http:
        clicking = threading.Thread(target=http.post, args=("/predict",), kwargs={"timeout": 120})
        clicking.start()
        assert begun.wait(60)
        with httpx.Client(auth=("maskfleet", PASSWORD), base_url=url) as other:
            assert other.get("/health", timeout=30).json()["status"] == "UP"
        go_on.set()
        clicking.join()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # tornado leaves the socket that it could not bind
def test_a_port_that_is_taken_is_named():
    with served(lambda body: NOTHING) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(AssistError, match=f"cannot listen at 127.0.0.1:{port} .*choose another --port"):
            serve(
                lambda body: NOTHING,
                Credential("maskfleet", PASSWORD),
                threading.Event(),
                host="127.0.0.1",
                port=port,
                threads=1,
            )
    gc.collect()


def test_a_short_password_is_refused_with_a_command_that_makes_one():
    with pytest.raises(AssistError, match="has 15 characters, expected at least 16: `openssl rand"):
        Credential("maskfleet", "x" * 15)
    header = base64.b64encode(b"maskfleet:" + b"x" * 16).decode()
    assert Credential("maskfleet", "x" * 16).fits(f"Basic {header}")
