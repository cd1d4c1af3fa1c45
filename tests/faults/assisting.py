"""Clicks under faults: `maskfleet assist` and its decoders are killed while reviewers click.

    .venv/bin/python -m tests.faults.assisting --clicks 200 --kills 20 --seed 1

The service is started again when it ended, and a reviewer clicks again when no answer came, as people do. In the end
each click has an answer, each answer is that of a service without faults, and each answer is counted once. Exit status
1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import Engine, text

from db.migrating import migrate
from db.publishing import LsProject
from db.session import open_engine
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.local.postgres import EmbeddedPostgres
from tests.assisted import PublishedAsset, keep_embedding, published_asset
from tests.deployment import MASKFLEET
from tests.faults.reviewing import END_CONNECTIONS
from tests.label_studio.reviewing import disc
from tests.label_studio.server import Server, serve
from tests.redis_server import free_port
from tests.waiting import wait_for
from tests.watchdog import guard
from workers.embeddings.store import EmbeddingStore
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene

SIZE_HW = (240, 320)
PASSWORD = "a password of sixteen"
REVIEWERS, ASSETS, DECODERS = 3, 4, 2
Click = tuple[PublishedAsset, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assisted:
    """clicks: all that were made while faults went on. unanswered, wrong and uncounted must be 0. asked_again:
    requests that a fault left without an answer.
    """

    clicks: int
    kills: int
    asked_again: int
    unanswered: int
    wrong: int
    uncounted: int

    @property
    def exact(self) -> bool:
        return not (self.unanswered or self.wrong or self.uncounted)


@dataclass
class Service:
    """`maskfleet assist`, started again when it ended."""

    words: Sequence[str]
    environment: dict[str, str]
    url: str
    process: subprocess.Popen[bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep_up(self) -> None:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                command = [*MASKFLEET, *self.words]
                nowhere = subprocess.DEVNULL
                self.process = subprocess.Popen(command, env=self.environment, stdout=nowhere, stderr=nowhere)

    def decoders(self) -> int:
        """How many are ready; 0 while the service does not answer."""
        self.keep_up()
        try:
            health = httpx.get(f"{self.url}/health", auth=("maskfleet", PASSWORD), timeout=30)
        except httpx.TransportError:
            return 0
        return int(health.json()["decoders"]) if health.is_success else 0

    def answer(self, click: Click) -> tuple[Any, ...] | None:
        """The mask's regions, alone in a tuple. None: there was no answer, or not by a decoder."""
        asset, x, y = click
        self.keep_up()
        try:
            answer = httpx.post(
                f"{self.url}/predict",
                content=asset.body(asset.point(x, y)),
                headers={"Content-Type": "application/json"},
                auth=("maskfleet", PASSWORD),
                timeout=60,
            )
        except httpx.TransportError:
            return None
        if not answer.is_success:
            return None
        (found,) = answer.json()["results"]
        by_decoder = found["model_version"].endswith("/decoder")
        return ([region["value"] for region in found["result"]],) if by_decoder else None


def assist_under_faults(
    engine: Engine, database_url: str, server: Server, folder: Path, *, clicks: int, kills: int, seed: int = 1
) -> Assisted:
    """Reviewers click on assets with kept embeddings while services, decoders and connections end."""
    chance = random.Random(seed)
    with LabelStudio(server.url, server.token) as client:
        project_id = client.create_project(title=f"clicks {seed}", label_config=label_config(["thing"])).id
        assets = kept_assets(engine, folder / "kept", LsProject(client.url, project_id))
    wanted = [
        (chance.choice(assets), chance.uniform(5, SIZE_HW[1] - 5), chance.uniform(5, SIZE_HW[0] - 5))
        for _ in range(clicks)
    ]
    service = service_of(database_url, server, folder / "kept", project_id)
    try:
        wait_for(lambda: service.decoders() == DECODERS, "the decoders", seconds=300)
        right = [click_until_answered(service, click, [0] * clicks, n) for n, click in enumerate(wanted)]
        asked, answers = [0] * clicks, list[tuple[Any, ...] | None]()
        with ThreadPoolExecutor(REVIEWERS + 1) as people:
            killing = people.submit(kill, engine, service, chance, kills)
            while not answers or not killing.done():
                answers += people.map(lambda n: click_until_answered(service, wanted[n], asked, n), range(clicks))
            killing.result()
    finally:
        end(service)
    with engine.begin() as db:
        counted = db.execute(text("SELECT count(*) FROM click WHERE answered_by = 'decoder'")).scalar_one()
    return Assisted(
        clicks=len(answers),
        kills=kills,
        asked_again=sum(asked) - len(answers),
        unanswered=answers.count(None),
        wrong=sum(answer != right[n % clicks] for n, answer in enumerate(answers) if answer is not None),
        uncounted=max(clicks + len(answers) - int(counted), 0),
    )


