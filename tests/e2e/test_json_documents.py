"""What commands print with --json is what docs/json.md says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.label_studio.report import Report
from tests.deployment import Deployment, draw_pictures
from tests.json_page import documented_keys

pytestmark = pytest.mark.integration


def test_documents_of_a_job_have_the_keys_that_the_page_names(deployment: Deployment, tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "pictures", 1)
    dry = deployment.call_json("submit", str(source), "--model", "stub", "--dry-run")
    submitted = deployment.call_json("submit", str(source), "--model", "stub")
    job = str(submitted["job"])
    watched = deployment.call_json("watch", job, "--once")
    [listed] = deployment.call_json("jobs")
    shown = deployment.call_json("show", job, "--failed")

    assert set(dry) == documented_keys("submit --dry-run") - {"prompts"}
    assert set(submitted) == set(watched) == set(listed) == documented_keys("submit")
    assert set(shown) == documented_keys("submit") | documented_keys("show")


def test_documents_of_a_machine_have_the_keys_that_the_page_names(deployment: Deployment) -> None:
    for finding in deployment.call_json("doctor"):
        assert set(finding) == documented_keys("doctor")
    for model in deployment.call_json("models", "list"):
        assert set(model) == documented_keys("models list")


def test_the_document_of_publish_has_the_keys_that_the_page_names() -> None:
    head = {"job", "model_version", "server", "project"}
    assert {field.name for field in fields(Report)} | head == documented_keys("publish")
