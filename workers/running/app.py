"""Celery's app. Its messages carry ids of chunks or of wanted embeddings and nothing else, over Redis or a folder.

Postgres is the truth. A message only wakes a worker up: it may be lost, late or come twice. So there is no result
backend and no retry by the broker. After a crash the message counts as done, and the reaper decides what happens to
the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from celery import Celery
from kombu.exceptions import OperationalError

from db.settings import settings
from workers.running.run_dir import log_from_the_start

QUEUE = "maskfleet"
# The queue of chunks that a worker had before. Redis reads the queues in the order of their names, so it comes first.
FIRST_QUEUE = "first.maskfleet"
# Embeddings that reviewers wait for come before all chunks. The folder broker takes turns between the queues instead.
EMBED_QUEUE = "embed.maskfleet"
QUEUES = (EMBED_QUEUE, FIRST_QUEUE, QUEUE)
SEGMENT_CHUNK = "maskfleet.segment_chunk"
EMBED = "maskfleet.embed"
EMBEDS_A_MESSAGE = 16


def make_app(broker_url: str | None) -> Celery:
    """An app on redis://…, rediss://… (TLS) or, for one machine, on filesystem:///folder (created when missing)."""
    app = Celery("maskfleet", include=["workers.running.tasks"])
    app.conf.update(
        broker_url=broker_url,
        broker_transport_options=_REDIS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # a full or read-only Redis refuses; meanwhile the child keeps its model
        task_default_queue=QUEUE,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_track_started=True,
        worker_prefetch_multiplier=1,
        worker_pool_start_method="spawn",  # CUDA and OpenMP do not survive a fork
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=True,
        task_send_sent_event=True,
        worker_hijack_root_logger=False,
        # Seconds in which a child must report that it is up. With Celery's 4 s, a busy machine killed every child.
        worker_proc_alive_timeout=120.0,
        worker_lost_wait=1.0,  # seconds from a child's death to its report; a child that died sends no result
    )
    if broker_url and broker_url.startswith("filesystem:"):
        app.conf.update(
            broker_url="filesystem://",
            broker_transport_options=_folders(Path(urlsplit(broker_url).path)),
            worker_send_task_events=False,  # nobody reads them, and each event would leave a file
            task_send_sent_event=False,
            worker_enable_remote_control=False,
        )
    if broker_url and broker_url.startswith("rediss:"):
        app.conf.broker_use_ssl = _tls(broker_url)
    return app


class BrokerAway(ConnectionError):
    """The broker does not answer. The message gives the reason."""


def check_broker() -> str:
    """Check that the broker answers. Returns its address without the password. Raises BrokerAway."""
    try:
        with app.connection_for_read() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            return str(connection.as_uri())
    except (OperationalError, OSError) as error:
        raise BrokerAway(str(error)) from error


def publish_chunks(chunk_ids: Sequence[int], *, queue: str = QUEUE, broker: Celery | None = None) -> None:
    """Send one message for each chunk over one connection. Raises kombu's OperationalError when the broker is away."""
    _publish(SEGMENT_CHUNK, [(chunk_id,) for chunk_id in chunk_ids], queue, broker or app)


def publish_embeds(ids: Sequence[int], *, broker: Celery | None = None) -> None:
    """Send the ids of wanted embeddings, EMBEDS_A_MESSAGE at most in a message. Raises like `publish_chunks`."""
    messages = [(list(ids[k : k + EMBEDS_A_MESSAGE]),) for k in range(0, len(ids), EMBEDS_A_MESSAGE)]
    _publish(EMBED, messages, EMBED_QUEUE, broker or app)


def _publish(task: str, messages: Sequence[tuple[Any, ...]], queue: str, sender: Celery) -> None:
    with sender.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        producer = sender.amqp.Producer(connection)
        for arguments in messages:
            sender.send_task(task, arguments, queue=queue, producer=producer, retry=False, ignore_result=True)


def waiting_messages(*queues: str) -> int:
    """How many messages wait in these queues. Raises kombu's OperationalError when the broker is away."""
    waiting = 0
    for queue in queues:
        with app.connection_for_read() as connection, suppress(*connection.channel_errors):  # if empty, it is absent
            connection.ensure_connection(max_retries=1, timeout=5)
            waiting += int(connection.default_channel.queue_declare(queue, passive=True).message_count)
    return waiting


def count_waiting() -> int:
    """How many messages wait in all queues. Raises BrokerAway."""
    try:
        return waiting_messages(*QUEUES)
    except (OperationalError, OSError) as error:
        raise BrokerAway(str(error)) from error


_REDIS: dict[str, Any] = {
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "visibility_timeout": 3600,
    "queue_order_strategy": "sorted",  # EMBED_QUEUE, FIRST_QUEUE, QUEUE
}


def _tls(broker_url: str) -> dict[str, str]:
    """The TLS options of a rediss:// address. Without any, kombu would check no certificate, so it is told to.

    Flower reads them from here, because it reads none from the address.
    """
    given = {name: value for name, value in parse_qsl(urlsplit(broker_url).query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": "required", **given}


def _folders(folder: Path) -> dict[str, Any]:
    messages, control = folder / "messages", folder / "control"
    for part in (messages, control):
        part.mkdir(parents=True, exist_ok=True)
    return {"data_folder_in": str(messages), "data_folder_out": str(messages), "control_folder": str(control)}


log_from_the_start()  # this module is the first of ours that a Celery process loads
_broker_url = settings().broker_url
app = make_app(_broker_url.get_secret_value() if _broker_url else None)
