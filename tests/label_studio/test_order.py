"""In which order `publish` and `review` write: what is stored before a request, and before the watermark moves."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from db.publishing import LsProject
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import publish_job
from orchestrator.label_studio.review import pull
from orchestrator.label_studio.review_numbers import read_review
from tests.label_studio.jobs import labeled_job as any_job
from tests.label_studio.proxy import Proxy
from tests.label_studio.reviewing import Project, labeled_job, publish
from tests.label_studio.server import Server
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.label_studio]


@pytest.fixture
def project_id(client: LabelStudio, request: pytest.FixtureRequest) -> int:
    return client.create_project(title=request.node.name[:50], label_config=label_config(["car"])).id


def states(engine: Engine) -> Counter[str]:
    with engine.begin() as db:
        return Counter(db.execute(text("SELECT state FROM ls_prediction")).scalars())


def tasks_an_asset(client: LabelStudio, project_id: int) -> Counter[int]:
    """How many assets have how many tasks."""
    return Counter(Counter(task["data"]["asset_id"] for task in client.list_tasks(project_id)).values())


def test_what_a_request_carries_is_in_the_outbox_before_the_server_sees_it(
    engine: Engine, through_proxy: LabelStudio, proxy: Proxy, project_id: int
) -> None:
    job = any_job(engine, keys=120)
    seen: list[int] = []
    proxy.before_import = lambda: seen.append(states(engine).total())

    publish_job(engine, through_proxy, job, project_id, Options())

    assert len(seen) == 2
    assert seen[0] >= 50
    assert seen[1] == 120


def test_what_a_dead_publisher_left_in_doubt_is_looked_up_and_not_sent_again(
    engine: Engine, client: LabelStudio, project_id: int
) -> None:
    job = any_job(engine, keys=20)
    publish_job(engine, client, job, project_id, Options())
    with engine.begin() as db:  # as a publisher leaves them that died before the answers came
        db.execute(text("UPDATE ls_prediction SET state = 'sending'"))
        db.execute(text("UPDATE ls_task SET task_id = NULL"))

    report = publish_job(engine, client, job, project_id, Options(settle_seconds=0, late_seconds=0))

    assert (report.created, report.adopted) == (0, 20)
    assert states(engine) == {"done": 20}
    assert tasks_an_asset(client, project_id) == {1: 20}


def test_a_second_publisher_waits_until_the_first_is_through(
    engine: Engine, client: LabelStudio, label_studio: Server, proxy: Proxy, project_id: int
) -> None:
    job = any_job(engine, keys=20)
    at_request, go_on, second_waits = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        at_request.set()
        go_on.wait(300)

    proxy.before_import = hold
    token = label_studio.token
    with (
        LabelStudio(proxy.url, token) as of_first,
        LabelStudio(proxy.url, token) as of_second,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(publish_job, engine, of_first, job, project_id, Options())
        assert at_request.wait(300)
        second = pool.submit(publish_job, engine, of_second, job, project_id, Options(), waiting=second_waits.set)
        wait_for(lambda: second_waits.is_set() or second.done(), "the second publisher", seconds=200)
        go_on.set()
        reports = [first.result(300), second.result(300)]

    assert second_waits.is_set()
    assert [report.created for report in reports] == [20, 0]
    assert tasks_an_asset(client, project_id) == {1: 20}


def test_a_gateway_that_hands_a_request_on_after_its_504_doubles_nothing(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project_id: int
) -> None:
    job = any_job(engine, keys=70)
    proxy.spoil, proxy.late_seconds = ["late"], 5.0

    report = publish_job(engine, through_proxy, job, project_id, Options(settle_seconds=60))

    wait_for(lambda: proxy.handed_on_late == 1, "the late request")
    assert (report.created, report.adopted) == (20, 50)
    assert tasks_an_asset(client, project_id) == {1: 70}


def test_a_request_that_arrives_after_its_entries_were_sent_again_is_removed_before_the_pass_ends(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project_id: int
) -> None:
    job = any_job(engine, keys=70)
    proxy.spoil, proxy.late_seconds = ["late"], 8.0

    report = publish_job(engine, through_proxy, job, project_id, Options(settle_seconds=0.5, late_seconds=30))

    assert proxy.handed_on_late == 1
    assert (report.created, report.duplicates_removed) == (70, 50)
    assert tasks_an_asset(client, project_id) == {1: 70}


KEYS = [f"{n:02}.jpg" for n in range(30)]  # a reader reads 20 tasks at a time


def an_annotated_project(engine: Engine, client: LabelStudio, server: Server) -> tuple[Project, object]:
    job = labeled_job(engine, KEYS, lambda key, asset_id: [])
    project = publish(engine, client, server, job)
    for task in project.tasks().values():
        project.submit(task, [])
    return project, job


def test_a_reader_that_is_stopped_between_two_pages_reads_the_rest_the_next_time(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    project, job = an_annotated_project(engine, client, label_studio)

    class Stopped(Exception):
        pass

    def stop(count: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        pull(engine, client, project.id, progress=stop)
    with engine.begin() as db:  # long after, when no overlap helps
        db.execute(text("UPDATE ls_pull SET watermark = watermark + interval '5 minutes'"))
    pull(engine, client, project.id)

    assert read_review(engine, job, LsProject(client.url, project.id)).assets.untouched == len(KEYS)


def test_no_task_is_skipped_when_one_is_deleted_and_another_added_between_two_pages(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    project, job = an_annotated_project(engine, client, label_studio)
    first = project.tasks()[KEYS[0]]["id"]

    def change(count: int) -> None:
        if count == 20:
            client.delete_task(first)
            client.import_tasks(project.id, b'[{"data": {"image": "s3://bucket/by-hand.jpg"}}]')

    pull(engine, client, project.id, progress=change)

    assert read_review(engine, job, LsProject(client.url, project.id)).assets.waiting == 0


def test_a_change_that_was_committed_late_with_an_earlier_time_is_read(
    engine: Engine, client: LabelStudio, label_studio: Server
) -> None:
    job = labeled_job(engine, KEYS[:2], lambda key, asset_id: [])
    project = publish(engine, client, label_studio, job)
    tasks = project.tasks()
    project.submit(tasks["00.jpg"], [])
    pull(engine, client, project.id)
    project.submit(tasks["01.jpg"], [])
    with engine.begin() as db:  # another change, with a later time, was seen before this one
        db.execute(text("UPDATE ls_pull SET watermark = watermark + interval '30 seconds'"))

    pull(engine, client, project.id)

    assert read_review(engine, job, LsProject(client.url, project.id)).assets.untouched == 2
