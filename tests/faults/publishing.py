"""Publishing under faults, on a real Label Studio: publishers are killed, answers are lost, requests arrive late.

    .venv/bin/python -m tests.faults.publishing --assets 1000 --kills 20 --seed 1

An operator's publisher is `publish --follow`, which is started again when it died. Nothing else is done by hand. At the
end every asset has one task with one prediction. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Engine, text

from db.migrating import migrate
from db.session import open_engine
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import MASKFLEET
from tests.label_studio.jobs import labeled_job
from tests.label_studio.proxy import Proxy, proxy_of
from tests.label_studio.server import Server, serve
from tests.waiting import wait_for
from tests.watchdog import guard

SPOILS = ("500", "502", "504", "drop", "503", "late")
VERSION = "stub@55555555+00000000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the server has in the end. tasks_twice, predictions_twice and missing must be 0."""

    assets: int
    kills: int
    spoiled: int
    handed_on_late: int
    missing: int
    tasks_twice: int
    predictions_twice: int

    @property
    def exact(self) -> bool:
        return not (self.missing or self.tasks_twice or self.predictions_twice)


def publish_under_faults(
    engine: Engine, database_url: str, server: Server, *, assets: int, kills: int, seed: int = 1
) -> Published:
    """Publish a job into a new project while publishers die and answers are lost."""
    chance = random.Random(seed)
    job = labeled_job(engine, keys=assets)
    with LabelStudio(server.url, server.token) as client, proxy_of(server.url) as proxy:
        project_id = client.create_project(title=f"faults {seed}", label_config=label_config(["car"])).id
        proxy.spoil = [chance.choice(SPOILS) if chance.random() < 0.6 else "" for _ in range(10 * assets)]
        proxy.late_seconds = 2.0
        words = ["publish", str(job.id), "--project", str(project_id), "--follow"]
        environment = environment_of(database_url, proxy, server)
        for _ in range(kills):
            kill_some(engine, words, environment, chance)
        run_to_the_end(words, environment)
        wait_for(lambda: proxy.late_on_the_way == 0, "requests that are late")
        return count(client, project_id, assets, kills=kills, proxy=proxy)


def kill_some(engine: Engine, words: Sequence[str], environment: dict[str, str], chance: random.Random) -> None:
    """One or two publishers, killed when they have done a random part of what is left, or are done."""
    before = done(engine)
    publishers = [start(words, environment) for _ in range(chance.choice([1, 1, 2]))]
    wanted = before + chance.randrange(0, 60)
    wait_for(
        lambda: done(engine) >= wanted or any(publisher.poll() is not None for publisher in publishers),
        "a publisher's progress",
    )
    for publisher in publishers:
        publisher.kill()
        publisher.wait()


def run_to_the_end(words: Sequence[str], environment: dict[str, str]) -> None:
    """Two publishers at once. Each ends by itself when the job is published."""
    publishers = [start(words, environment) for _ in range(2)]
    wait_for(lambda: all(publisher.poll() is not None for publisher in publishers), "the publishers to end", 1800)
    assert [publisher.returncode for publisher in publishers] == [0, 0]


def start(words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*MASKFLEET, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def environment_of(database_url: str, proxy: Proxy, server: Server) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")},
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": proxy.url,
        "MASKFLEET_LABEL_STUDIO_API_KEY": server.token,
    }


def done(engine: Engine) -> int:
    with engine.begin() as db:
        return int(db.execute(text("SELECT count(*) FROM ls_prediction WHERE state = 'done'")).scalar_one())


def count(client: LabelStudio, project_id: int, assets: int, *, kills: int, proxy: Proxy) -> Published:
    tasks = list(client.list_tasks(project_id, whole=True))
    of_asset = Counter(task["data"]["asset_id"] for task in tasks)
    predictions = [sum(p["model_version"] == VERSION for p in task["predictions"]) for task in tasks]
    return Published(
        assets=assets,
        kills=kills,
        spoiled=proxy.spoiled,
        handed_on_late=proxy.handed_on_late,
        missing=assets - len(of_asset) + sum(number == 0 for number in predictions),
        tasks_twice=sum(number - 1 for number in of_asset.values()),
        predictions_twice=sum(max(number - 1, 0) for number in predictions),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=int, default=300)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    guard()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="maskfleet-publishing-")))
        postgres = opened.enter_context(EmbeddedPostgres(folder / "data", durable=False))
        server = opened.enter_context(serve(folder / "label-studio"))
        migrate(postgres.url)
        engine = open_engine(postgres.url)
        found = publish_under_faults(engine, postgres.url, server, assets=args.assets, kills=args.kills, seed=args.seed)
        engine.dispose()
    print(json.dumps(asdict(found), indent=2))
    sys.exit(0 if found.exact else 1)


if __name__ == "__main__":
    main()
