"""What a tuning is asked: a file that the command writes and the process that trains reads. Never loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.models.spec import ModelError

FILE_NAME = "plan.json"
CHECKPOINT_NAME = "checkpoint.safetensors"  # beside it from the first step on
_MOST_BYTES = 4 << 30

Point = tuple[float, float]
Box = tuple[float, float, float, float]


class TuneError(ModelError):
    """A tuning cannot begin or go on. The message says why, and what to do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlannedMask(_Frozen):
    """A mask that a person kept, edited or added. counts: COCO compressed run lengths."""

    counts: str
    label: str


class PlannedWrong(_Frozen):
    """A prompt whose mask a person deleted, in pixels of the upright image. point_xy or box_xyxy."""

    point_xy: Point | None = None
    box_xyxy: Box | None = None


class PlannedAsset(_Frozen):
    """An annotated asset. etag: of the bytes that the job read. embedding: the address of its kept embedding."""

    key: str
    etag: str
    size_hw: tuple[int, int]
    embedding: str | None
    masks: list[PlannedMask]
    wrong: list[PlannedWrong] = []


class Plan(_Frozen):
    """A tuning. model: what is tuned. weights_sha256: its weights (`files.weights_sha256`).

    job, project: whose annotations teach. source: of the assets. fast: kept embeddings are those of precision=fast.
    automatic: parameters of automatic masks, as a job has them.
    """

    name: str
    model: str
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    job: int
    project: int
    server: str
    source: str
    fast: bool = False
    seed: int
    automatic: dict[str, Any] = {}
    assets: list[PlannedAsset]


def write_plan(plan: Plan, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE_NAME}.part"
    part.write_text(plan.model_dump_json(), encoding="utf-8")
    part.replace(folder / FILE_NAME)


def read_plan(folder: Path) -> Plan | None:
    """The plan in a folder, None when there is none. Raises TuneError when it cannot be read."""
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise TuneError(f"{path}: larger than {_MOST_BYTES:,} bytes; remove the folder and start again")
        return Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise TuneError(f"{path}: cannot be read ({error}); remove the folder and start again") from error


def forget_untrained(folder: Path) -> None:
    """Remove the plan of a tuning that took no step. So the next try reads the annotations again."""
    if not (folder / CHECKPOINT_NAME).exists():
        (folder / FILE_NAME).unlink(missing_ok=True)
