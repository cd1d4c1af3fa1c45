"""What the protocol of chunks promises, in plain Python: a model that the real queries are compared with.

The model knows each job's state, each chunk's state and holder, each asset's outcome, and each suspect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from db.leases import ClaimedChunk
from db.queue import MAX_DEATHS_ALONE

ACTIVE = ("listing", "running")


@dataclass
class ModelJob:
    id: int
    state: str = "listing"
    listed: bool = False
    keys: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Claim:
    """A chunk as a worker holds it, or believes so. todo: the assets that it has no outcome of yet."""

    chunk: ClaimedChunk
    todo: list[int]


@dataclass
class ModelChunk:
    """holder: whose lease it is, while it runs. paused: released after a temporary error, not ready yet."""

    id: int
    job: ModelJob
    assets: dict[int, str]
    state: str = "new"
    was_claimed: bool = False
    holder: Claim | None = None
    expired: bool = False
    paused: bool = False
    in_flight: list[int] = field(default_factory=list)

    def give_back(self) -> None:
        self.state, self.holder, self.expired, self.in_flight = "new", None, False, []


@dataclass
class Model:
    jobs: dict[int, ModelJob] = field(default_factory=dict)
    chunks: dict[int, ModelChunk] = field(default_factory=dict)
    outcomes: dict[int, str | None] = field(default_factory=dict)  # the error kind of each asset, None for labeled
    suspects: dict[int, int] = field(default_factory=dict)  # deaths while alone

    def may_claim(self, chunk_id: int) -> bool:
        chunk = self.chunks.get(chunk_id)
        return chunk is not None and chunk.state in ("new", "sent") and chunk.job.state in ACTIVE

    def may_write(self, claim: Claim) -> bool:
        chunk = self.chunks.get(claim.chunk.id)
        return chunk is not None and chunk.holder is claim and chunk.job.state in ACTIVE

    def pending(self, chunk: ModelChunk) -> list[int]:
        """In the order in which a worker takes them: suspects last."""
        waiting = [asset for asset in chunk.assets if asset not in self.outcomes]
        return sorted(waiting, key=lambda asset: (asset in self.suspects, asset))

    def answered(self, chunk: ModelChunk) -> list[int]:
        """The assets of a chunk that an earlier job labeled under the same key."""
        labeled = {
            key
            for earlier in self.chunks.values()
            for asset, key in earlier.assets.items()
            if earlier.job.id < chunk.job.id and self.outcomes.get(asset, "none") is None
        }
        return [asset for asset, key in chunk.assets.items() if asset not in self.outcomes and key in labeled]

    def reap(self) -> int:
        dead = [chunk for chunk in self.chunks.values() if chunk.state == "running" and chunk.expired]
        for chunk in dead:
            alone = len(chunk.in_flight) == 1
            for asset in chunk.in_flight:
                if asset not in self.outcomes:
                    self.suspects[asset] = self.suspects.get(asset, 0) + alone
                    if self.suspects[asset] >= MAX_DEATHS_ALONE:
                        self.outcomes[asset] = "crashed_worker"
            chunk.give_back()
        return len(dead)

    def unsend(self, job: ModelJob) -> None:
        for chunk in self.chunks.values():
            if chunk.job is job and chunk.state == "sent":
                chunk.state = "new"

    def retry(self, job: ModelJob, kind: str | None) -> int:
        again = [
            asset
            for chunk in self.chunks.values()
            if chunk.job is job
            for asset in chunk.assets
            if (found := self.outcomes.get(asset)) is not None and kind in (None, found)
        ]
        for asset in again:
            del self.outcomes[asset]
            self.suspects.pop(asset, None)
        for chunk in self.chunks.values():
            if chunk.assets.keys() & set(again):
                chunk.give_back()
                chunk.paused, chunk.was_claimed = False, True  # its token grew
        if again and job.state == "done":
            job.state = "running"
        return len(again)

    def delete(self, job: ModelJob) -> None:
        for chunk in [chunk for chunk in self.chunks.values() if chunk.job is job]:
            for asset in chunk.assets:
                self.outcomes.pop(asset, None)
                self.suspects.pop(asset, None)
            del self.chunks[chunk.id]
        del self.jobs[job.id]

    def finish(self) -> list[int]:
        open_jobs = {chunk.job.id for chunk in self.chunks.values() if chunk.state != "done"}
        over = [job for job in self.jobs.values() if job.state == "running" and job.id not in open_jobs]
        for job in over:
            job.state = "done"
        return [job.id for job in over]
