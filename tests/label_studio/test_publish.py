"""`maskfleet publish` and `maskfleet label-studio setup` on a real Label Studio."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, text

from db import published
from db.jobs import Job
from orchestrator.export.coco import export_coco
from orchestrator.label_studio.addresses import PublishError, asset_uid
from orchestrator.label_studio.answers import Project
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import ConfigError, label_config
from orchestrator.label_studio.entries import MAX_BYTES
from orchestrator.label_studio.errors import Refused, Unavailable
from orchestrator.label_studio.publication import Options
from orchestrator.label_studio.publish import follow_project, publish_job
from orchestrator.label_studio.report import Report
from orchestrator.label_studio.setup import Wanted, make_project, set_up_project
from tests.factories import chunk_ids
from tests.json_page import documented_keys
from tests.label_studio.jobs import SIZE_HW, label_chunk, labeled_job, noise, read_job, ring, rings
from tests.label_studio.proxy import Proxy
from tests.label_studio.server import Server, personal_access_token
from tests.waiting import wait_for
from workers.masks import encode_counts

pytestmark = [pytest.mark.integration, pytest.mark.label_studio]

VERSION = "stub@55555555+00000000"
SECOND_VERSION = "stub@66666666+00000000"
AT_ONCE = Options(settle_seconds=0, late_seconds=0)  # nothing is at work in the server that a test does not wait for
MASKFLEET = [sys.executable, "-P", "-m", "orchestrator.cli"]


@pytest.fixture
def project(client: LabelStudio, request: pytest.FixtureRequest) -> Project:
    return client.create_project(title=request.node.name[:50], label_config=label_config(["car"]))


# ----------------------------------------------------------------------------------------------- once, whatever happens


def test_publishing_twice_makes_one_task_and_one_prediction_an_asset(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=130)

    first = publish_job(engine, client, job, project.id, Options())
    second = publish_job(engine, client, job, project.id, Options())

    assert (first.created, first.refused, first.shown_version) == (130, [], VERSION)
    assert (second.created, second.attached, second.adopted) == (0, 0, 0)
    assert_once(client, project, job, versions=[VERSION], assets=130)


def test_a_task_carries_the_image_and_a_prediction_carries_the_masks(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=["a folder/ümlaut 1.jpg"])

    publish_job(engine, client, job, project.id, Options())

    task = next(client.list_tasks(project.id, whole=True))
    uri = "s3://bucket/photos/a folder/ümlaut 1.jpg"
    assert task["data"] == {"image": uri, "asset_id": asset_uid(uri), "width": 80, "height": 60}
    [prediction] = task["predictions"]
    asset_id = published_rows(engine)[0]
    assert [region["id"] for region in prediction["result"]] == [f"m{asset_id}-0", f"m{asset_id}-1"]
    assert {region["origin"] for region in prediction["result"]} == {"prediction"}
    assert [region["value"]["polygonlabels"] for region in prediction["result"]] == [["car"], ["car"]]
    assert 0 <= prediction["score"] <= 1
    assert all(0 <= region["score"] <= 1 for region in prediction["result"])


def test_a_publisher_that_is_killed_anywhere_and_runs_again_leaves_everything_once(
    engine: Engine, database_url: str, label_studio: Server, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=250, masks=rings(8))
    words = ["publish", str(job.id), "--project", str(project.id)]

    for done in (1, 150):
        process = start(label_studio, database_url, *words)
        wait_for(lambda done=done: count(engine, "state = 'done'") >= done, f"{done} predictions")
        process.kill()
        process.wait()
    call(label_studio, database_url, *words)

    assert_once(client, project, job, versions=[VERSION], assets=250)


def test_two_publishers_at_once_leave_everything_once(
    engine: Engine, database_url: str, label_studio: Server, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=250)
    words = ["publish", str(job.id), "--project", str(project.id)]

    processes = [start(label_studio, database_url, *words) for _ in range(2)]

    assert [process.wait(300) for process in processes] == [0, 0]
    assert_once(client, project, job, versions=[VERSION], assets=250)


def test_an_outbox_that_was_lost_is_made_again_from_the_server(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=20)
    publish_job(engine, client, job, project.id, Options())
    with engine.begin() as db:
        db.execute(text("DELETE FROM ls_task"))

    report = publish_job(engine, client, job, project.id, Options())

    assert (report.created, report.adopted) == (0, 20)
    assert_once(client, project, job, versions=[VERSION], assets=20)


def test_what_was_deleted_on_the_server_is_put_back_and_what_is_there_twice_is_made_one(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=5)
    publish_job(engine, client, job, project.id, Options())
    tasks = list(client.list_tasks(project.id, whole=True))
    client.delete_task(tasks[0]["id"])
    copy = {"data": tasks[1]["data"], "predictions": [{"model_version": VERSION, "score": 0.5, "result": []}]}
    client.import_tasks(project.id, json.dumps([copy]).encode())
    extra = {"task": tasks[2]["id"], "model_version": VERSION, "score": 0.5, "result": []}
    client.import_predictions(project.id, json.dumps([extra]).encode())

    report = publish_job(engine, client, job, project.id, AT_ONCE)

    assert (report.repaired, report.created, report.duplicates_removed) == (1, 1, 2)
    assert_once(client, project, job, versions=[VERSION], assets=5)


def test_a_duplicate_that_somebody_worked_on_is_kept_and_said(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=1)
    publish_job(engine, client, job, project.id, Options())
    task = next(client.list_tasks(project.id))
    copy = {"data": task["data"], "predictions": [{"model_version": VERSION, "score": 0.5, "result": []}]}
    annotated = copy | {"annotations": [{"result": []}]}
    imported = client.import_tasks(project.id, json.dumps([annotated, copy]).encode())

    report = publish_job(engine, client, job, project.id, AT_ONCE)

    assert report.duplicates_removed == 2
    assert [found["id"] for found in client.list_tasks(project.id)] == [imported.task_ids[0]]


# ------------------------------------------------------------------------------------------------------------- versions


def test_a_second_version_attaches_to_the_same_tasks_and_is_shown_when_all_of_it_is_there(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project: Project
) -> None:
    first = labeled_job(engine, keys=120)
    publish_job(engine, through_proxy, first, project.id, Options())
    task = next(client.list_tasks(project.id, whole=True))
    used = task["predictions"][0]
    annotated = client.get_task(task["id"])
    annotate(client, annotated["id"], parent_prediction=used["id"], result=used["result"])
    second = labeled_job(engine, keys=120, masks=rings(1), model_version=SECOND_VERSION)
    proxy.requests.clear()

    report = publish_job(engine, through_proxy, second, project.id, Options())

    assert (report.created, report.attached, report.shown_version) == (0, 120, SECOND_VERSION)
    assert_once(client, project, second, versions=[VERSION, SECOND_VERSION], assets=120)
    writes = [(method, path) for method, path, _ in proxy.requests if method != "GET"]
    assert [method for method, _ in writes] == ["POST", "POST", "PATCH"], "shown after the imports, never before"
    assert client.get_project(project.id).model_version == SECOND_VERSION
    assert client.get_task(task["id"])["annotations"][0]["parent_prediction"] == used["id"]


def test_a_job_that_still_runs_takes_the_shown_version_from_no_other(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    publish_job(engine, client, labeled_job(engine, keys=70), project.id, Options())
    running = labeled_job(engine, keys=70, model_version=SECOND_VERSION, done=False)

    halfway = publish_job(engine, client, running, project.id, Options())
    label_chunk(engine, chunk_ids(engine, running)[1], rings())
    whole = publish_job(engine, client, read_job(engine, running.id), project.id, Options())

    assert (halfway.attached, halfway.shown_version) == (64, VERSION)
    assert (whole.attached, whole.shown_version) == (6, SECOND_VERSION)


def test_a_rerun_with_the_same_version_adds_nothing(engine: Engine, client: LabelStudio, project: Project) -> None:
    publish_job(engine, client, labeled_job(engine, keys=5), project.id, Options())

    report = publish_job(engine, client, labeled_job(engine, keys=5), project.id, Options())

    assert (report.created, report.attached, report.already) == (0, 0, 5)


def test_what_was_there_before_is_counted_once_by_a_pass_that_sends_twice(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    publish_job(engine, client, labeled_job(engine, keys=5), project.id, Options())
    job = labeled_job(engine, keys=10)
    publish_job(engine, client, job, project.id, Options())
    with engine.begin() as db:  # as a publisher leaves it that died at its request
        gone = db.execute(
            text(
                """UPDATE ls_prediction SET state = 'sending', sent_at = now()
                   WHERE ls_task_id = (SELECT min(ls_task_id) FROM ls_prediction WHERE job_id = :id)
                   RETURNING (SELECT task_id FROM ls_task WHERE id = ls_task_id)"""
            ),
            {"id": job.id},
        )
        client.delete_task(gone.scalar_one())
    moved: list[int] = []

    options = Options(settle_seconds=3, late_seconds=0)
    report = publish_job(engine, client, job, project.id, options, progress=moved.append)

    assert (report.created, report.already, sum(moved)) == (1, 5, 6)
    assert_once(client, project, job, versions=[VERSION], assets=10)


def test_a_number_that_the_server_gave_to_another_task_is_not_written_to(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    """Label Studio on SQLite gives the highest number again after its task was deleted."""
    publish_job(engine, client, labeled_job(engine, keys=3), project.id, Options())
    *_, last = client.list_tasks(project.id)
    client.delete_task(last["id"])
    foreign = {"data": {"image": "s3://bucket/other.jpg"}, "predictions": [{"result": [], "model_version": VERSION}]}
    assert client.import_tasks(project.id, json.dumps([foreign]).encode()).task_ids == (last["id"],)
    second = labeled_job(engine, keys=3, model_version=SECOND_VERSION)

    report = publish_job(engine, client, second, project.id, Options())

    assert (report.attached, report.created) == (2, 1)
    versions = Counter(p["model_version"] for p in client.get_task(last["id"])["predictions"])
    assert versions == {VERSION: 1}


def test_follow_keeps_up_with_a_running_job_and_ends_with_it(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=130, done=False)
    passes: list[Report] = []
    arguments = {"job_id": job.id, "stop": threading.Event(), "published_pass": lambda _, report: passes.append(report)}
    thread = threading.Thread(target=follow_project, args=(engine, client, project.id, Options()), kwargs=arguments)

    thread.start()
    wait_for(lambda: passes, "the first pass")
    for chunk_id in chunk_ids(engine, job)[1:]:
        label_chunk(engine, chunk_id, rings())
    thread.join(300)

    assert not thread.is_alive()
    assert passes[0].created == 64
    assert sum(report.created for report in passes) == 130
    assert_once(client, project, job, versions=[VERSION], assets=130)


# ----------------------------------------------------------------------------------------------- servers that misbehave


@pytest.mark.parametrize("spoil", ["500", "504", "drop", "503"])
def test_an_answer_that_is_lost_is_looked_up_and_nothing_is_sent_twice(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project: Project, spoil: str
) -> None:
    job = labeled_job(engine, keys=120)
    proxy.spoil = [spoil]

    report = publish_job(engine, through_proxy, job, project.id, Options(settle_seconds=2, late_seconds=0))

    arrived = spoil != "503"
    assert (report.adopted, report.created) == ((50, 70) if arrived else (0, 120))
    assert len(proxy.imports()) == (2 if arrived else 3)
    assert_once(client, project, job, versions=[VERSION], assets=120)


def test_requests_hold_at_most_8_mb_and_100_tasks_so_a_proxy_that_cuts_at_10_mb_lets_them_through(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project: Project
) -> None:
    job = labeled_job(engine, keys=30, masks=lambda asset_id: [noise(asset_id, n) for n in range(20)])

    report = publish_job(engine, through_proxy, job, project.id, Options(as_="brush"))

    assert report.created == 30
    assert sum(proxy.imports()) > MAX_BYTES
    assert max(proxy.imports()) <= MAX_BYTES
    assert_once(client, project, job, versions=[VERSION], assets=30)


def test_a_proxy_that_takes_less_gets_smaller_requests(
    engine: Engine, client: LabelStudio, through_proxy: LabelStudio, proxy: Proxy, project: Project
) -> None:
    job = labeled_job(engine, keys=150, masks=rings(10))
    proxy.max_body = 250_000

    report = publish_job(engine, through_proxy, job, project.id, Options())

    assert (report.created, report.refused) == (150, [])
    assert_once(client, project, job, versions=[VERSION], assets=150)


def test_a_wrong_token_or_address_is_an_error_with_its_remedy(
    engine: Engine, database_url: str, label_studio: Server, project: Project
) -> None:
    job = labeled_job(engine, keys=1)
    words = ["publish", str(job.id), "--project", str(project.id)]

    refused = call(label_studio, database_url, *words, code=2, MASKFLEET_LABEL_STUDIO_API_KEY="0" * 40)
    nobody = call(label_studio, database_url, *words, code=2, MASKFLEET_LABEL_STUDIO_URL="http://127.0.0.1:9")
    unknown = call(label_studio, database_url, *words[:-1], "99999", code=2)

    assert "set MASKFLEET_LABEL_STUDIO_API_KEY to a token" in refused
    assert "start it, or fix MASKFLEET_LABEL_STUDIO_URL" in nobody
    assert "has no project 99999" in unknown
    assert "label-studio setup" in unknown


def test_a_personal_access_token_works_and_is_renewed(
    engine: Engine, label_studio: Server, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=3)
    with LabelStudio(label_studio.url, personal_access_token(label_studio)) as personal:
        personal.check()
        personal._http.client.auth._access = "eyJhbGciOiJIUzI1NiJ9.e30.spoilt"  # as if its five minutes were over

        report = publish_job(engine, personal, job, project.id, Options())

    assert report.created == 3
    assert_once(client, project, job, versions=[VERSION], assets=3)


def test_a_personal_access_token_that_was_never_given_out_is_refused(label_studio: Server) -> None:
    with (
        LabelStudio(label_studio.url, "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbl90eXBlIjoicmVmcmVzaCJ9.c2lnbmF0dXJl") as stranger,
        pytest.raises(Refused, match="set MASKFLEET_LABEL_STUDIO_API_KEY"),
    ):
        stranger.check()


# ---------------------------------------------------------------------------------------------------- what does not fit


def test_a_config_without_the_controls_is_refused_with_the_lines_to_add(
    engine: Engine, client: LabelStudio, request: pytest.FixtureRequest
) -> None:
    choices = '<Choices name="c" toName="photo"><Choice value="x"/></Choices>'
    config = f'<View><Image name="photo" value="$image"/>{choices}</View>'
    project = client.create_project(title=request.node.name[:50], label_config=config)
    job = labeled_job(engine, keys=1)

    with pytest.raises(ConfigError) as refusal:
        publish_job(engine, client, job, project.id, Options())
    set_up_project(client, project, Wanted(labels=["car"], update_config=True))
    report = publish_job(engine, client, job, project.id, Options())

    assert '<PolygonLabels name="polygon" toName="photo">' in str(refusal.value)
    assert '<Label value="car"' in str(refusal.value)
    assert report.created == 1
    region = next(client.list_tasks(project.id, whole=True))["predictions"][0]["result"][0]
    assert (region["from_name"], region["to_name"]) == ("polygon", "photo")


def test_assets_whose_label_the_config_lacks_are_listed_and_the_rest_goes_on(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=4, masks=lambda asset_id: [ring(asset_id, 0, "bus" if asset_id % 4 == 0 else "car")])

    report = publish_job(engine, client, job, project.id, Options())
    set_up = set_up_project(client, client.get_project(project.id), Wanted(labels=["car", "bus"], update_config=True))
    again = publish_job(engine, client, job, project.id, Options())

    assert report.created == 3
    [(uri, reason)] = report.refused
    assert uri.startswith("s3://bucket/photos/")
    assert reason == "label 'bus' is not in <PolygonLabels name=\"polygon\"> of the labeling config"
    assert "<Label" in set_up.done[0]
    assert (again.created, again.refused) == (1, [])


def test_a_project_that_is_not_ours_is_left_alone(engine: Engine, client: LabelStudio, project: Project) -> None:
    client.import_tasks(project.id, b'[{"data": {"image": "s3://bucket/theirs.jpg"}}]')

    with pytest.raises(PublishError, match="maskfleet did not make"):
        publish_job(engine, client, labeled_job(engine, keys=1), project.id, Options())

    assert client.get_project(project.id).task_count == 1


def test_3000_masks_on_one_asset_show_the_best_150_and_the_rest_is_counted(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=1, masks=rings(3000))

    publish_job(engine, client, job, project.id, Options())

    [prediction] = next(client.list_tasks(project.id, whole=True))["predictions"]
    assert len(prediction["result"]) == 150
    assert prediction["result"][0]["id"].endswith("-0")
    with engine.begin() as db:
        [there] = published.published(db, job_id=job.id)
    assert (there.masks_shown, there.masks_left_out) == (150, 2850)
    assert there.iou_worst is not None
    assert there.iou_worst >= 0.95


def test_what_is_left_out_is_counted_in_masks_and_said(engine: Engine, client: LabelStudio, project: Project) -> None:
    """A mask of two parts counts once."""
    parts = np.zeros(SIZE_HW, bool)
    parts[5:25, 5:25] = parts[30:50, 40:70] = True
    job = labeled_job(
        engine,
        keys=2,
        masks=lambda asset_id: [
            dataclasses.replace(ring(asset_id, n), counts=encode_counts(parts), area_px=1000) for n in range(4)
        ],
    )

    report = publish_job(engine, client, job, project.id, Options(max_masks=3))

    for task in client.list_tasks(project.id, whole=True):
        assert len(task["predictions"][0]["result"]) == 6
    assert report.masks_left_out == 2
    assert [note for note in report.notes if note.startswith("2 of 8 masks are not shown: a task gets its 3 best")]


def test_assets_without_a_prompt_are_left_out_and_said(engine: Engine, client: LabelStudio, project: Project) -> None:
    job = labeled_job(engine, keys=3)
    with engine.begin() as db:  # as a worker leaves an asset that it does not look at
        db.execute(text("DELETE FROM mask WHERE asset_id = (SELECT min(asset_id) FROM outcome)"))
        # Counters see what is written and deleted, as workers do it.
        db.execute(text("CREATE TEMP TABLE unseen AS SELECT * FROM outcome ORDER BY asset_id LIMIT 1"))
        db.execute(text("DELETE FROM outcome WHERE asset_id = (SELECT asset_id FROM unseen)"))
        db.execute(text("UPDATE unseen SET width = NULL, height = NULL, mask_count = 0"))
        db.execute(text("INSERT INTO outcome SELECT * FROM unseen"))

    report = publish_job(engine, client, job, project.id, Options())

    assert (report.created, report.without_prompts) == (2, 1)
    assert [note for note in report.notes if note.startswith("1 assets have no prompt")]
    assert all(task["data"]["width"] for task in client.list_tasks(project.id))


def test_keys_that_label_studio_would_cut_are_refused_by_name(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    job = labeled_job(engine, keys=["a.jpg", "b?c.jpg", "d\te.jpg"])

    report = publish_job(engine, client, job, project.id, Options())

    assert report.created == 1
    refused = dict(report.refused)
    assert set(refused) == {"s3://bucket/photos/b?c.jpg", "s3://bucket/photos/d\te.jpg"}
    assert "'photos/b'" in refused["s3://bucket/photos/b?c.jpg"]


def test_a_dollar_in_a_label_a_header_or_a_hint_stops_nothing(
    engine: Engine, client: LabelStudio, request: pytest.FixtureRequest
) -> None:
    labels = ["US$cash", "$note", "car"]
    job = labeled_job(
        engine, keys=1, masks=lambda asset_id: [ring(asset_id, n, label) for n, label in enumerate(labels)]
    )
    project = make_project(client, request.node.name[:50], Wanted(labels=labels)).project
    dollars = project.label_config.replace("<View>", '<View><Header value="Prices over $Limit only"/>', 1)
    client.update_project(project.id, label_config=dollars.replace('value="car"', 'value="car" hint="costs $Ten"'))

    report = publish_job(engine, client, job, project.id, Options())

    assert (report.created, report.refused) == (1, [])
    with_name = dollars.replace("<Header", '<Text name="t" value="Over $Limit"/><Header')
    client.update_project(project.id, label_config=with_name)
    with pytest.raises(ConfigError, match=r"\$Limit"):
        publish_job(engine, client, job, project.id, Options())
    with pytest.raises(Refused, match="Limit"):
        client.import_tasks(project.id, b'[{"data": {"image": "s3://bucket/a.jpg"}}]')


def test_labels_with_quotes_and_letters_of_other_alphabets_arrive_as_they_are(
    engine: Engine, client: LabelStudio, request: pytest.FixtureRequest
) -> None:
    labels = ['a "quoted" <b>', "it's & more", "автобус", "猫", "🚌"]
    job = labeled_job(
        engine, keys=1, masks=lambda asset_id: [ring(asset_id, n, label) for n, label in enumerate(labels)]
    )
    project = make_project(client, request.node.name[:50], Wanted(labels=labels)).project

    report = publish_job(engine, client, job, project.id, Options())

    assert report.refused == []
    result = next(client.list_tasks(project.id, whole=True))["predictions"][0]["result"]
    assert [region["value"]["polygonlabels"][0] for region in result] == labels


# ----------------------------------------------------------------------------------------------- images, projects, show


def test_a_folder_is_published_through_local_files_or_refused_with_the_remedy(
    engine: Engine, label_studio: Server, client: LabelStudio, project: Project
) -> None:
    folder = label_studio.files / "my photos"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (80, 60), "red").save(folder / "a 1.png")
    job = labeled_job(engine, keys=["a 1.png"], source=str(folder))

    with pytest.raises(PublishError, match="LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED"):
        publish_job(engine, client, job, project.id, Options())
    with pytest.raises(PublishError, match="label-studio setup"):
        publish_job(engine, client, job, project.id, Options(local_files=str(label_studio.files)))
    set_up_project(client, project, Wanted(labels=["car"], source=job.source, local_files=True))
    report = publish_job(engine, client, job, project.id, Options(local_files=str(label_studio.files)))

    assert report.created == 1
    address = next(client.list_tasks(project.id))["data"]["image"]
    assert address == "/data/local-files/?d=my%20photos/a%201.png"
    assert client.serves(address)


def test_an_asset_whose_image_is_gone_is_published_and_exported_like_its_neighbours(
    engine: Engine, label_studio: Server, client: LabelStudio, project: Project, tmp_path: Path
) -> None:
    folder = label_studio.files / "half gone"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (80, 60), "red").save(folder / name)
    job = labeled_job(engine, keys=["a.png", "b.png"], source=str(folder))
    set_up_project(client, project, Wanted(labels=["car"], source=job.source, local_files=True))
    (folder / "a.png").unlink()
    report = publish_job(engine, client, job, project.id, Options(local_files=str(label_studio.files)))

    assert (report.created, report.refused) == (2, [])
    with engine.connect() as db:
        export_coco(db, job, tmp_path / "coco.json")
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == ["a.png", "b.png"]


def test_setup_makes_a_project_once_and_a_second_time_changes_nothing(
    engine: Engine, database_url: str, label_studio: Server, client: LabelStudio
) -> None:
    job = labeled_job(engine, keys=1)
    # Label Studio stores a title without the space at its end.
    words = ["label-studio", "setup", "--title", "Street scenes ", "--job", str(job.id), "--label", "bus"]
    keys = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "MASKFLEET_S3_ENDPOINT": "http://127.0.0.1:9",
    }

    refused = call(label_studio, database_url, *words, "--send-keys", code=2, **keys)
    made = json.loads(call(label_studio, database_url, *words[:4], "--label", "bus", "--label", "car", "--json"))
    assert set(made) == documented_keys("label-studio setup")
    again = json.loads(call(label_studio, database_url, *words[:4], "--label", "bus", "--json"))
    lacking = call(label_studio, database_url, *words[:4], "--label", "tram", code=2)

    assert "refuses private addresses" in refused
    project = client.get_project(made["project"])
    assert again == {"project": project.id, "url": made["url"], "done": [], "missing_config_lines": []}
    assert project.sampling == "Uncertainty sampling"
    assert [view["data"]["title"] for view in client.list_views(project.id)] == ["Lowest scores first"]
    assert '<Label value="tram"' in lacking
    assert "tram" not in client.get_project(project.id).label_config


def test_show_says_how_well_regions_fit_and_publish_prints_one_document(
    engine: Engine, database_url: str, label_studio: Server, project: Project
) -> None:
    job = labeled_job(engine, keys=3, masks=rings(4))

    words = ["publish", str(job.id), "--project", str(project.id), "--max-regions", "3", "--json"]
    document = json.loads(call(label_studio, database_url, *words))
    [shown] = json.loads(call(label_studio, database_url, "show", str(job.id), "--json"))["published"]
    page = call(label_studio, database_url, "show", str(job.id))

    assert (document["created"], document["refused"], document["project"]) == (3, [], project.id)
    assert (shown["masks_shown"], shown["masks_left_out"]) == (9, 3)
    assert 0.95 <= shown["iou_worst"] <= shown["iou_mean"] <= 1
    assert "3 masks not shown" in page


def test_on_postgres_everything_is_there_once_under_its_own_task(
    engine: Engine, label_studio_on_postgres: Server, request: pytest.FixtureRequest
) -> None:
    job = labeled_job(engine, keys=230)
    second = labeled_job(engine, keys=230, model_version=SECOND_VERSION)
    with LabelStudio(label_studio_on_postgres.url, label_studio_on_postgres.token) as client:
        project = client.create_project(title=request.node.name[:50], label_config=label_config(["car"]))

        reports = [publish_job(engine, client, one, project.id, Options()) for one in (job, second, job)]

        assert [(r.created, r.attached) for r in reports] == [(230, 0), (0, 230), (0, 0)]
        assert_once(client, project, job, versions=[VERSION, SECOND_VERSION], assets=230)
        with engine.begin() as db:
            remembered = {
                row.task_id: row.asset_uid for row in db.execute(text("SELECT task_id, asset_uid FROM ls_task"))
            }
        assert remembered == {task["id"]: task["data"]["asset_id"] for task in client.list_tasks(project.id)}


# -------------------------------------------------------------------------------------------------------------- helpers


def assert_once(client: LabelStudio, project: Project, job: Job, *, versions: Sequence[str], assets: int) -> None:
    """Each asset has one task, and each task one prediction of each version: the server's own rows are counted."""
    tasks = list(client.list_tasks(project.id, include=("id", "data", "total_predictions")))
    assert len({task["data"]["asset_id"] for task in tasks}) == len(tasks) == assets
    assert client.count_versions(project.id) == dict.fromkeys(versions, assets)
    found = client.find_tasks(project.id, [task["data"]["asset_id"] for task in tasks], model_version=job.model_version)
    assert len(found) == assets
    assert {one.prediction_count for ones in found.values() for one in ones} == {len(versions)}


