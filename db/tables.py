"""The tables. `migrations/` builds exactly these; a test compares the two.

Postgres is the truth. A Celery message only carries a chunk id: no harm is done when it is lost, late or comes twice.
Times are on the database's clock.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
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
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, REAL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.states import AnnotationStatus, AnsweredBy, ChunkState, ClickKind, EmbeddingState, JobState, LsState, Verdict

asset_id_seq = Sequence("asset_id_seq")


def _one_of(column: str, states: type[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(str(state)) for state in states)})"


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        int: BigInteger,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
    }


class Job(Base):
    """One submission: its request, and how far its listing is."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(_one_of("state", JobState), name="job_state"),
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
    asset_count: Mapped[int] = mapped_column(server_default=text("0"))
    matched: Mapped[dict[str, Any] | None]  # for a job with prompts: counts of its matched keys; chunks wait for it
    skipped: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    listed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


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
        CheckConstraint(_one_of("state", ChunkState), name="chunk_state"),
        # Without this a lease of NULL would never expire, and its chunk would never end.
        CheckConstraint("state <> 'running' OR lease_until IS NOT NULL", name="chunk_running_has_lease"),
        Index("chunk_new", "job_id", "id", postgresql_where=text("state = 'new'")),
        Index("chunk_sent", "sent_at", postgresql_where=text("state = 'sent'")),
        Index("chunk_running", "id", postgresql_where=text("state = 'running'")),
        Index("chunk_open", "job_id", postgresql_where=text("state <> 'done'")),
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


class Suspect(Base):
    """An asset that was in flight when its process died. deaths_alone: how often it was then the only one in flight."""

    __tablename__ = "suspect"

    asset_id: Mapped[int] = mapped_column(ForeignKey("asset.id", ondelete="CASCADE"), primary_key=True)
    deaths_alone: Mapped[int] = mapped_column(Integer, server_default=text("0"))


class Outcome(Base):
    """The result of one asset: labeled (error_kind is null) or failed. The primary key allows one for each asset."""

    __tablename__ = "outcome"
    __table_args__ = (Index("outcome_of_job", "job_id", "error_kind", postgresql_include=["mask_count"]),)

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
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class MaskRow(Base):
    """One mask of a labeled asset, in the frame of the upright image. `n` counts from 0 in the model's order."""

    __tablename__ = "mask"

    asset_id: Mapped[int] = mapped_column(ForeignKey("outcome.asset_id", ondelete="CASCADE"), primary_key=True)
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
    prompt: Mapped[dict[str, Any] | None]


