"""The closed sets of words that columns hold: states and verdicts."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    LISTING = "listing"  # its source is still being listed; chunks already run
    RUNNING = "running"  # listed; chunks remain
    DONE = "done"  # every asset has an outcome
    CANCELLED = "cancelled"  # by a person; `resume` continues it
    PAUSED = "paused"  # too many of its assets failed; `resume` continues it
    FAILED = "failed"  # its source could not be listed; `resume` tries again


class LsState(StrEnum):
    SENDING = "sending"  # about to be sent; after a crash only Label Studio can say whether it arrived
    DONE = "done"  # the server confirmed it
    REFUSED = "refused"  # it does not fit the project, `error` says why; the next `publish` tries again


class AnnotationStatus(StrEnum):
    """Whether an annotation counts. `review.choose` has the rules."""

    CHOSEN = "chosen"  # the one of its asset that is measured and exported
    OTHER = "other"  # another annotator's
    SUPERSEDED = "superseded"  # its annotator has a newer one of the same task
    SKIPPED = "skipped"  # the annotator skipped the task


class Verdict(StrEnum):
    """What a person did about one mask."""

    KEPT = "kept"
    EDITED = "edited"
    DELETED = "deleted"
    ADDED = "added"


class ChunkState(StrEnum):
    NEW = "new"  # waits for room in the queue
    SENT = "sent"  # a message is on its way, or was lost
    RUNNING = "running"  # a worker holds its lease
    DONE = "done"  # each of its assets has an outcome


class EmbeddingState(StrEnum):
    WANTED = "wanted"  # a worker is to make it
    STORED = "stored"
    FAILED = "failed"  # `error` says why


class ClickKind(StrEnum):
    """What a reviewer asked with."""

    POINT = "point"  # one or more points
    BOX = "box"
    MIXED = "mixed"  # a box and points
    PICK = "pick"  # a choice among the stored masks
    REFINE = "refine"  # points on a published mask


class AnsweredBy(StrEnum):
    DECODER = "decoder"  # from the image's embedding
    STORED = "stored"  # one of the stored masks
    NOTHING = "nothing"  # no mask was found


class ProcessKind(StrEnum):
    WORKER = "worker"  # one device of `maskfleet worker`
    DISPATCHER = "dispatcher"
    PUBLISHER = "publisher"
    REVIEWER = "reviewer"
    ASSIST = "assist"


class MaskCount(StrEnum):
    """What `mask_counter` counts."""

    LABEL = "label"  # masks with this label
    CLASS = "class"  # masks of this class of a detector, or of this phrase
    IOU_PERCENT = "iou_percent"  # masks with this predicted IoU: whole percent, rounded down, 0 to 99, or "NaN"
    MASKS_AN_ASSET = "masks_an_asset"  # assets with this number of masks
    SAME_BYTES = "same_bytes"  # assets that were answered by another one with the same bytes; of the value ''