def annotate(client: LabelStudio, task_id: int, **fields: object) -> None:
    client._http.write(f"/api/tasks/{task_id}/annotations/", fields)


def count(engine: Engine, where: str) -> int:
    with engine.begin() as db:
        return int(db.execute(text(f"SELECT count(*) FROM ls_prediction WHERE {where}")).scalar_one())


def published_rows(engine: Engine) -> list[int]:
    with engine.begin() as db:
        return list(db.execute(text("SELECT asset_id FROM ls_prediction ORDER BY asset_id")).scalars())


def environment(server: Server, database_url: str, **settings: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")},
        "MASKFLEET_DATABASE_URL": database_url,
        "MASKFLEET_LABEL_STUDIO_URL": server.url,
        "MASKFLEET_LABEL_STUDIO_API_KEY": server.token,
        "COLUMNS": "300",
        **settings,
    }


def start(server: Server, database_url: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*MASKFLEET, *words], env=environment(server, database_url), stderr=subprocess.DEVNULL)


def call(server: Server, database_url: str, *words: str, code: int = 0, **settings: str) -> str:
    """Run a command to its end; its stdout, or what it said when it failed."""
    done = subprocess.run(
        [*MASKFLEET, *words],
        env=environment(server, database_url, **settings),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{words} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def test_a_job_that_cannot_be_published_keeps_no_other_from_it(
    engine: Engine, client: LabelStudio, project: Project
) -> None:
    labeled_job(engine, keys=["a.jpg"], source="/a folder without --local-files")
    other = labeled_job(engine, keys=3)
    passes: list[int] = []
    stop = threading.Event()
    arguments = {"job_id": None, "stop": stop, "published_pass": lambda job, _: passes.append(job.id)}
    thread = threading.Thread(target=follow_project, args=(engine, client, project.id, AT_ONCE), kwargs=arguments)

    thread.start()
    try:
        wait_for(lambda: passes, "a pass over the other job")
    finally:
        stop.set()
        thread.join(300)

    assert passes == [other.id]


def test_an_image_that_a_server_away_does_not_serve_is_an_error_that_may_pass() -> None:
    with LabelStudio("http://127.0.0.1:1", "a token") as away, pytest.raises(Unavailable, match="no answer"):
        away.serves("/data/local-files/?d=a.jpg")
