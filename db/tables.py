"""The tables. `migrations/` builds exactly these; a test compares the two.

Postgres is the truth. A Celery message only carries a chunk id: no harm is done when it is lost, late or comes twice.
Times are on the database's clock.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Sequence,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, REAL
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, one_of
from db.counter_tables import MaskCounter, OutcomeCounter, PredictionCounter, WorkerTime
from db.ls_tables import Click, LsAnnotation, LsPrediction, LsPull, LsRegion, LsTask, LsUnjudged
from db.states import ChunkState, EmbeddingState, JobState, ProcessKind

__all__ = [
    "Asset",
    "Base",
    "Chunk",
    "Click",
    "Embedding",
    "Job",
    "ListShard",
    "LsAnnotation",
    "LsPrediction",
    "LsPull",
    "LsRegion",
    "LsTask",
    "LsUnjudged",
    "MaskCounter",
    "MaskRow",
    "Outcome",
    "OutcomeCounter",
    "PredictionCounter",
    "Process",
    "PromptMatch",
    "PromptRow",
    "SameBytes",
    "Suspect",
    "WorkerTime",
]

asset_id_seq = Sequence("asset_id_seq")


class Job(Base):
    """One submission: its request, and how far its listing is."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(one_of("state", JobState), name="job_state"),
        CheckConstraint("priority BETWEEN 1 AND 9", name="job_priority"),
        Index("job_answers", "source", "model_version"),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=JobState.LISTING)
    source: Mapped[str]
    model: Mapped[str]
    model_version: Mapped[str]
    asked: Mapped[dict[str, Any]]  # mode, parameters, labels, filters, limit: the whole request of `submit`
    fresh: Mapped[bool] = mapped_column(server_default=text("false"))
    list_cursor: Mapped[str | None] = mapped_column(Text(collation="C"))
    list_failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    list_failing_since: Mapped[datetime | None]
    list_retry_at: Mapped[datetime | None]  # after a transient failure: not listed again before this time
    asset_count: Mapped[int] = mapped_column(server_default=text("0"))
    priority: Mapped[int] = mapped_column(Integer, server_default=text("5"))  # of `db.queue.take_window`
    matched: Mapped[dict[str, Any] | None]  # for a job with prompts: counts of its matched keys; chunks wait for it
    skipped: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    error: Mapped[str | None]
    # Outcomes when the job was last paused. The next judgement of its failures does not count them again.
    judged_assets: Mapped[int | None]
    judged_failed: Mapped[int | None]
    deleted_at: Mapped[datetime | None]  # `delete` began: nothing works on the job any more, and no command finds it
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    listed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class ListShard(Base):
    """A range of keys of a source that is listed in parallel: cursor < key <= upto. Those of a job cover all keys."""

    __tablename__ = "list_shard"

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    n: Mapped[int] = mapped_column(Integer, primary_key=True)
    cursor: Mapped[str] = mapped_column(Text(collation="C"))  # the last key that was read
    upto: Mapped[str | None] = mapped_column(Text(collation="C"))  # null: to the end of the source
    is_done: Mapped[bool] = mapped_column(server_default=text("false"))


class Asset(Base):
    """One object of the source. Written once by the listing, never updated."""

    __tablename__ = "asset"
    __table_args__ = (UniqueConstraint("job_id", "key", name="asset_once_a_job"),)

    id: Mapped[int] = mapped_column(asset_id_seq, server_default=asset_id_seq.next_value(), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(Text(collation="C"))
    size_bytes: Mapped[int]
    etag: Mapped[str]


class PromptRow(Base):
    """The prompts of a job for one asset, in order. Written with the job, never updated."""

    __tablename__ = "prompt"

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)  # as the prompt file has it
    prompts: Mapped[list[Any]]  # each a prompt's JSON, or {"error": why it cannot be used}


