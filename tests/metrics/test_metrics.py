"""What Prometheus scrapes from a real deployment, and that the dashboard and the alerts ask only for what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deployment import Deployment, draw_pictures
from tests.redis_server import free_port
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "infra" / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((ROOT / "infra" / "grafana" / "maskfleet.json").read_text())
QUERIES = sorted({target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]})
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def scrape(port: int) -> Samples:
    """name -> labels -> value of everything at a port."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """The sum of the samples that have these labels. None when there is none."""
    values = [v for found, v in samples.get(name, {}).items() if labels.items() <= dict(found).items()]
    return sum(values) if values else None


@pytest.fixture
def scraped(deployment: Deployment, tmp_path: Path) -> tuple[int, int]:
    """The ports of a dispatcher and of a worker that have done a job of 20 pictures and a broken one."""
    deployment.settings["MASKFLEET_LEASE_SECONDS"] = "60"  # none ends early: each step is counted once
    ports = free_port(), free_port()
    deployment.start("dispatch", "--metrics-port", str(ports[0]))
    deployment.start("worker", "--devices", "cpu", "--metrics-port", str(ports[1]))
    source = draw_pictures(tmp_path / "pictures", 20)
    (source / "broken.png").write_text("no picture")
    job = deployment.submit(source)
    deployment.wait_until_done(job)
    return ports


@pytest.mark.integration
def test_dispatcher_and_worker_count_what_the_job_did(deployment: Deployment, scraped: tuple[int, int]) -> None:
    dispatcher_port, worker_port = scraped
    wait_for(lambda: value(scrape(dispatcher_port), "maskfleet_jobs", state="done") == 1, "the job to be done there")
    deployment_says, worker_says = scrape(dispatcher_port), scrape(worker_port)

    assert value(deployment_says, "maskfleet_up") == 1
    assert value(deployment_says, "maskfleet_assets", job="1", state="labeled") == 20
    assert value(deployment_says, "maskfleet_assets", job="1", state="failed") == 1
    assert value(deployment_says, "maskfleet_assets", job="1", state="pending") == 0
    assert value(deployment_says, "maskfleet_failed_assets", job="1", kind="not_image") == 1
    assert value(deployment_says, "maskfleet_masks", job="1") == 40
    assert value(deployment_says, "maskfleet_chunks") == 0
    assert value(deployment_says, "maskfleet_queue_messages") == 0
    assert value(deployment_says, "maskfleet_processes", kind="worker") == 1
    assert value(deployment_says, "maskfleet_processes", kind="dispatcher") == 1
    assert value(worker_says, "maskfleet_worker_assets_total", outcome="labeled") == 20
    assert value(worker_says, "maskfleet_worker_masks_total") == 40
    assert value(worker_says, "maskfleet_worker_failed_starts") == 0
    for step, count in {"fetch": 21, "decode": 21, "masks": 20}.items():
        assert value(worker_says, "maskfleet_step_seconds_count", step=step) == count
    for step in ("encode", "store"):
        assert (value(worker_says, "maskfleet_step_seconds_count", step=step) or 0) > 0


@pytest.mark.integration
def test_every_query_of_the_dashboard_and_of_the_alerts_asks_for_metrics_that_exist(
    scraped: tuple[int, int],
) -> None:
    text = "".join(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode() for port in scraped)
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    offered = {
        *types,
        *(
            f"{name}_{part}"
            for name, kind in types.items()
            if kind == "histogram"
            for part in ("bucket", "sum", "count")
        ),
    }

    asked = {
        name for text in [*QUERIES, *(rule["expr"] for rule in RULES)] for name in re.findall(r"\bmaskfleet_\w+", text)
    }

    assert len(QUERIES) > 15
    assert sorted(asked - offered) == []
    shown = {name for name in offered if any(name in query for query in QUERIES)}
    assert sorted(n for n in types if not any(n in s for s in shown)) == [], "exported, and on no panel"


def test_a_jobs_numbers_keep_its_number_and_count_once_beside_a_second_dispatcher() -> None:
    config = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text())
    assert next(one for one in config["scrape_configs"] if "dispatch" in one["job_name"])["honor_labels"] is True
    for text in QUERIES:
        assert not re.search(r"sum by \([^)]*\) \(maskfleet_(assets|failed_assets|masks|predictions)\b", text), text


def test_the_runbook_says_what_to_do_about_every_alert() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in runbook] == []


def test_every_alert_is_provoked_by_its_test() -> None:
    subprocess.run([prometheus_program("promtool"), "check", "rules", ALERTS], check=True)
    tests = Path(__file__).with_name("alerts_test.yml")
    provoked = {
        case["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }

    assert provoked == {rule["alert"] for rule in RULES}
    done = subprocess.run([prometheus_program("promtool"), "test", "rules", tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_a_real_prometheus_answers_every_query_and_fires_when_the_workers_are_gone(
    deployment: Deployment, scraped: tuple[int, int], tmp_path: Path
) -> None:
    with prometheus(tmp_path / "prometheus", scraped) as ask:
        wait_for(lambda: ask("sum(up) == 2")["result"], "both targets to be scraped")
        wait_for(lambda: ask("rate(maskfleet_worker_assets_total[1m])")["result"], "two scrapes of the worker")
        assert {one["metric"]["job"] for one in ask("maskfleet_assets")["result"]} == {"1"}
        for query in QUERIES:
            ask(query)  # an error of Prometheus raises
        answered = {query for query in QUERIES if ask(query)["result"]}
        without_jobs = ("maskfleet_lease_overdue", "maskfleet_listing_failing", "unpublished", "predictions", "review")
        empty = {q for q in QUERIES if any(word in q for word in without_jobs)} | {
            "maskfleet_embeddings",
            "maskfleet_embedding_bytes",
        }
        assert set(QUERIES) - answered <= empty

        [worker] = [process for process in deployment.started if "worker" in process.args]  # type: ignore[operator]
        deployment.kill_tree(worker)
        deployment.submit(draw_pictures(tmp_path / "more", 3))
        [rule] = [rule for rule in RULES if rule["alert"] == "MaskfleetNoWorker"]
        wait_for(lambda: ask(rule["expr"])["result"], "the alert's condition to hold", logs=deployment.logs)


def prometheus_program(name: str) -> str:
    """From the folder MASKFLEET_TEST_PROMETHEUS, or on PATH. Debian's package `prometheus` has both programs."""
    found = shutil.which(name, path=os.environ.get("MASKFLEET_TEST_PROMETHEUS")) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: install Debian's package prometheus, or set MASKFLEET_TEST_PROMETHEUS to its folder")
    return found


@contextmanager
def prometheus(folder: Path, ports: tuple[int, int]) -> Iterator[Any]:
    """A Prometheus that scrapes these ports each second. Yields a function that asks it one query."""
    program = prometheus_program("prometheus")
    folder.mkdir()
    config = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    for job, port in zip(config["scrape_configs"], ports, strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    words = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    server = subprocess.Popen(
        [program, *words, f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        answer = json.load(urllib.request.urlopen(url, timeout=60))
        assert answer["status"] == "success", answer
        return answer["data"]

    def is_up() -> bool:
        try:
            ask("1")
        except OSError:
            return False
        return True

    try:
        wait_for(is_up, "Prometheus to answer")
        yield ask
    finally:
        server.kill()
        server.wait()
