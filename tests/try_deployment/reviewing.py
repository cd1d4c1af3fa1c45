"""People: a job is published, worked on through Label Studio's API, read back and exported; then twenty at once."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

from tests.try_deployment.living import finish, submit, upload
from tests.try_deployment.report import Report, expect
from tests.try_deployment.stack import Stack

_SERVER = "http://127.0.0.1:8080"
_REVIEWERS = 20
_TASKS_EACH = 10
_LOOK_SECONDS = 4.0  # between a task's opening and its submission


def publish_and_review(stack: Stack, report: Report) -> None:
    upload(stack, "review", copies=2)
    job = submit(stack, "review", points=16)
    labeled = int(finish(stack, job).split()[0])
    with report.row("`label-studio setup`") as row:
        made = json.loads(stack.maskfleet("label-studio", "setup", "--title", "trial", "--job", str(job), "--json"))
        row.found = f"project {made['project']}, {made['url']}"
        expect(made["url"].startswith(_SERVER), row.found)
    project = int(made["project"])
    with report.row("`publish`") as row:
        stack.maskfleet("publish", str(job), "--project", str(project))
        tasks = task_ids(stack, project)
        row.found = f"{len(tasks)} tasks of {labeled} labeled assets"
        expect(len(tasks) == labeled, row.found)
    with report.row("`publish` again") as row:
        stack.maskfleet("publish", str(job), "--project", str(project))
        row.found = f"{len(task_ids(stack, project))} tasks"
        expect(len(task_ids(stack, project)) == labeled, row.found)
    with report.row("3 tasks reviewed by API, `review`") as row:
        with reviewer(stack) as client:
            opened = [open_task(client, task, project) for task in tasks[:3]]
            for n, task in enumerate(opened):
                regions = task["predictions"][0]["result"]
                submit_annotation(client, task, regions[n and 1 :])  # the first as it is, then without its first region
        read = json.loads(stack.maskfleet("review", str(job), "--project", str(project), "--json"))
        row.found = f"assets: {read['assets']}; masks: {read['masks']}"
    with report.row("`export --reviewed`, coco, and `docker compose cp`") as row:
        stack.maskfleet("export", str(job), "--reviewed", "--format", "coco", "--out", "/exports/trial.json")
        target = stack.out / "trial.json"
        stack.compose("cp", "dispatch:/exports/trial.json", str(target))
        coco = json.loads(target.read_text())
        row.found = f"{len(coco['images'])} images, {len(coco['annotations'])} annotations"
        expect(len(coco["images"]) == 3, row.found)


def many_reviewers(stack: Stack, report: Report) -> None:
    """Each opens a published task with its image, looks at it, submits it, and takes the next."""
    project = int(stack.sql("SELECT max(project_id) FROM ls_task"))
    tasks = task_ids(stack, project)
    masks = stack.sql("SELECT round(avg(mask_count - left_out)) FROM ls_prediction")
    times: dict[str, list[float]] = {"open": [], "submit": []}
    faults: list[str] = []
    with report.row(f"{_REVIEWERS} reviewers at once, {_TASKS_EACH} tasks each") as row:
        shares = [(tasks[n % len(tasks) :] + tasks)[:_TASKS_EACH] for n in range(_REVIEWERS)]
        threads = [threading.Thread(target=work, args=(stack, project, share, times, faults)) for share in shares]
        for thread in threads:
            thread.start()
            time.sleep(_LOOK_SECONDS / _REVIEWERS)
        for thread in threads:
            thread.join()
        row.found = f"{len(times['open'])} tasks of {masks} masks; " + "; ".join(
            f"{what}: median {statistics.median(of):.2f} s, p95 {statistics.quantiles(of, n=20)[-1]:.2f} s"
            for what, of in times.items()
        )
        expect(not faults, f"{row.found}; {len(faults)} errors: {faults[:3]}")


def work(stack: Stack, project: int, tasks: Sequence[int], times: dict[str, list[float]], faults: list[str]) -> None:
    with reviewer(stack) as client:
        for number in tasks:
            try:
                began = time.monotonic()
                task = open_task(client, number, project)
                times["open"].append(time.monotonic() - began)
                time.sleep(_LOOK_SECONDS)
                began = time.monotonic()
                submit_annotation(client, task, task["predictions"][0]["result"])
                times["submit"].append(time.monotonic() - began)
            except (httpx.HTTPError, LookupError) as error:
                faults.append(f"{type(error).__name__}: {error}")


def reviewer(stack: Stack) -> httpx.Client:
    token = stack.secret("label-studio-token")
    return httpx.Client(base_url=_SERVER, headers={"Authorization": f"Token {token}"}, timeout=120)


def task_ids(stack: Stack, project: int) -> list[int]:
    with reviewer(stack) as client:
        found = client.get("/api/tasks", params={"project": project, "page_size": 1000, "fields": "task_only"})
        found.raise_for_status()
        return [task["id"] for task in found.json()["tasks"]]


def open_task(client: httpx.Client, number: int, project: int) -> dict[str, Any]:
    """As the page does: the task with its predictions, then its image."""
    answer = client.get(f"/api/tasks/{number}", params={"project": project})
    answer.raise_for_status()
    task: dict[str, Any] = answer.json()
    image = client.get(task["data"]["image"], follow_redirects=True)
    image.raise_for_status()
    expect(image.headers["content-type"].startswith("image/"), image.headers["content-type"])
    return task


def submit_annotation(client: httpx.Client, task: dict[str, Any], regions: list[dict[str, Any]]) -> None:
    body = {"result": regions, "lead_time": _LOOK_SECONDS, "parent_prediction": task["predictions"][0]["id"]}
    client.post(f"/api/tasks/{task['id']}/annotations/", json=body).raise_for_status()
