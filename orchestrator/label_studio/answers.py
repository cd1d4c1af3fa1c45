"""The answers of Label Studio's server, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A project as the server describes it. model_version: the version of the predictions it shows, "" for none."""

    id: int
    title: str
    label_config: str
    model_version: str
    task_count: int
    sampling: str
    created_at: str

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Project:
        return cls(
            id=found["id"],
            title=found["title"] or "",
            label_config=found["label_config"] or "",
            model_version=found["model_version"] or "",
            task_count=found["task_number"] or 0,
            sampling=found["sampling"] or "",
            created_at=found["created_at"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTask:
    """A task that a lookup found. The content of its predictions is not fetched."""

    id: int
    asset_id: str
    prediction_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The server's answer to an import: the tasks' ids in the order sent, and how many predictions were imported."""

    task_ids: tuple[int, ...]
    prediction_count: int
