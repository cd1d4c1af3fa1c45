"""The tables about Label Studio: tasks, predictions, annotations, clicks. `db.tables` has the others."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, Integer, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import REAL
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, one_of
from db.states import AnnotationStatus, AnsweredBy, ClickKind, LsState, Verdict


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
    # When Label Studio had last changed the task, on its clock, as its annotations were read. Null: they were not.
    changed_at: Mapped[datetime | None]


class LsPrediction(Base):
    """One model version's prediction on an ls_task. Stored as `sending` before its request is sent."""

    __tablename__ = "ls_prediction"
    __table_args__ = (
        CheckConstraint(one_of("state", LsState), name="ls_prediction_state"),
        Index("ls_prediction_of_asset", "asset_id"),
        Index("ls_prediction_of_job", "job_id"),
        Index(
            "ls_prediction_worst",
            "job_id",
            "iou_min",
            postgresql_where=text("state = 'done' AND iou_min IS NOT NULL"),
        ),
        Index(
            "ls_prediction_open",
            "state",
            "model_version",
            "ls_task_id",
            postgresql_where=text("state <> 'done'"),
        ),
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
        CheckConstraint(one_of("standing", AnnotationStatus), name="ls_annotation_standing"),
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
    __table_args__ = (CheckConstraint(one_of("verdict", Verdict), name="ls_region_verdict"),)

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


class Click(Base):
    """One answer to a reviewer's prompt in Label Studio."""

    __tablename__ = "click"
    __table_args__ = (
        CheckConstraint(one_of("kind", ClickKind), name="click_kind"),
        CheckConstraint(one_of("answered_by", AnsweredBy), name="click_answered_by"),
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
