"""Times the assist service as a whole: picks, /health beside clicks, ten reviewers, and the way through a browser.

`python tests/benchmarks/clicks.py [--json] [--section pick|reviewers|browser]`; minutes on two cores. What one click
costs the decoder is in assist.py. The browser's section needs Chromium and Label Studio.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from sqlalchemy import text

from db import embeddings
from db.migrating import migrate
from db.session import Engine, open_engine
from orchestrator.assist.answers import Assistant
from orchestrator.assist.children import Children
from orchestrator.assist.credential import Credential
from orchestrator.assist.decoding import Decoder
from orchestrator.assist.service import serve
from orchestrator.local.postgres import EmbeddedPostgres
from tests.assisted import PROJECT, SERVER, PublishedAsset, published_asset
from tests.label_studio.browser import NoBrowser, open_browser
from tests.label_studio.editor import Editor
from tests.label_studio.reviewing import disc
from tests.waiting import wait_for
from tests.watchdog import guard
from workers.embeddings.address import EmbeddingFormat, embedding_of
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene

SIZE_HW = (1080, 1920)
SCENE_HW = (480, 640)
PASSWORD = "only-in-the-benchmark"
REVIEWERS, CLICKS = 10, 20
Answer = Callable[[bytes], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of lines")
    parser.add_argument("--section", choices=["pick", "reviewers", "browser"], action="append")
    args = parser.parse_args()
    guard()
    sections = {"pick": pick, "reviewers": reviewers, "browser": browser}
    chosen = args.section or [*sections]
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "data", durable=False) as postgres:
        migrate(postgres.url)
        engine = open_engine(postgres.url, pool_size=20)
        found = {name: sections[name](engine, Path(folder)) for name in chosen}
        engine.dispose()
    if args.json:
        print(json.dumps(found))
        return
    for name, figures in found.items():
        for what, value in figures.items():
            print(f"{name}: {what}: {value}", file=sys.stderr)


def pick(engine: Engine, folder: Path) -> dict[str, Any]:
    """CPU milliseconds of this process for a pick among 1,000 stored masks, the HTTP part left out. Bar: 10."""
    rng = np.random.default_rng(1)
    places = zip(rng.uniform(0, (1920, 1080), (1000, 2)).tolist(), rng.uniform(8, 90, 1000), strict=True)
    asset = published_asset(engine, [disc(x, y, radius, SIZE_HW) for (x, y), radius in places])
    assistant = Assistant(engine, SERVER, [PROJECT], decode=lambda *_: None, as_="auto")
    times = []
    for x, y in rng.uniform(0, (1920, 1080), (100, 2)).tolist():
        body = asset.body(asset.point(x, y, control="pick"))
        began = time.process_time()
        assistant.answer(body)
        times.append(1000 * (time.process_time() - began))
    return {"masks": 1000, **_spread("CPU ms", times), "bar": 10}


def reviewers(engine: Engine, folder: Path) -> dict[str, Any]:
    """Ten reviewers, each with a task, click at once through HTTP with sam_nano; /health is asked meanwhile. Bar: 5 ms.

    alone: the same clicks one after the other.
    """
    nano, version = load_model(find_model("sam_nano"), "cpu"), weights_sha256(find_model("sam_nano"))[:8]
    os.environ["MASKFLEET_EMBEDDINGS"] = str(folder / "kept")
    store = EmbeddingStore(open_objects(str(folder / "kept")))
    bodies = []
    for number in range(REVIEWERS):
        asset = published_asset(
            engine, [disc(300, 200, 50, SCENE_HW)], key=f"{number}.png", task_id=100 + number, model="sam_nano",
            model_version=f"sam_nano@{version}+00000000",
        )  # fmt: skip
        _keep(engine, store, asset, nano.embed([draw_scene(90_000_000_000_000 + number, SCENE_HW).image])[0])
        places = np.random.default_rng(number).uniform((5, 5), (635, 475), (CLICKS, 2)).tolist()
        bodies.append([asset.body(asset.point(x, y)) for x, y in places])
    cores = len(os.sched_getaffinity(0))
    children = Children(("-P", "-m", "workers.clicks.child"), cores, seconds=60, models=lambda: ["sam_nano"])
    wait_for(lambda: children.ready() == cores, "the decoder children", seconds=300)
    decode = Decoder(engine, children, EmbeddingFormat.FP16)
    assistant = Assistant(engine, SERVER, [PROJECT], decode=decode, as_="auto")
    with _served(assistant.answer) as url, ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as others:
        alone = others.submit(_click, url, [body for some in bodies for body in some]).result()
        for some in [others.submit(_ready) for _ in range(12)]:
            some.result()
        clicking = [others.submit(_click, url, some) for some in bodies]
        health = others.submit(_health, url, 200).result()
        together = [one for some in clicking for one in some.result()]
    children.close()
    with engine.begin() as db:
        decoded = db.execute(text("SELECT count(*) FROM click WHERE answered_by = 'decoder'")).scalar_one()
    return {
        "clicks": len(together),
        "answered by the decoder": f"{decoded} of {2 * len(together)}",
        **_spread("alone, ms", alone),
        **_spread("ten at once, ms", together),
        **_spread("/health meanwhile, ms", health),
    }


def browser(engine: Engine, folder: Path) -> dict[str, Any]:
    """From the mouse button to the mask on screen, through Label Studio and Chromium, with sam_nano: milliseconds."""
    from tests.label_studio.server import serve as serve_label_studio
    from tests.label_studio.test_assist import at, log_in, open_task, regions, reviewing

    screen: list[float] = []
    fetches: list[float] = []
    try:
        with (
            serve_label_studio(folder / "label-studio", ML_BLOCK_LOCAL_IP="false") as server,
            reviewing(server, folder, ("a.png",)) as review,
            open_browser(folder) as opened,
        ):
            log_in(opened, server)
            place = open_task(opened, server, review.project_id, review.tasks["a.png"], len(regions(review, "a.png")))
            editor = Editor(browser=opened)
            editor.use_auto_annotation()
            editor.choose_tool("click")
            opened.run(_WATCH)
            for x, y in np.random.default_rng(2).uniform((20, 20), (620, 460), (20, 2)).tolist():
                editor.choose_label("1", "object")
                editor.prompt(at(place, x, y))
                screen.append(float(opened.run("return window.shownAt - window.pressedAt;")))
                editor.reject()
            fetches += opened.run(_FETCHES)
            clicks = json.loads(review.call("review", review.out, "--project", str(review.project_id), "--json"))
    except NoBrowser as error:
        return {"skipped": str(error)}
    return {
        "clicks": len(screen),
        **_spread("to the mask on screen, ms", screen),
        **_spread("the page's request, ms", fetches),
        "the service's own part, median ms": clicks["clicks"][0]["milliseconds_median"],
    }


_WATCH = """
window.shownAt = window.pressedAt = 0;
document.addEventListener('mousedown', () => { window.pressedAt = performance.now(); window.shownAt = 0; }, true);
const look = () => {
  if (!window.shownAt && window.pressedAt && window.Htx.annotationStore.selected.suggestions.size)
    window.shownAt = performance.now();
  requestAnimationFrame(look);
};
look();
"""
_FETCHES = """
return performance.getEntriesByType('resource').filter(entry => entry.name.includes('interactive-annotating'))
  .map(entry => entry.duration);