def kept_assets(engine: Engine, folder: Path, ls_project: LsProject) -> list[PublishedAsset]:
    """Scenes, labeled by sam_nano as far as the database knows, with their embeddings in `folder`."""
    store = EmbeddingStore(open_objects(str(folder)))
    nano = load_model(find_model("sam_nano"), "cpu")
    version = f"sam_nano@{weights_sha256(find_model('sam_nano'))[:8]}+00000000"
    found = []
    for number in range(ASSETS):
        asset = published_asset(
            engine,
            [disc(160, 120, 30, SIZE_HW)],
            key=f"{number}.png",
            task_id=100 + number,
            model="sam_nano",
            model_version=version,
            ls_project=ls_project,
        )
        keep_embedding(engine, store, nano, asset, draw_scene(91_000_000_000_000 + number, SIZE_HW).image)
        found.append(asset)
    return found


def service_of(database_url: str, server: Server, kept: Path, project_id: int) -> Service:
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")},
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": server.url,
        "MASKFLEET_LABEL_STUDIO_API_KEY": server.token,
        "MASKFLEET_ASSIST_PASSWORD": PASSWORD,
        "MASKFLEET_EMBEDDINGS": str(kept),
    }
    words = ["assist", "--project", str(project_id), "--port", str(port), "--processes", str(DECODERS)]
    return Service(words=words, environment=environment, url=f"http://127.0.0.1:{port}")


def click_until_answered(service: Service, click: Click, asked: list[int], n: int) -> tuple[Any, ...] | None:
    """A reviewer's click, again until a decoder answers. None after ten minutes."""

    def ask() -> tuple[Any, ...] | None:
        asked[n] += 1
        return service.answer(click)

    try:
        return wait_for(ask, f"an answer to click {n}", seconds=600)
    except AssertionError:
        return None


def kill(engine: Engine, service: Service, chance: random.Random, kills: int) -> None:
    """Let faults happen. After each a decoder must come up again."""
    for _ in range(kills):
        time.sleep(chance.uniform(0.5, 4))
        what = chance.choice(["service", "decoder", "decoder", "connections"])
        process = service.process
        assert process is not None
        if what == "connections":
            with engine.begin() as db:
                db.execute(text(END_CONNECTIONS))
        elif what == "service":
            process.kill()
            process.wait()
        elif process.poll() is None and (children := psutil.Process(process.pid).children()):
            chance.choice(children).kill()
        wait_for(lambda: service.decoders() > 0, "a decoder", seconds=300)


def end(service: Service) -> None:
    if service.process is not None:
        service.process.terminate()
        service.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    guard()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="maskfleet-assisting-")))
        postgres = opened.enter_context(EmbeddedPostgres(folder / "data", durable=False))
        server = opened.enter_context(serve(folder / "label-studio"))
        migrate(postgres.url)
        engine = open_engine(postgres.url)
        found = assist_under_faults(
            engine, postgres.url, server, folder, clicks=args.clicks, kills=args.kills, seed=args.seed
        )
        engine.dispose()
    print(json.dumps(asdict(found), indent=2))
    sys.exit(0 if found.exact else 1)


if __name__ == "__main__":
    main()