class LsTask(Base):
    """One asset in one project of Label Studio. Several jobs may have labeled it."""

    __tablename__ = "ls_task"
    __table_args__ = (
        UniqueConstraint("server", "project_id", "asset_uid", name="ls_task_once_a_project"),
        UniqueConstraint("server", "project_id", "task_id", name="ls_task_of_one_asset"),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    server: Mapped[str]
    project_id: Mapped[int]
    asset_uid: Mapped[str]  # data.asset_id there: the first 16 hexadecimal digits of the sha256 of `uri`
    uri: Mapped[str]  # source and key as one address
    task_id: Mapped[int | None]  # Label Studio's; null until it is known


class LsPrediction(Base):
    """One model version's prediction on an ls_task. Stored as `sending` before its request is sent."""

    __tablename__ = "ls_prediction"
    __table_args__ = (
        CheckConstraint(_one_of("state", LsState), name="ls_prediction_state"),
        Index("ls_prediction_of_asset", "asset_id"),
        Index("ls_prediction_of_job", "job_id"),
    )

    ls_task_id: Mapped[int] = mapped_column(ForeignKey("ls_task.id", ondelete="CASCADE"), primary_key=True)
    model_version: Mapped[str] = mapped_column(primary_key=True)
    # The asset that owns the masks: the region m<asset_id>-<n> is that asset's n-th mask. The job may be deleted later.
    asset_id: Mapped[int]
    job_id: Mapped[int]
    state: Mapped[str] = mapped_column(server_default=LsState.SENDING)
    error: Mapped[str | None]
    mask_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    left_out: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # masks that no region shows
    iou_sum: Mapped[float] = mapped_column(REAL, server_default=text("0"))  # IoU of shown masks with their regions
    iou_min: Mapped[float | None] = mapped_column(REAL)
    sent_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LsPull(Base):
    """How far the annotations of a project have been read."""

    __tablename__ = "ls_pull"

    server: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(primary_key=True)
    watermark: Mapped[datetime]  # Label Studio's clock: every change of a task before this time has been read
    pulled_at: Mapped[datetime] = mapped_column(server_default=func.now())


class LsUnjudged(Base):
    """A task with annotations that were read before their prediction was known: it is read again when it is."""

    __tablename__ = "ls_unjudged"

    server: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(primary_key=True)  # Label Studio's
    asset_uid: Mapped[str]


class LsAnnotation(Base):
    """One annotation of an ls_task, as last read. All annotations of a task are replaced together."""

    __tablename__ = "ls_annotation"
    __table_args__ = (
        CheckConstraint(_one_of("standing", AnnotationStatus), name="ls_annotation_standing"),
        UniqueConstraint("ls_task_id", "annotation_id", name="ls_annotation_once_a_task"),
        Index("ls_annotation_chosen", "ls_task_id", unique=True, postgresql_where=text("standing = 'chosen'")),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    ls_task_id: Mapped[int] = mapped_column(ForeignKey("ls_task.id", ondelete="CASCADE"))
    annotation_id: Mapped[int]  # Label Studio's
    annotator: Mapped[int | None]  # Label Studio's user
    standing: Mapped[str]
    ground_truth: Mapped[bool]
    lead_seconds: Mapped[float | None] = mapped_column(REAL)
    updated_at: Mapped[datetime]  # Label Studio's clock
    # The prediction it began from, and the asset that owns its masks. Null: it began from no prediction of ours.
    model_version: Mapped[str | None]
    asset_id: Mapped[int | None]
    unread: Mapped[int] = mapped_column(Integer, server_default=text("0"))  # regions that we cannot read as masks


class LsRegion(Base):
    """One mask of a chosen annotation: a predicted mask with its verdict, or one that a person added."""

    __tablename__ = "ls_region"
    __table_args__ = (CheckConstraint(_one_of("verdict", Verdict), name="ls_region_verdict"),)

    ls_annotation_id: Mapped[int] = mapped_column(ForeignKey("ls_annotation.id", ondelete="CASCADE"), primary_key=True)
    i: Mapped[int] = mapped_column(Integer, primary_key=True)
    verdict: Mapped[str]
    mask_n: Mapped[int | None] = mapped_column(Integer)  # of the annotation's asset_id; null: added
    label: Mapped[str]
    iou: Mapped[float | None] = mapped_column(REAL)  # of the shown mask with the correction; only for edited masks
    counts: Mapped[str | None]  # COCO compressed run lengths of a person's mask; null: the stored mask, or deleted
    bbox_x: Mapped[int | None] = mapped_column(Integer)
    bbox_y: Mapped[int | None] = mapped_column(Integer)
    bbox_w: Mapped[int | None] = mapped_column(Integer)
    bbox_h: Mapped[int | None] = mapped_column(Integer)
    area_px: Mapped[int | None] = mapped_column(Integer)
    region_id: Mapped[str | None]  # Label Studio's, of an added mask that began as the answer to a click


class Embedding(Base):
    """An image's embedding, kept for clicks: wanted, stored or failed. Its bytes are in a folder or a bucket.

    The address is made from the content: weights, precision, format, source, key and etag. So a row never becomes
    wrong; it only expires.
    """

    __tablename__ = "embedding"
    __table_args__ = (
        CheckConstraint(_one_of("state", EmbeddingState), name="embedding_state"),
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


class Click(Base):
    """One answer to a reviewer's prompt in Label Studio."""

    __tablename__ = "click"
    __table_args__ = (
        CheckConstraint(_one_of("kind", ClickKind), name="click_kind"),
        CheckConstraint(_one_of("answered_by", AnsweredBy), name="click_answered_by"),
        Index("click_of_task", "ls_task_id"),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    ls_task_id: Mapped[int] = mapped_column(ForeignKey("ls_task.id", ondelete="CASCADE"))
    clicked_at: Mapped[datetime] = mapped_column(server_default=func.now())
    kind: Mapped[str]
    answered_by: Mapped[str]
    label: Mapped[str | None]
    milliseconds: Mapped[int] = mapped_column(Integer)
    prompt_id: Mapped[str]  # region id of the first prompt: the same for all clicks on one object
    region_id: Mapped[str | None]  # of the answer; null: there was none