"""


def _keep(engine: Engine, store: EmbeddingStore, asset: PublishedAsset, embedding: Any) -> None:
    with engine.begin() as db:
        found = embeddings.embeddable_assets(db, asset_ids=[asset.asset_id])
        of = embedding_of(found[asset.asset_id], EmbeddingFormat.FP16)
        content = encode(embedding, of)
        store.write(of.address, content)
        embeddings.want(db, addresses={asset.asset_id: of.address})
        embeddings.record_stored(db, sizes={of.address: len(content)})


@contextmanager
def _served(answer: Answer) -> Iterator[str]:
    stop, started, ports = threading.Event(), threading.Event(), list[int]()

    def say(port: int) -> None:
        ports.append(port)
        started.set()

    settings = {"host": "127.0.0.1", "port": 0, "threads": 16, "started": say}
    thread = threading.Thread(target=serve, args=(answer, Credential("maskfleet", PASSWORD), stop), kwargs=settings)
    thread.start()
    started.wait()
    yield f"http://127.0.0.1:{ports[0]}"
    stop.set()
    thread.join()


def _ready() -> None:
    time.sleep(0.5)  # so that every process of the pool starts


def _click(url: str, bodies: list[bytes]) -> list[float]:
    with httpx.Client(base_url=url, auth=("maskfleet", PASSWORD), timeout=120) as http:
        return [_milliseconds(lambda body=body: http.post("/predict", content=body)) for body in bodies]


def _health(url: str, count: int) -> list[float]:
    with httpx.Client(base_url=url, auth=("maskfleet", PASSWORD), timeout=120) as http:
        return [_milliseconds(lambda: http.get("/health")) for _ in range(count)]


def _milliseconds(request: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    request().raise_for_status()
    return 1000 * (time.perf_counter() - began)


def _spread(what: str, times: list[float]) -> dict[str, float]:
    return {
        f"{what}, median": round(statistics.median(times), 2),
        f"{what}, p95": round(statistics.quantiles(times, n=20)[-1], 2),
    }


if __name__ == "__main__":
    main()
