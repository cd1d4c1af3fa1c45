"""A fleet that is kept up, as an orchestrator of containers would: what dies is started again."""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field

import psutil
import redis
from sqlalchemy import text

from tests.deployment import Deployment
from tests.faults.store import Store

WORKERS, DISPATCHERS = 2, 1


@dataclass
class Fleet:
    """Two workers and a dispatcher of a deployment, over a store. random: chooses whom a fault meets."""

    deployment: Deployment
    store: Store
    random: random.Random
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    dispatchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def keep_up(self) -> None:
        """Start what is not there any more."""
        for processes, command, wanted in (
            (self.workers, ("worker", "--devices", "cpu"), WORKERS),
            (self.dispatchers, ("dispatch",), DISPATCHERS),
        ):
            processes[:] = [process for process in processes if process.poll() is None]
            while len(processes) < wanted:
                processes.append(self.deployment.start(*command))

    def worker(self) -> subprocess.Popen[bytes]:
        return self.random.choice(self.workers)

    def celery_main(self) -> psutil.Process | None:
        mains = self.deployment.celery_mains(self.worker())
        return self.random.choice(mains) if mains else None

    def child(self) -> psutil.Process | None:
        """A process that labels, if one is up."""
        children = [child for worker in self.workers for child in self.deployment.pool_children(worker)]
        return self.random.choice(children) if children else None

    def is_over(self) -> bool:
        """Whether all jobs are done."""
        with self.deployment.engine.begin() as db:
            return not db.execute(text("SELECT count(*) FROM job WHERE state <> 'done'")).scalar_one()

    def broker(self) -> redis.Redis:
        return redis.Redis.from_url(self.deployment.broker_url)
