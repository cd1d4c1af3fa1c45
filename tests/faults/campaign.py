"""A campaign: real commands on real servers, faults of all kinds at random moments, and then the books.

    make campaign ASSETS=12000 FAULTS=200          a table
    make campaign ASSETS=300 FAULTS=20 JSON=1      one document
    .venv/bin/python -m tests.faults.campaign --seed 7 --only "freeze redis"

The schedule follows from the seed. The table is also in out/campaign.md, which is written again after each fault. Exit
status 1 where anything was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from db.migrating import migrate
from db.session import open_engine
from orchestrator.local.postgres import EmbeddedPostgres
from tests.deployment import Deployment, draw_pictures
from tests.faults.books import Books, check
from tests.faults.fleet import Fleet
from tests.faults.kinds import KINDS
from tests.faults.store import serve_store
from tests.redis_server import redis_program, serve_redis
from tests.stub.stub_model import BROKEN, FULL, POISON
from tests.waiting import wait_for
from tests.watchdog import guard

ASSETS_A_JOB = 400
PATIENCE_SECONDS = 600.0


@dataclass
class Campaign:
    """recoveries: seconds from the end of each fault to the next outcome, by kind."""

    fleet: Fleet
    pictures: Path
    calls: Path
    progress: Callable[[str], None]
    planted: dict[str, str | None] = field(default_factory=dict)
    jobs: dict[int, set[str]] = field(default_factory=dict)
    recoveries: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def submit(self, count: int) -> None:
        """A job over `count` new pictures, some of which are not what they seem."""
        folder = self.pictures / f"{len(self.jobs):03}"
        mark = len(self.jobs)
        special = {f"{mark:03}-full.png": FULL, f"{mark:03}-broken.png": BROKEN}
        kinds = {
            f"{mark:03}-full.png": "gpu_oom",
            f"{mark:03}-broken.png": "internal",
            f"{mark:03}-text.png": "not_image",
        }
        if mark == 0:
            special["poison.png"], kinds["poison.png"] = POISON, "crashed_worker"
        draw_pictures(folder, max(count - len(kinds), 0), special=special)
        (folder / f"{mark:03}-text.png").write_text("not a picture")
        keys = {path.name for path in folder.iterdir()}
        self.planted |= {key: kinds.get(key) for key in keys}
        job = self.fleet.deployment.submit(self.fleet.store.source(f"{folder.name}/"))
        self.jobs[job] = keys

    def outcomes(self) -> int:
        with self.fleet.deployment.engine.begin() as db:
            return int(db.execute(text("SELECT count(*) FROM outcome")).scalar_one())

    def meet(self, name: str) -> None:
        """Let a fault happen, keep the fleet up, and wait for the next outcome."""
        KINDS[name](self.fleet)
        over, before = time.monotonic(), self.outcomes()
        wait_for(lambda: self._goes_on(before), f"an outcome after: {name}", PATIENCE_SECONDS, logs=self._logs)
        self.recoveries[name].append(time.monotonic() - over)
        self.progress(table(report(None, dict(self.recoveries))))

    def finish(self) -> None:
        """Wait for the end of all jobs. What was forbidden for a while is retried, as an operator does."""
        wait_for(self._is_over, "the jobs to be over", 3600, logs=self._logs)
        for job in self.jobs:
            while "forbidden" in self.fleet.deployment.read(job)[1].failed_by_kind:
                self.fleet.deployment.call("retry", str(job), "--kind", "forbidden")
                wait_for(self._is_over, "the retried assets", 3600, logs=self._logs)

    def _is_over(self) -> bool:
        self.fleet.keep_up()
        return self.fleet.is_over()

    def _goes_on(self, before: int) -> bool:
        return self._is_over() or self.outcomes() > before

    def _logs(self) -> str:
        return self.fleet.deployment.logs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=int, default=300)
    parser.add_argument("--faults", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(KINDS), help="this kind alone")
    parser.add_argument("--out", type=Path, default=Path("out") / "campaign.md", help="the table, fault by fault")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of a table")
    args = parser.parse_args()
    guard()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, seed {args.seed}\n\n"
    books, recoveries = run(
        args.assets,
        args.faults,
        seed=args.seed,
        only=args.only,
        progress=lambda so_far: replace_text(args.out, head + so_far),
    )
    document = report(books, recoveries)
    replace_text(args.out, head + table(document))
    print(json.dumps(document, indent=2) if args.json else table(document))
    sys.exit(0 if books.balanced else 1)


def replace_text(path: Path, text: str) -> None:
    making = path.with_name(path.name + ".making")
    making.write_text(text + "\n")
    making.replace(path)


def run(
    assets: int,
    faults: int,
    *,
    seed: int = 1,
    only: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Books, dict[str, list[float]]]:
    """Run a campaign on servers of its own. Returns the books, and the recoveries by kind in seconds."""
    program = redis_program()
    if program is None:
        sys.exit("no Redis: put redis-server or valkey-server on PATH")
    with (
        tempfile.TemporaryDirectory(prefix="maskfleet-campaign-") as name,
        EmbeddedPostgres(Path(name) / "data", durable=False) as postgres,
    ):
        folder = Path(name)
        (folder / "redis").mkdir()
        (folder / "logs").mkdir()
        (folder / "pictures").mkdir()
        with (
            serve_redis(program, folder / "redis") as redis_url,
            serve_store(folder / "pictures") as store,
        ):
            migrate(postgres.url)
            deployment = Deployment(
                database_url=postgres.url,
                broker_url=f"{redis_url}/0",
                folder=folder / "logs",
                engine=open_engine(postgres.url),
                settings={
                    "MASKFLEET_STUB_SECONDS": "0.05",
                    "MASKFLEET_STUB_CALLS": str(folder / "calls"),
                    "MASKFLEET_S3_ENDPOINT": store.endpoint,
                    "AWS_ACCESS_KEY_ID": "key",
                    "AWS_SECRET_ACCESS_KEY": "secret",
                },
            )
            fleet = Fleet(deployment=deployment, store=store, random=random.Random(seed))
            campaign = Campaign(fleet=fleet, pictures=folder / "pictures", calls=folder / "calls", progress=progress)
            try:
                go(campaign, assets, list(schedule(faults, random.Random(seed), only)))
            finally:
                deployment.stop_all()
            books = check(deployment.engine, planted=campaign.planted, jobs=campaign.jobs, calls=campaign.calls)
            deployment.engine.dispose()
    return books, dict(campaign.recoveries)


def schedule(faults: int, chance: random.Random, only: str | None) -> Iterator[str]:
    """The names of the faults: all kinds in turn, each round in another order."""
    names: list[str] = []
    for _ in range(faults):
        if not names:
            names = [only] if only else chance.sample(sorted(KINDS), len(KINDS))
        yield names.pop()


def go(campaign: Campaign, assets: int, names: list[str]) -> None:
    """Spread the faults over the assets, one job after the other, and wait for the end."""
    sizes = [min(ASSETS_A_JOB, assets - start) for start in range(0, assets, ASSETS_A_JOB)]
    campaign.fleet.keep_up()
    for number, size in enumerate(sizes):
        campaign.submit(size)
        first, last = (len(names) * n // len(sizes) for n in (number, number + 1))
        for name in names[first:last]:
            campaign.meet(name)
        campaign.finish()


def report(books: Books | None, recoveries: dict[str, list[float]]) -> dict[str, Any]:
    """books: None while the campaign goes on."""
    by_fault = [
        {"fault": name, "count": len(seconds), "longest_recovery_s": round(max(seconds), 1)}
        for name, seconds in sorted(recoveries.items())
    ]
    longest = max((row["longest_recovery_s"] for row in by_fault), default=0.0)
    faults = sum(row["count"] for row in by_fault)
    return {**(asdict(books) if books else {}), "faults": faults, "longest_recovery_s": longest, "by_fault": by_fault}


def table(document: dict[str, Any]) -> str:
    lines = ["| fault | count | longest recovery, s |", "|---|---|---|"]
    lines += [f"| {row['fault']} | {row['count']} | {row['longest_recovery_s']:.1f} |" for row in document["by_fault"]]
    counts = {name: value for name, value in document.items() if name != "by_fault"}
    return "\n".join([*lines, "", *(f"{name:20} {value}" for name, value in counts.items())])


if __name__ == "__main__":
    main()
