"""A chunk is marked as sent, and that is committed, before its message goes to the broker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import redis
from sqlalchemy import text

from db import leases
from tests.deployment import Deployment, draw_pictures
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]


def test_while_the_broker_is_slow_a_chunk_that_is_being_sent_can_be_claimed_and_no_row_is_locked(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.settings["MASKFLEET_RESEND_SECONDS"] = "3600"
    source = draw_pictures(tmp_path / "pictures", 8)
    dispatcher = deployment.start("dispatch")
    deployment.submit(draw_pictures(tmp_path / "others", 1))
    broker = redis.Redis.from_url(deployment.broker_url)
    wait_for(lambda: broker.llen("maskfleet") == 1, "the dispatcher to send a first chunk", logs=deployment.logs)
    server = int(broker.info("server")["process_id"])
    os.kill(server, signal.SIGSTOP)
    try:
        job = deployment.submit(source)
        chunk_id = wait_for(lambda: sent_chunk(deployment, job), "a chunk to be sent", 60, logs=deployment.logs)

        with deployment.engine.begin() as db:
            db.execute(text("SET LOCAL lock_timeout = '5s'"))
            claimed = leases.claim_chunk(db, chunk_id=chunk_id, worker="one", lease_seconds=0.1)
    finally:
        os.kill(server, signal.SIGCONT)

    assert claimed is not None
    assert dispatcher.poll() is None


def sent_chunk(deployment: Deployment, job: int) -> int | None:
    with deployment.engine.begin() as db:
        found = db.execute(text("SELECT id FROM chunk WHERE job_id = :job AND state = 'sent'"), {"job": job}).scalar()
    return None if found is None else int(found)
