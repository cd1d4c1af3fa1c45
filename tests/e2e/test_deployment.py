"""The deployment as an operator runs it: commands, an S3 API, Redis, Postgres and worker processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.deployment import Deployment, draw_pictures, terminate
from tests.s3_server import serve_s3
from tests.waiting import wait_for

pytestmark = pytest.mark.integration


@pytest.fixture
def bucket(deployment: Deployment) -> Iterator[str]:
    """An S3 API on loopback, configured for the deployment's commands. Gives the name of an empty bucket."""
    with serve_s3() as address:
        deployment.settings |= {
            "MASKFLEET_S3_ENDPOINT": address,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        store(deployment).create_bucket(Bucket="photos")
        yield "photos"


def store(deployment: Deployment):  # type: ignore[no-untyped-def]
    return boto3.session.Session().client(
        "s3",
        endpoint_url=deployment.settings["MASKFLEET_S3_ENDPOINT"],
        region_name="us-east-1",
        aws_access_key_id="AKIATESTTESTTESTTEST",
        aws_secret_access_key="secret-of-the-test",
    )


def upload(deployment: Deployment, folder: Path, prefix: str) -> None:
    client = store(deployment)
    for file in sorted(folder.iterdir()):
        client.upload_file(str(file), "photos", f"{prefix}/{file.name}")


def test_a_prefix_is_submitted_watched_shown_exported_and_answered_again(
    deployment: Deployment, bucket: str, tmp_path: Path
) -> None:
    upload(deployment, draw_pictures(tmp_path / "pictures", 20), "street/2024")
    store(deployment).put_object(Bucket=bucket, Key="street/2024/", Body=b"")
    store(deployment).put_object(Bucket=bucket, Key="street/2024-old.png", Body=b"not below the prefix")
    store(deployment).put_object(Bucket=bucket, Key="street/2024/broken.png", Body=b"<Error>no</Error>")
    dispatcher = deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu,cpu")
    source = f"s3://{bucket}/street/2024"

    job = deployment.submit(source, "--name", "street")
    deployment.call("watch", str(job), code=1)

    shown = deployment.call_json("show", str(job), "--failed")
    assert shown["state"] == "done"
    assert (shown["assets"]["listed"], shown["assets"]["labeled"], shown["masks"]) == (21, 20, 40)
    assert shown["skipped"] == {"folder_marker": 1}
    [failed] = shown["failed"]
    assert (failed["key"], failed["error_kind"]) == ("broken.png", "not_image")
    assert "street" in deployment.call("jobs")
    assert deployment.call_json("jobs")[0]["job"] == job

    deployment.call("export", str(job), "--format", "coco", "--out", str(tmp_path / "coco.json"))
    deployment.call("export", str(job), "--format", "png", "--out", str(tmp_path / "png"))
    deployment.call("export", str(job), "--format", "label-studio", "--out", str(tmp_path / "ls.json"))
    coco = COCO(tmp_path / "coco.json")
    assert (len(coco.imgs), len(coco.anns)) == (20, 40)
    assert json.loads((tmp_path / "ls.json").read_text())[0]["data"]["image"].startswith(source)
    assert list((tmp_path / "png").rglob("*.png"))

    again = deployment.submit(source)
    counts = deployment.wait_until_done(again)
    assert (counts.labeled, counts.reused, counts.failed) == (20, 20, 1)
    fresh = deployment.submit(source, "--fresh")
    assert deployment.wait_until_done(fresh).reused == 0
    assert [terminate(process) for process in (dispatcher, worker)] == [0, 0]


def test_a_mended_object_is_labeled_by_retry(deployment: Deployment, bucket: str, tmp_path: Path) -> None:
    upload(deployment, draw_pictures(tmp_path / "pictures", 3), "p")
    store(deployment).put_object(Bucket=bucket, Key="p/late.png", Body=b"half an upload")
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(f"s3://{bucket}/p")
    assert deployment.wait_until_done(job).failed_by_kind == {"not_image": 1}
    Image.new("RGB", (9, 9)).save(tmp_path / "late.png")
    store(deployment).upload_file(str(tmp_path / "late.png"), bucket, "p/late.png")

    deployment.call("retry", str(job), "--kind", "truncated")
    assert deployment.read(job)[0].state == "done"
    deployment.call("retry", str(job), "--kind", "not_image")

    counts = deployment.wait_until_done(job)
    assert (counts.labeled, counts.failed, counts.listed) == (4, 0, 4)


def test_every_legal_key_of_a_bucket_is_labeled_as_itself(
    deployment: Deployment, bucket: str, testdata: Path, tmp_path: Path
) -> None:
    nasty = json.loads((testdata / "nasty" / "keys.json").read_text())["keys"]
    expected: dict[str, list[int]] = {}
    for entry in nasty:
        content = (testdata / "nasty" / "keys" / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        if "\n" in entry["key"]:
            continue  # moto's HTTP server cannot store it; the tests with a scripted socket cover it
        store(deployment).put_object(Bucket=bucket, Key=f"k/{entry['key']}", Body=content)
        if entry["expect"] == "process":
            expected[entry["key"]] = entry["display_size"]
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")

    job = deployment.submit(f"s3://{bucket}/k", "--include", "*")
    deployment.wait_until_done(job)

    deployment.call("export", str(job), "--format", "coco", "--out", str(tmp_path / "coco.json"))
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    found = {image["file_name"]: [image["width"], image["height"]] for image in images}
    assert {key: found.get(key) for key in expected} == expected


def test_a_job_whose_bucket_is_gone_fails_with_the_reason_and_can_be_resumed(
    deployment: Deployment, bucket: str, tmp_path: Path
) -> None:
    upload(deployment, draw_pictures(tmp_path / "pictures", 1), "p")
    job = deployment.submit(f"s3://{bucket}/p")
    store(deployment).delete_object(Bucket=bucket, Key="p/0000.png")
    store(deployment).delete_bucket(Bucket=bucket)
    deployment.start("dispatch")

    wait_for(lambda: deployment.read(job)[0].state == "failed", "the job to fail")

    assert "NoSuchBucket" in deployment.call("show", str(job))
    refused = deployment.call("submit", f"s3://{bucket}/p", "--model", "stub", code=2)
    assert refused == ""
    deployment.call("resume", str(job))


def test_a_store_that_does_not_answer_is_listed_again_and_the_job_says_so_meanwhile(
    deployment: Deployment, bucket: str, tmp_path: Path
) -> None:
    upload(deployment, draw_pictures(tmp_path / "pictures", 2), "p")
    job = deployment.submit(f"s3://{bucket}/p")
    endpoint = deployment.settings["MASKFLEET_S3_ENDPOINT"]
    deployment.settings["MASKFLEET_S3_ENDPOINT"] = "http://127.0.0.1:9"
    cut_off = deployment.start("dispatch")

    wait_for(lambda: "the next is in" in (deployment.read(job)[0].error or ""), "a second try", logs=deployment.logs)
    assert deployment.read(job)[0].state == "listing"
    assert terminate(cut_off) == 0
    deployment.settings["MASKFLEET_S3_ENDPOINT"] = endpoint
    deployment.start("dispatch")
    wait_for(lambda: deployment.read(job)[0].state == "running", "the listing to go on", logs=deployment.logs)
    assert deployment.read(job)[0].error is None


def test_a_job_whose_assets_fail_is_paused_and_watch_says_why(deployment: Deployment, tmp_path: Path) -> None:
    # Each chunk has one picture, on which the model works for longer than half the time between looks of the brake.
    deployment.settings |= {"MASKFLEET_CHUNK_SIZE": "100", "MASKFLEET_STUB_SECONDS": "3"}
    pictures = {f"{n:04}.png": (9, 9, 9) for n in range(0, 1600, 100)}
    source = draw_pictures(tmp_path / "pictures", 0, special=pictures)
    for n in range(1600):
        if n % 100:
            (source / f"{n:04}.png").write_bytes(b"no picture")
    deployment.start("dispatch")
    deployment.start("worker", "--devices", "cpu")

    job = deployment.submit(source)
    deployment.call("watch", str(job), code=1)

    shown = deployment.call_json("show", str(job))
    assert shown["state"] == "paused"
    assert "failed, more than --max-failed-fraction 0.5" in shown["error"]
    assert "not_image, such as" in shown["error"]
    assert shown["assets"]["pending"] > 0
    deployment.call("resume", str(job))
    counts = deployment.wait_until_done(job)  # fewer than 1,000 came after the pause
    assert (counts.labeled, counts.failed) == (16, 1584)


def test_doctor_says_what_is_reachable_and_how_to_mend_the_rest(deployment: Deployment, bucket: str) -> None:
    findings = {f["what"]: f for f in deployment.call_json("doctor")}
    assert {name: f["ok"] for name, f in findings.items()} == {
        "python": True,
        "devices": True,
        "weights": True,
        "postgres": True,
        "workers": None,
        "dispatchers": None,
        "broker": True,
        "s3": True,
        "source": None,
        "label studio": None,
        "assist": None,
    }
    password = deployment.broker_url.split(":")[2].split("@")[0]
    assert password not in json.dumps(findings)
    deployment.call("submit", f"s3://{bucket}/street", "--model", "stub", code=1)  # it is empty
    [of_the_newest_job] = [f for f in deployment.call_json("doctor") if f["what"] == "source"]
    assert of_the_newest_job["ok"]
    assert f"s3://{bucket}/street" in of_the_newest_job["found"]
    tried = {f["what"]: f for f in deployment.call_json("doctor", "s3://nobody-has-this", code=2)}
    assert tried["source"]["ok"] is False
    assert "NoSuchBucket" in tried["source"]["found"]
    deployment.broker_url = "redis://:hidden-password@127.0.0.1:9/0"
    deployment.settings["MASKFLEET_S3_ENDPOINT"] = "http://127.0.0.1:9"
    broken = {f["what"]: f for f in deployment.call_json("doctor", code=2)}
    assert (broken["broker"]["ok"], broken["s3"]["ok"]) == (False, False)
    assert "MASKFLEET_BROKER_URL" in broken["broker"]["remedy"]
    assert "hidden-password" not in json.dumps(broken)


def test_commands_without_a_deployment_say_which_setting_is_missing(deployment: Deployment) -> None:
    deployment.settings |= {"MASKFLEET_DATABASE_URL": "postgresql://nobody:hidden@127.0.0.1:9/none"}
    done = deployment.call("jobs", code=2)
    assert done == ""


def test_a_worker_that_is_killed_is_restarted_by_its_supervisor(deployment: Deployment, tmp_path: Path) -> None:
    worker = deployment.start("worker", "--devices", "cpu")
    [first] = wait_for(lambda: deployment.celery_mains(worker), "the worker process")
    first.kill()

    wait_for(lambda: [p for p in deployment.celery_mains(worker) if p.pid != first.pid], "its successor")
    assert terminate(worker) == 0


def test_a_worker_whose_celery_process_is_frozen_is_ended_and_started_again(deployment: Deployment) -> None:
    worker = deployment.start("worker", "--devices", "cpu", MASKFLEET_STUB_STUCK_SECONDS="10")
    [first] = wait_for(lambda: deployment.celery_mains(worker), "the worker process")
    wait_for(lambda: deployment.pool_children(worker), "its child")

    first.suspend()

    wait_for(lambda: [p for p in deployment.celery_mains(worker) if p.pid != first.pid], "its successor")
    assert "ended with exit code -9: its event loop stood still and starts again" in deployment.logs()
    assert terminate(worker) == 0
