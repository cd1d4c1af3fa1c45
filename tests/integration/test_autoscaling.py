"""The autoscaler's question, taken out of the Helm chart and asked a real Postgres: how much work waits for GPUs?"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sqlalchemy import Engine, text

from db import embeddings, jobs
from tests.factories import chunk_ids, claim, finish, labeled, make_job, pending, record

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is installed on Linux only")

pytestmark = pytest.mark.integration

CHART = Path(__file__).parents[2] / "infra" / "helm" / "maskfleet"


@pytest.fixture(scope="module")
def question() -> str:
    with helm.Chart.load(CHART) as chart:
        files = chart.render({"autoscaling": {"enabled": True}}, name="maskfleet")
    documents = yaml.safe_load_all(files["maskfleet/templates/autoscaling.yaml"])
    [scaled] = [document for document in documents if document["kind"] == "ScaledObject"]
    return str(scaled["spec"]["triggers"][0]["metadata"]["query"])


def answer(engine: Engine, question: str) -> float:
    with engine.begin() as db:
        return float(db.execute(text(question)).scalar_one())


def test_work_waits_from_the_listing_until_the_last_chunk_is_done(engine: Engine, question: str) -> None:
    assert answer(engine, question) == 0

    job = make_job(engine, keys=10, chunk_size=4)
    assert answer(engine, question) == 3

    for done, chunk_id in enumerate(chunk_ids(engine, job), start=1):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        assert answer(engine, question) == 4 - done, "a chunk in a worker's hands still needs that worker"
        record(engine, chunk, [labeled(asset.id) for asset in pending(engine, chunk)])
        finish(engine, chunk)
    assert answer(engine, question) == 0


def test_a_job_that_is_cancelled_or_whose_prompts_are_not_matched_needs_no_worker(
    engine: Engine, question: str
) -> None:
    make_job(engine, asked={"prompts": "s3://bucket/boxes.json"})
    assert answer(engine, question) == 0

    job = make_job(engine, source="s3://bucket/others")
    assert answer(engine, question) == 1
    with engine.begin() as db:
        jobs.cancel_job(db, job_id=job.id)
    assert answer(engine, question) == 0


def test_embeddings_that_reviewers_wait_for_start_a_worker(engine: Engine, question: str) -> None:
    with engine.begin() as db:
        embeddings.want(db, addresses={n: f"d10efaca/fp16/{n:032x}" for n in range(17)})
    assert answer(engine, question) == 2, "messages of sixteen"
