"""The services that people turn on: the page of all jobs, and masks for reviewers' clicks."""

from __future__ import annotations

import sys
from typing import Any

import httpx

from tests.try_deployment.report import Report, Unexpected, expect
from tests.try_deployment.reviewing import open_task, reviewer, task_ids
from tests.try_deployment.stack import Stack, run

_BOARD = "http://127.0.0.1:8070"
_ASSIST = "http://assist:9090"


def open_the_board(stack: Stack, report: Report) -> None:
    stack.profiles.append("board")
    with report.row("`board` in COMPOSE_PROFILES, `up`") as row:
        stack.up()
        row.found = f"it sees {', '.join(secrets_of(stack, 'board'))}"
    with report.row("its page") as row, httpx.Client(base_url=_BOARD) as browser:
        without = browser.get("/")
        wrong = browser.post("/login", data={"password": "x" * 20}, timeout=60)
        entered = browser.post("/login", data={"password": stack.secret("board-password")}, follow_redirects=True)
        jobs = int(stack.sql("SELECT count(*) FROM job"))
        listed = entered.text.count('href="/jobs/')
        row.found = (
            f"without its password {without.status_code} {without.headers.get('location', '')}; "
            f"with a wrong one {wrong.status_code}; with it {entered.status_code} and {listed} of {jobs} jobs"
        )
        expect((without.status_code, wrong.status_code, entered.status_code) == (302, 403, 200), row.found)
        expect(listed >= jobs > 0, row.found)


def answer_clicks(stack: Stack, report: Report) -> None:
    """A click through Label Studio's server, also after the service's password was renewed while it runs."""
    project = int(stack.sql("SELECT max(project_id) FROM ls_task"))
    stack.profiles.append("assist")
    stack.variables["MASKFLEET_LABEL_STUDIO_PROJECT"] = str(project)
    with report.row("`assist` in COMPOSE_PROFILES, `label-studio setup --assist`, a click") as row:
        stack.up()
        register(stack, project)
        row.found = click(stack, project)
    with report.row("its password renewed while it runs: a click before `setup --assist`, and after it") as row:
        (stack.tree / "secrets" / "assist-password").unlink()
        run([sys.executable, "infra/make_env.py"], cwd=stack.tree)
        stack.up("--force-recreate", "dispatch", "assist")
        try:
            row.found = f"{click(stack, project)} with the old password"
        except Unexpected as error:
            row.found = f"refused ({str(error)[:200]})"
        register(stack, project)
        row.found += f", then {click(stack, project)}"


def register(stack: Stack, project: int) -> None:
    words = ["--project", str(project), "--assist", _ASSIST, "--update-config", "--json"]
    stack.maskfleet("label-studio", "setup", *words)


def click(stack: Stack, project: int) -> str:
    """The answer to a click inside the first mask of a task."""
    with reviewer(stack) as client:
        task = open_task(client, task_ids(stack, project)[-1], project)
        [backend] = client.get("/api/ml/", params={"project": project}).json()
        region = task["predictions"][0]["result"][0]
        body = {"task": task["id"], "context": {"result": [inside(region)]}}
        answer = client.post(f"/api/ml/{backend['id']}/interactive-annotating", json=body).json()
    found = (answer.get("data") or {}).get("result")
    expect(found, answer)
    return f"{len(found)} region(s) by {answer['data']['model_version']}"


def inside(region: dict[str, Any]) -> dict[str, Any]:
    """A click with the smart tool at the mean of a polygon's corners."""
    points, labels = region["value"]["points"], region["value"]["polygonlabels"]
    x, y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    value = {"x": x, "y": y, "width": 0.2, "labels": labels}
    place = {"id": "click", "from_name": "click", "to_name": region["to_name"], "type": "keypoint", "value": value}
    return {**place, "is_positive": True}


def secrets_of(stack: Stack, name: str) -> list[str]:
    return stack.compose("exec", "-T", name, "ls", "/run/secrets").split()
