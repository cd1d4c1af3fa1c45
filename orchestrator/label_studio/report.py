"""What one pass of `publish` did, counted."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Report:
    """What one `publish_job` did. refused: (uri, reason) of each asset that the project could not take."""

    created: int = 0
    attached: int = 0  # predictions added to tasks that were there
    adopted: int = 0  # found on the server, with no stored answer
    already: int = 0  # there before, from this job or another with the same model_version
    repaired: int = 0  # stored, but gone from the server: sent again
    duplicates_removed: int = 0
    masks_left_out: int = 0  # of all that the project has of the job, not of this pass alone
    without_prompts: int = 0  # labeled without reading the image, in a job with prompts: not published
    shown_version: str = ""
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
