"""Reviewing under faults, on a real Label Studio: while people annotate, `review --follow` is killed, answers are lost.

    .venv/bin/python -m tests.faults.reviewing --assets 200 --kills 20 --seed 1

In the end the review's numbers are those of what the people did, and each annotation is there once. Exit status 1
otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, text

from db.migrating import migrate
from db.publishing import LsProject
from db.results import StoredMask
from db.session import open_engine
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.review_numbers import read_review
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import MASKFLEET
from tests.faults.publishing import environment_of, start
from tests.label_studio.proxy import proxy_of
from tests.label_studio.reviewing import BLOCK, TWO_PARTS, Project, labeled_job, publish, stored
from tests.label_studio.server import Server, serve
from tests.waiting import wait_for
from tests.watchdog import guard

SPOILS = ("500", "502", "504", "drop", "503")
END_CONNECTIONS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE application_name = 'maskfleet' AND pid <> pg_backend_pid()"""
DEEDS = ("keep", "delete one", "skip", "keep, then delete one", "keep, then take it back")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """What the review says, and what it should say. annotations: rows, for as many as the server has."""

    kills: int
    spoiled: int
    said: dict[str, int]
    expected: dict[str, int]

    @property
    def exact(self) -> bool:
        return self.said == self.expected


def review_under_faults(
    engine: Engine, database_url: str, server: Server, *, assets: int, kills: int, seed: int = 1
) -> Reviewed:
    """People annotate a published job while reviewers die, answers are lost and connections to Postgres end."""
    chance = random.Random(seed)
    keys = [f"{n:04}.jpg" for n in range(assets)]
    job = labeled_job(engine, keys, lambda _, asset_id: masks_of(asset_id))
    with proxy_of(server.url) as proxy, LabelStudio(proxy.url, server.token) as client:
        project = publish(engine, client, server, job)
        deeds = {key: chance.choice(DEEDS) for key in keys}
        words = ["review", str(job.id), "--project", str(project.id)]
        environment = environment_of(database_url, proxy, server)
        proxy.spoiled_path = "/api/tasks"
        people = threading.Thread(target=annotate, args=(project, deeds))
        people.start()
        for _ in range(kills):
            proxy.spoil = [chance.choice(["", "", *SPOILS]) for _ in range(20)]
            asked = len(proxy.requests)
            follow = [*words, "--follow", "--every", "1"]
            kill_one(engine, follow, environment, chance, people, has_asked=lambda n=asked: len(proxy.requests) > n)
        people.join()
        proxy.spoil = []
        subprocess.run([*MASKFLEET, *words, "--json"], env=environment, check=True, stdout=subprocess.DEVNULL)
        found = read_review(engine, job, LsProject(client.url, project.id))
    counted = {name: getattr(found.assets, name) for name in ("untouched", "corrected", "skipped", "waiting")}
    counted |= {name: getattr(found.masks, name) for name in ("kept", "edited", "deleted", "added")}
    counted["annotations"] = annotations(engine)
    return Reviewed(kills=kills, spoiled=proxy.spoiled, said=counted, expected=expected(list(deeds.values())))


def masks_of(asset_id: int) -> list[StoredMask]:
    return stored(asset_id, [TWO_PARTS, BLOCK], scores=[0.9, 0.8], labels=["pair", "block"])


def annotate(project: Project, deeds: dict[str, str]) -> None:
    """What people do with each task. Straight to the server: the faults are the reviewer's."""
    tasks = project.tasks()
    for key, deed in deeds.items():
        task = tasks[key]
        regions = task["predictions"][0]["result"]
        if deed == "skip":
            project.submit(task, [], skip=True)
            continue
        made = project.submit(task, without_one(regions) if deed == "delete one" else regions)
        if deed == "keep, then delete one":
            project.update(made["id"], result=without_one(regions))
        elif deed == "keep, then take it back":
            project.delete(made["id"])


def without_one(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the parts of the first mask."""
    first = regions[0]["id"].partition("-p")[0]
    return [region for region in regions if region["id"].partition("-p")[0] != first]


def expected(deeds: list[str]) -> dict[str, int]:
    kept, skipped, waiting = (deeds.count(deed) for deed in ("keep", "skip", "keep, then take it back"))
    corrected = len(deeds) - kept - skipped - waiting
    return {
        "untouched": kept,
        "corrected": corrected,
        "skipped": skipped,
        "waiting": waiting,
        "kept": 2 * kept + corrected,
        "edited": 0,
        "deleted": corrected,
        "added": 0,
        "annotations": len(deeds) - waiting,
    }


def kill_one(
    engine: Engine,
    words: list[str],
    environment: dict[str, str],
    chance: random.Random,
    still: threading.Thread,
    *,
    has_asked: Callable[[], bool],
) -> None:
    """A reviewer, killed when it has read some annotations more, or after a while. Its connections may end before.

    has_asked: whether it has sent a request. On a busy machine it takes long to start, and would be killed before.
    """
    wanted, patience = annotations(engine) + chance.randrange(1, 20), chance.uniform(3, 9)
    reviewer = start(words, environment)
    wait_for(lambda: has_asked() or reviewer.poll() is not None, "a reviewer's first request")
    give_up_at = time.monotonic() + patience
    wait_for(
        lambda: annotations(engine) >= wanted or time.monotonic() > give_up_at or not still.is_alive(),
        "a reviewer's progress",
    )
    if chance.random() < 0.5:
        with engine.begin() as db:
            db.execute(text(END_CONNECTIONS))
    reviewer.kill()
    reviewer.wait()


def annotations(engine: Engine) -> int:
    with engine.begin() as db:
        return int(db.execute(text("SELECT count(*) FROM ls_annotation")).scalar_one())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=int, default=100)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    guard()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="maskfleet-reviewing-")))
        postgres = opened.enter_context(EmbeddedPostgres(folder / "data", durable=False))
        server = opened.enter_context(serve(folder / "label-studio"))
        migrate(postgres.url)
        engine = open_engine(postgres.url)
        found = review_under_faults(engine, postgres.url, server, assets=args.assets, kills=args.kills, seed=args.seed)
        engine.dispose()
    print(json.dumps(asdict(found), indent=2))
    sys.exit(0 if found.exact else 1)


if __name__ == "__main__":
    main()