class PromptMatch(Base):
    """An asset that a prompt's key means, when that key is not the asset's own key.

    Written once, when the source of its job is listed.
    """

    __tablename__ = "prompt_match"

    asset_id: Mapped[int] = mapped_column(ForeignKey("asset.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)  # of the job's prompt


class Chunk(Base):
    """The assets of one message: those of its job with first_asset_id <= id <= last_asset_id."""

    __tablename__ = "chunk"
    __table_args__ = (
        CheckConstraint(one_of("state", ChunkState), name="chunk_state"),
        # Without this a lease of NULL would never expire, and its chunk would never end.
        CheckConstraint("state <> 'running' OR lease_until IS NOT NULL", name="chunk_running_has_lease"),
        Index("chunk_new", "job_id", "id", postgresql_where=text("state = 'new'")),
        Index("chunk_sent", "sent_at", postgresql_where=text("state = 'sent'")),
        Index("chunk_running", "id", postgresql_where=text("state = 'running'")),
        Index("chunk_unfinished", "job_id", "first_asset_id", postgresql_where=text("state <> 'done'")),
        Index("chunk_assets", "job_id", "first_asset_id"),
        Index("chunk_recent", "job_id", "sent_at", postgresql_where=text("state IN ('running', 'done')")),
        {"postgresql_with": {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.01"}},
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    first_asset_id: Mapped[int]
    last_asset_id: Mapped[int]
    state: Mapped[str] = mapped_column(server_default=ChunkState.NEW)
    token: Mapped[int] = mapped_column(server_default=text("0"))  # fencing token: every write of a worker must carry it
    lease_until: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]  # after a transient failure: not sent again before this time
    transient_failures: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    in_flight: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), server_default=text("'{}'"))
    worker: Mapped[str | None]
    worker_pid: Mapped[int | None]  # of the process that claimed it: a worker's name outlives its processes
    claimed_at: Mapped[datetime | None]
    # Unused: workers of version 0.3 count here. To be removed when no worker of that version can be left.
    labeled: Mapped[int | None]
    failed: Mapped[int | None]
    masks: Mapped[int | None]


class Suspect(Base):
    """An asset that was in flight when its process died. deaths_alone: how often it was then the only one in flight."""

    __tablename__ = "suspect"

    asset_id: Mapped[int] = mapped_column(ForeignKey("asset.id", ondelete="CASCADE"), primary_key=True)
    deaths_alone: Mapped[int] = mapped_column(Integer, server_default=text("0"))


class Outcome(Base):
    """The result of one asset: labeled (error_kind is null) or failed. The primary key allows one for each asset.

    Written once, or deleted to be tried again. A trigger counts it in `outcome_counter` and `worker_time`.
    """

    __tablename__ = "outcome"
    __table_args__ = (
        Index("outcome_of_job", "job_id", "error_kind", postgresql_include=["mask_count"]),
        Index(
            "outcome_labeled",
            "job_id",
            "asset_id",
            postgresql_where=text("error_kind IS NULL AND width IS NOT NULL"),
        ),
        Index(
            "outcome_failed",
            "job_id",
            "error_kind",
            "created_at",
            "asset_id",
            postgresql_where=text("error_kind IS NOT NULL"),
        ),
        Index(
            "outcome_unused",
            "job_id",
            "asset_id",
            postgresql_where=text("error_kind IS NULL AND error IS NOT NULL"),
        ),
    )

    asset_id: Mapped[int] = mapped_column(ForeignKey("asset.id", ondelete="CASCADE"), primary_key=True)
    job_id: Mapped[int]
    error_kind: Mapped[str | None]
    error: Mapped[str | None]  # of a labeled asset: which of its prompts could not be used
    width: Mapped[int | None] = mapped_column(Integer)  # of the upright image, pixels; null: the image was not read
    height: Mapped[int | None] = mapped_column(Integer)
    mask_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    segment_ms: Mapped[int | None] = mapped_column(Integer)
    worker: Mapped[str | None]
    answered_by: Mapped[int | None]  # asset of an earlier job with the same bytes and model_version
    etag: Mapped[str | None]  # of the bytes that were read, when they were not those that were listed
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MaskRow(Base):
    """One mask of a labeled asset, in the frame of the upright image. `n` counts from 0 in the model's order.

    `db.partitions` makes its partitions. A foreign key to `outcome` would halve the rate at which masks are written.
    Instead each statement that writes or deletes outcomes does the same with their masks, in one transaction.
    """

    __tablename__ = "mask"
    __table_args__ = ({"postgresql_partition_by": "RANGE (asset_id)"},)

    asset_id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int] = mapped_column(Integer, primary_key=True)
    counts: Mapped[str]  # COCO compressed run lengths
    bbox_x: Mapped[int] = mapped_column(Integer)
    bbox_y: Mapped[int] = mapped_column(Integer)
    bbox_w: Mapped[int] = mapped_column(Integer)
    bbox_h: Mapped[int] = mapped_column(Integer)
    area_px: Mapped[int] = mapped_column(Integer)
    predicted_iou: Mapped[float] = mapped_column(REAL)
    stability_score: Mapped[float | None] = mapped_column(REAL)
    label: Mapped[str | None]
    prompt: Mapped[dict[str, Any] | None]  # db/mask_prompt.py writes and reads it: a lone point is a shorter string


class SameBytes(Base):
    """Which bytes a labeled asset of a job with `--dedupe content` had. A row whose asset is gone finds nothing."""

    __tablename__ = "same_bytes"
    __table_args__ = (Index("same_bytes_of_asset", "asset_id"),)

    key: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)  # of the bytes and the model_version
    asset_id: Mapped[int] = mapped_column(primary_key=True)


class Embedding(Base):
    """An image's embedding, kept for clicks: wanted, stored or failed. Its bytes are in a folder or a bucket.

    The address is made from the content: weights, precision, format, source, key and etag. So a row never becomes
    wrong; it only expires.
    """

    __tablename__ = "embedding"
    __table_args__ = (
        CheckConstraint(one_of("state", EmbeddingState), name="embedding_state"),
        UniqueConstraint("address", name="embedding_once"),
        Index("embedding_of_asset", "asset_id"),
        Index("embedding_wanted", "id", postgresql_where=text("state = 'wanted'")),
        Index("embedding_used", "used_at", postgresql_where=text("state = 'stored'")),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    address: Mapped[str]
    asset_id: Mapped[int]  # an asset with these bytes: a worker reads it. Its job may be deleted later.
    state: Mapped[str] = mapped_column(server_default=EmbeddingState.WANTED)
    error: Mapped[str | None]
    size_bytes: Mapped[int] = mapped_column(server_default=text("0"))
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    claimed_until: Mapped[datetime | None]  # a worker makes it until then
    sent_at: Mapped[datetime | None]  # of its last message to the workers
    wanted_at: Mapped[datetime] = mapped_column(server_default=func.now())
    stored_at: Mapped[datetime | None]
    used_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Process(Base):
    """A command that serves this deployment, or one of its devices. It writes its row every few seconds."""

    __tablename__ = "process"
    __table_args__ = (
        CheckConstraint(one_of("kind", ProcessKind), name="process_kind"),
        UniqueConstraint("kind", "host", "pid", "name", name="process_once"),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]  # of a worker: as in chunk.worker
    host: Mapped[str]
    pid: Mapped[int]  # of the command
    device: Mapped[str | None]  # CUDA UUID, or cpu
    version: Mapped[str]
    models: Mapped[list[Any]] = mapped_column(server_default=text("'[]'"))  # names of those with weights there
    model: Mapped[str | None]  # the one that was loaded last
    failed_starts: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # in a row
    last_error: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
