"""No job waits behind another one: bounds in chunks that are handed out, whatever the machine's speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from kombu import Consumer, Message
from sqlalchemy import Engine, text

from db import queue
from db.jobs import Job
from tests.factories import claim, count, finish, labeled, make_job, pending, record
from workers.running.app import EMBED_QUEUE, FIRST_QUEUE, QUEUES, make_app, publish_chunks, publish_embeds

pytestmark = pytest.mark.integration

WORKERS = 2


def set_priority(engine: Engine, job: Job, priority: int) -> None:
    with engine.begin() as db:
        assert queue.set_priority(db, job_id=job.id, priority=priority)


class Queued:
    """A broker that hands out the first message, and a worker that labels its chunk and fills the queue up."""

    def __init__(self, engine: Engine, *, most: int = 64) -> None:
        self.engine, self.most = engine, most
        self.first: list[int] = []
        self.messages: list[int] = []
        self.handed_out: list[int] = []  # the job of each chunk
        self.fill_up()

    def fill_up(self) -> None:
        with self.engine.begin() as db:
            self.jobs = queue.count_active(db)
            self.window = queue.window_of(workers=WORKERS, jobs=self.jobs, most=self.most)
            taken = queue.take_window(db, window=self.window)
        self.first += taken.returned
        self.messages += taken.new

    def hand_out(self, chunks: int) -> Sequence[int]:
        """The jobs of the next chunks, which are labeled."""
        for _ in range(chunks):
            chunk = claim(self.engine, (self.first or self.messages).pop(0))
            assert chunk is not None
            record(self.engine, chunk, [labeled(asset.id, masks=0) for asset in pending(self.engine, chunk)])
            finish(self.engine, chunk)
            self.handed_out.append(chunk.job_id)
            self.fill_up()
        return self.handed_out[-chunks:]

    def longest_wait(self, job: Job, *, since: int) -> int:
        """The most chunks of others that were handed out before one of the job."""
        waits, wait = [0], 0
        for handed_out in self.handed_out[since:]:
            wait = 0 if handed_out == job.id else wait + 1
            waits.append(wait)
        return max(waits)


def test_a_small_job_waits_for_no_more_chunks_than_the_stated_bound_whoever_came_first(engine: Engine) -> None:
    large = make_job(engine, keys=400, chunk_size=1)
    work = Queued(engine)
    work.hand_out(5)
    small = make_job(engine, keys=6, chunk_size=1)
    since, bound = len(work.handed_out), queue.longest_wait(window=queue.window_of(workers=2, jobs=2, most=64), jobs=2)

    work.hand_out(bound + 12)

    assert bound == 11
    assert work.longest_wait(small, since=since) <= bound
    assert count(engine, small).pending == 0
    assert count(engine, large).labeled == 5 + bound + 12 - 6


def test_each_step_of_priority_doubles_a_jobs_share_of_what_is_handed_out(engine: Engine) -> None:
    usual, urgent = (make_job(engine, keys=300, chunk_size=1) for _ in range(2))
    work = Queued(engine)
    set_priority(engine, urgent, 7)
    work.hand_out(work.window)  # what was in the queue before stays there

    taken = work.hand_out(100)

    assert taken.count(urgent.id) == 80  # four to one
    set_priority(engine, urgent, 4)
    work.hand_out(work.window)
    assert 54 <= work.hand_out(90).count(usual.id) <= 66  # two to one, as far as ten places allow


@pytest.mark.parametrize("jobs_at_work", [3, 12])
def test_no_job_is_left_out_beside_urgent_ones_though_there_are_more_than_the_queue_has_places(
    engine: Engine, jobs_at_work: int
) -> None:
    urgent = [make_job(engine, keys=100, chunk_size=1) for _ in range(jobs_at_work - 1)]
    for job in urgent:
        set_priority(engine, job, queue.HIGHEST_PRIORITY)
    work = Queued(engine, most=6)
    work.hand_out(3)
    last = make_job(engine, keys=9, chunk_size=1)
    set_priority(engine, last, queue.LOWEST_PRIORITY)
    work.hand_out(4 * (6 + jobs_at_work))

    assert work.longest_wait(last, since=3) <= queue.longest_wait(window=6, jobs=jobs_at_work)
    assert work.handed_out.count(last.id) >= 4


def test_what_a_dead_worker_had_comes_first_and_takes_no_share_from_others(engine: Engine) -> None:
    first, second = (make_job(engine, keys=50, chunk_size=1) for _ in range(2))
    work = Queued(engine)
    with engine.begin() as db:  # as after a worker's death: the token has grown
        db.execute(
            text("UPDATE chunk SET token = 1 WHERE job_id = :id AND state = 'new' AND id % 8 = 0"), {"id": first.id}
        )
    work.fill_up()
    returned = len(work.first)

    assert returned
    assert set(work.hand_out(returned)) == {first.id}
    taken = work.hand_out(20)
    assert taken.count(second.id) >= 8


def test_the_queue_is_two_chunks_a_worker_and_one_a_job_and_never_more_than_was_set() -> None:
    assert queue.window_of(workers=0, jobs=1, most=64) == 9
    assert queue.window_of(workers=1, jobs=3, most=64) == 11
    assert queue.window_of(workers=8, jobs=1, most=64) == 17
    assert queue.window_of(workers=200, jobs=5, most=64) == 64
    assert queue.window_of(workers=0, jobs=1, most=2) == 2


@pytest.mark.parametrize(("broker", "most"), [("redis", 0), ("folder", 2)])
def test_an_embedding_that_somebody_waits_for_comes_before_chunks(
    broker: str, most: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if broker == "redis":
        request.getfixturevalue("redis")
        app = make_app(request.getfixturevalue("redis_url"))
    else:
        app = make_app(f"filesystem://{tmp_path / 'broker'}")
    publish_chunks(range(10), broker=app)
    publish_chunks(range(10, 20), queue=FIRST_QUEUE, broker=app)
    publish_embeds([1, 2], broker=app)
    handed_out: list[str] = []

    def note(_: object, message: Message) -> None:
        handed_out.append(message.delivery_info["routing_key"])
        message.ack()

    with (
        app.connection_for_read() as connection,
        Consumer(connection, [app.amqp.queues[name] for name in QUEUES], callbacks=[note], accept=["json"]) as consumer,
    ):
        consumer.qos(prefetch_count=1)  # as a worker's
        while EMBED_QUEUE not in handed_out:
            connection.drain_events(timeout=60)

    assert handed_out.index(EMBED_QUEUE) <= most
