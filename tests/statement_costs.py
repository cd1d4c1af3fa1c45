"""What each function of db/ may cost, as Postgres counts it: pages of 8 KB that one of its statements touches.

CALL: for loops, looks and clicks. PAGE: reads or writes what it is asked for, a page or a chunk. Both must cost the
same in a job of every size. JOB: must read a job or a project as a whole; nothing calls it in a loop.

The limits are about twice what was measured with 1,000,000 assets. A page that a statement touches twice counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, event

CALL: dict[str, int] = {
    "annotations.judgeable": 20,
    "annotations.set_watermark": 20,
    "annotations.watermark": 20,
    "brake.pause_failing_jobs": 20,
    "clicks.add_click": 50,
    "clicks.clicked_task": 30,
    "clicks.mask_of_box": 20,
    "clicks.masks_around": 20,
    "clicks.masks_by_number": 20,
    "counters.add_masks": 60,
    "counters.read_masks": 40,
    "deletion.begin_deletion": 20,
    "deletion.begun_deletions": 20,
    "deletion.end_deletion": 20,
    "embeddings.claim": 70,
    "embeddings.has_wanted": 20,
    "embeddings.record_failed": 20,
    "embeddings.want_again": 30,
    "jobs.count_job": 20,
    "jobs.count_jobs": 20,
    "jobs.find_unfinished_job": 20,
    "jobs.finish_jobs": 30,
    "jobs.get_job": 20,
    "jobs.insert_job": 20,
    "jobs.is_idle": 20,
    "jobs.jobs_since": 20,
    "jobs.jobs_to_list": 20,
    "jobs.jobs_to_match": 20,
    "jobs.list_jobs": 20,
    "jobs.model_busy_fraction": 20,
    "jobs.note_error": 20,
    "jobs.record_list_failure": 20,
    "jobs.resume_job": 20,  # the chunks in the queue, a window of them
    "jobs.cancel_job": 1200,
    "leases.claim_chunk": 30,
    "list_shards.open_shards": 20,
    "list_shards.shorten_shard": 20,
    "list_shards.split_shard": 20,
    "leases.extend_lease": 20,
    "leases.finish_chunk": 30,
    "leases.release_chunk": 30,
    "metrics.assets_by_state": 70,
    "metrics.chunks_by_state": 300,
    "metrics.failed_by_kind": 20,
    "metrics.failed_starts": 20,
    "metrics.jobs_by_state": 20,
    "metrics.lease_overdue": 20,
    "metrics.listing_failing": 20,
    "metrics.live_processes": 20,
    "metrics.masks": 20,
    "metrics.oldest_chunks": 20,
    "metrics.predictions": 20,
    "metrics.unpublished": 20,
    "published.published": 60,
    "metrics.review_ages": 20,
    "partitions.partitions": 40,
    "partitions.make_partitions": 40,
    "processes.beat": 60,
    "processes.leave": 20,
    "processes.live": 20,
    "progress.at_work": 20,
    "progress.complete_up_to": 20,
    "progress.count_chunks": 20,  # open chunks
    "progress.last_errors": 30,
    "progress.totals": 20,
    "prompts.assets_with_unused_prompts": 20,
    "prompts.prompts_of": 20,
    "publishing.versions_in_doubt": 600,  # what is being sent
    "queue.expire_lease": 20,
    "queue.has_stale_sent": 20,
    "same_bytes.count_same_bytes": 20,
    "session.require_session": 20,
    "queue.count_active": 20,
    "queue.set_priority": 20,
    "results.require_job": 20,
    "results.masks_csv": 20,  # its COPY has a test of its own
    "results.labels_of": 30,
    "results.has_masks_without_label": 60,
    "prompts.classes_of": 30,
    "results.masks_per_asset": 30,
    "results.predicted_iou_percents": 30,
}
PAGE: dict[str, int] = {
    "annotations.forget_unjudged": 20,
    "annotations.known_tasks": 1300,
    "annotations.remember_unjudged": 20,
    "annotations.replace_annotations": 30,
    "clicks.assets_of_tasks": 1000,
    "deletion.delete_chunks": 2000,
    "deletion.delete_prompts": 20,
    "embedding_sweep.drop_without_file": 400,
    "embedding_sweep.known_addresses": 300,
    "embeddings.answered_assets": 400,
    "embeddings.embeddable_assets": 500,
    "embeddings.record_stored": 1900,
    "embeddings.stored_of": 200,
    "embeddings.touch": 2000,
    "embeddings.unsend": 200,
    "embeddings.want": 1600,
    "leases.answer_from_stored": 2700,  # with the masks that it writes; so are the other two that copy outcomes
    "leases.pending_assets": 400,
    "leases.record": 1400,
    "list_shards.add_shard_page": 220,
    "listing.add_assets": 200,
    "listing.new_ones": 600,
    "progress.assets_per_second": 1000,  # the outcomes of the 128 chunks sent last
    "prompts.asset_keys": 20,
    "prompts.prompt_keys": 20,
    "prompts.prompted_assets": 20,
    "prompts.store_matches": 20,
    "publishing.forget_predictions": 270,
    "publishing.forget_tasks": 2100,
    "publishing.mark_done": 2700,
    "publishing.mark_refused": 2100,
    "publishing.rows_of": 1300,
    "publishing.set_task_ids": 2700,
    "publishing.unpublished": 700,
    "publishing.version_rows": 800,
    "publishing.write_intents": 2200,
    "copied_outcomes.copy_outcomes": 2700,
    "copied_outcomes.remember_bytes": 500,
    "queue.reap": 50,
    "queue.resend_stale": 1300,
    "queue.take_window": 500,
    "queue.unsend": 20,
    "queue.unsend_job": 1300,
    "results.failed_of_keys": 600,
    "same_bytes.answer_same_bytes": 3500,
    "results.key_after": 20,
    "results.labeled_assets": 500,
    "results.labeled_of_keys": 600,
    "results.bare_assets": 500,
    "results.bare_of_keys": 600,
    "results.stream_failed": 600,
    "review_order.add_ranks": 400,
    "review_order.pairs": 700,
    "review_order.unpublished_in_order": 1500,
    "review_order.unpublished_without_order": 700,
    "results.masks_of": 20,
    "progress.stored_over_time": 1500,
    "reviewed_masks.chosen_masks": 2400,
    "reviewed_masks.reviewed_assets": 2400,
    "samples.failed_of_each_kind": 600,
    "samples.labeled_of_ids": 600,
    "samples.mean_ious": 600,
    "samples.photo_of": 20,
    "samples.sample_ids": 1600,
}
JOB = {
    "clicks.click_tallies",  # review
    "clicks.models_of_projects",  # once, when the service starts
    "corrections.annotated_sources",  # of `tune`
    "corrections.corrected_assets",
    "deletion.empty_partition",
    "deletion.whole_partitions",
    "embedding_sweep.drop_annotated",  # the sweep compares the whole store
    "embedding_sweep.drop_expired",
    "embedding_sweep.drop_over_budget",
    "embedding_sweep.stored_embeddings",
    "embeddings.fail_abandoned",
    "embeddings.reserve",
    "embeddings.take_unsent",
    "embeddings.totals",
    "jobs.retry_failed",  # by index: what failed
    "metrics.embedding_bytes",  # read as seldom as reading takes long
    "metrics.embeddings",
    "prompts.store_prompts",
    "published.count_done",
    "published.count_tasks",
    "published.refused_of",
    "publishing.forget_refused",
    "queue.expire_all_leases",  # of `run`, before it starts
    "results.failed_assets",  # shows them all
    "review_counts.annotators",
    "review_counts.asset_counts",
    "review_counts.kept_by_score",
    "review_counts.lead_seconds",
    "review_counts.tallies",
    "review_counts.worst_assets",
    "review_order.finish_order",
    "review_order.order_by_score",
    "review_order.start_order",
    "reviewed_masks.annotated_assets",
    "reviewed_masks.annotations_read",
    "reviewed_masks.labels_left",
}
NO_STATEMENT = {"copying.copy_in", "copying.copy_out", "copying.copy_rows", "mask_rows.copy_masks"}  # only COPY

_BIG_PAGES = 200  # a table of more pages than this is not to be read from end to end


@dataclass(slots=True)
class Cost:
    """What one statement cost. scanned: tables that were read from end to end, with their pages."""

    statement: str
    pages: int
    milliseconds: float
    scanned: dict[str, int] = field(default_factory=dict)


@contextmanager
def measured(engine: Engine) -> Iterator[list[Cost]]:
    """Every statement of the engine runs once before, under EXPLAIN (ANALYZE, BUFFERS), and is undone."""
    costs: list[Cost] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if many or statement.split(None, 1)[0] not in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"):
            return
        other = connection.connection.cursor()
        other.execute("SAVEPOINT cost")
        other.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters or None)
        [found] = other.fetchone()[0]
        other.execute("ROLLBACK TO cost")
        other.close()
        cost = Cost(
            statement=" ".join(statement.split()), pages=_pages(found["Plan"]), milliseconds=found["Execution Time"]
        )
        for node in _nodes(found["Plan"]):
            if node["Node Type"] == "Seq Scan" and _pages(node) > _BIG_PAGES:
                cost.scanned[node["Relation Name"]] = _pages(node)
        costs.append(cost)

    event.listen(engine, "before_cursor_execute", explain)
    try:
        yield costs
    finally:
        event.remove(engine, "before_cursor_execute", explain)


def _pages(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from _nodes(below)
