"""The tables of counters: a look at a job reads these and no outcomes. `db.tables` has the others.

A counter has a row a slot. Workers that write at the same time use different slots, so they do not wait for each other.
The sum over the slots counts, and it is exact in each snapshot.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import CheckConstraint, Computed, Double, ForeignKey, Integer
from sqlalchemy.orm import Mapped, mapped_column

from db.base import Base, one_of
from db.states import MaskCount

_ROOM = {"postgresql_with": {"fillfactor": "50"}}  # an update finds room on its page and touches no index


class OutcomeCounter(Base):
    """A job's outcomes of one kind. The trigger `count_outcomes` writes it, whoever writes outcomes."""

    __tablename__ = "outcome_counter"
    __table_args__ = (_ROOM,)

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    error_kind: Mapped[str] = mapped_column(primary_key=True)  # '' of labeled assets
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)  # -1: what was there before the counters were
    assets: Mapped[int]
    masks: Mapped[int]
    reused: Mapped[int]  # answered by an earlier job
    without_size: Mapped[int]  # their image was not read
    unused: Mapped[int]  # labeled, with prompts that could not be used
    changed: Mapped[int]  # their bytes were not those of the listing


class MaskCounter(Base):
    """What a job's masks have in common. Written with the masks by `db.leases`."""

    __tablename__ = "mask_counter"
    __table_args__ = (CheckConstraint(one_of("kind", MaskCount), name="mask_counter_kind"), _ROOM)

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Computed("md5(value)", persisted=True), primary_key=True)  # labels may be long
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    value: Mapped[str]
    number: Mapped[int]


class PredictionCounter(Base):
    """What a project has of a job, by the state of the predictions. The trigger `count_predictions` writes it.

    slot: 0, or -1 of what was there before the counter was. A project has one writer at a time.
    """

    __tablename__ = "prediction_counter"
    __table_args__ = (_ROOM,)

    job_id: Mapped[int] = mapped_column(primary_key=True)  # without a foreign key: predictions outlive their job
    server: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(Integer, primary_key=True)
    predictions: Mapped[int]
    masks_shown: Mapped[int]
    masks_left_out: Mapped[int]
    iou_sum: Mapped[float] = mapped_column(Double)


class WorkerTime(Base):
    """The time of one worker on a job, written by the same trigger. What is retried later still took this time."""

    __tablename__ = "worker_time"
    __table_args__ = (_ROOM,)

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    worker: Mapped[str] = mapped_column(primary_key=True)
    first_at: Mapped[datetime]  # its first stored batch
    last_at: Mapped[datetime]
    first_ms: Mapped[int]  # of the model's work on the first batch
    total_ms: Mapped[int]
