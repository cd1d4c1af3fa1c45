"""Changes that each remove one safeguard of the code, with the tests that must notice.

A test that passes without the safeguard proves nothing about it. `make mutate` applies the changes one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_QUERIES = "tests/integration/test_queries.py"
_FAIR = "tests/integration/test_fair_queue.py"
_FENCING = "tests/integration/test_fencing.py"
_TABLES = "tests/integration/test_mask_tables.py"
_CHUNKS = "tests/integration/test_chunk_runs.py"
_PUBLISH = "tests/label_studio/test_publish.py"
_PULL = "tests/integration/test_pull.py"
_ORDER = "tests/label_studio/test_order.py"
_REPLACED = "tests/integration/test_replaced_pictures.py"
_KEPT = "tests/integration/test_kept_embeddings.py"
_FOLDER = "tests/e2e/test_folder.py"
_DELETION = "tests/integration/test_deletion.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """before: text that is in the file exactly once. tests: ids of pytest, of which one must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Change the file below root. Raises ValueError when the text is not there exactly once."""
        path = root / self.file
        source = path.read_text()
        if (count := source.count(self.before)) != 1:
            raise ValueError(f"{self.name}: {self.file} has the text {count} times, expected once: {self.before!r}")
        path.write_text(source.replace(self.before, self.after))


MUTATIONS = (
    # leases and their tokens
    Mutation(
        name="the token check of a worker's writes",
        file="db/leases.py",
        before="id = :id AND token = :token AND state = 'running'\n              AND EXISTS",
        after="id = :id AND state = 'running'\n              AND EXISTS",
        tests=(f"{_QUERIES}::test_a_worker_that_woke_after_its_lease_expired_writes_nothing",),
    ),
    Mutation(
        name="a mask that cannot be a row is no outage of Postgres",
        file="db/copying.py",
        before="raise source.error or error from None",
        after="raise",
        tests=(f"{_QUERIES}::test_a_mask_that_cannot_be_a_row_is_named_as_such_and_nothing_is_stored",),
    ),
    Mutation(
        name="the state check of a worker's writes",
        file="db/leases.py",
        before="id = :id AND token = :token AND state = 'running'\n              AND EXISTS",
        after="id = :id AND token = :token\n              AND EXISTS",
        tests=(f"{_FENCING}::test_a_finished_chunk_takes_no_more_writes_from_the_worker_that_finished_it",),
    ),
    Mutation(
        name="the job's state in a worker's writes",
        file="db/leases.py",
        before="""
              AND EXISTS (SELECT 1 FROM job WHERE id = chunk.job_id AND state IN ('listing', 'running'))""",
        after="",
        tests=(f"{_QUERIES}::test_a_cancelled_job_takes_no_more_outcomes_and_goes_on_when_resumed",),
    ),
    Mutation(
        name="the token check of a release",
        file="db/leases.py",
        before='WHERE id = :id AND token = :token AND state = \'running\'"""\n        ),\n        {\n',
        after='WHERE id = :id AND state = \'running\'"""\n        ),\n        {\n',
        tests=(f"{_FENCING}::test_a_worker_that_lost_its_chunk_does_not_release_it_for_its_heir",),
    ),
    Mutation(
        name="the chunk's state in a claim",
        file="db/leases.py",
        before="\n                     AND chunk.state IN ('new', 'sent')",
        after="",
        tests=(f"{_QUERIES}::test_a_chunk_is_claimed_by_one_of_many_workers_at_once",),
    ),
    Mutation(
        name="the new token of a claim",
        file="db/leases.py",
        before="SET state = 'running', token = token + 1, worker",
        after="SET state = 'running', worker",
        tests=(f"{_FENCING}::test_each_claim_and_each_end_of_a_lease_has_a_token_of_its_own",),
    ),
    Mutation(
        name="the new token of a chunk that is taken back",
        file="db/queue.py",
        before="SET state = 'new', token = token + 1, in_flight",
        after="SET state = 'new', in_flight",
        tests=(f"{_FENCING}::test_each_claim_and_each_end_of_a_lease_has_a_token_of_its_own",),
    ),
    Mutation(
        name="an outcome that exists is kept",
        file="db/leases.py",
        before="ON CONFLICT (asset_id) DO NOTHING RETURNING asset_id)",
        after="ON CONFLICT (asset_id) DO UPDATE SET mask_count = excluded.mask_count RETURNING asset_id)",
        tests=(f"{_QUERIES}::test_recording_the_same_outcome_twice_keeps_the_first",),
    ),
    Mutation(
        name="the etag's comparison before an answer from stored",
        file="db/leases.py",
        before="o.error_kind IS NULL AND a.etag = coalesce(o.etag, b.etag)",
        after="o.error_kind IS NULL",
        tests=(f"{_FENCING}::test_an_asset_whose_etag_changed_is_not_answered_from_stored",),
    ),
    # queue and reaper
    Mutation(
        name="deaths count only of an asset that ran alone",
        file="db/queue.py",
        before='"alone": 1 if len(in_flight) == 1 else 0',
        after='"alone": 1',
        tests=(f"{_QUERIES}::test_assets_in_flight_together_become_suspects_and_come_last",),
    ),
    Mutation(
        name="two dispatchers do not send the same chunk",
        file="db/queue.py",
        before="(SELECT id FROM wanted) AND state = 'new' FOR UPDATE SKIP LOCKED)",
        after="(SELECT id FROM wanted))",
        tests=(f"{_FENCING}::test_a_chunk_that_another_dispatcher_is_sending_is_left_to_it",),
    ),
    Mutation(
        name="what a job has in the queue counts for its share",
        file="db/queue.py",
        before="(coalesce(queued.n, 0) - 1 + row_number()",
        after="(row_number()",
        tests=(
            f"{_FAIR}::test_a_small_job_waits_for_no_more_chunks_than_the_stated_bound_whoever_came_first",
            f"{_FAIR}::test_each_step_of_priority_doubles_a_jobs_share_of_what_is_handed_out",
        ),
    ),
    Mutation(
        name="the job that was served longest ago comes first",
        file="db/queue.py",
        before="WHERE NOT returned\n                ORDER BY share, served_at NULLS FIRST, id",
        after="WHERE NOT returned\n                ORDER BY share, id",
        tests=(f"{_FAIR}::test_no_job_is_left_out_beside_urgent_ones_though_there_are_more_than_the_queue_has_places",),
    ),
    Mutation(
        name="the token check before masks of the same bytes are copied",
        file="db/same_bytes.py",
        before="""    extend_lease(db, chunk=chunk, lease_seconds=lease_seconds)
""",
        after="",
        tests=("tests/integration/test_same_bytes.py::test_a_worker_that_lost_its_chunk_copies_nothing",),
    ),
    Mutation(
        name="the model_version in the key of bytes",
        file="db/same_bytes.py",
        before='f"{kind} {name} {model_version}"',
        after='f"{kind} {name}"',
        tests=("tests/integration/test_same_bytes.py::test_other_parameters_and_jobs_that_did_not_ask_share_nothing",),
    ),
    Mutation(
        name="no copy of a message that may still wait",
        file="db/queue.py",
        before='lost = "" if queue_is_empty else f"AND {_OVERTAKEN}"',
        after='lost = ""',
        tests=(f"{_QUERIES}::test_a_lost_message_is_noticed_though_the_queue_is_never_empty",),
    ),
    Mutation(
        name="commit before publish",
        file="workers/running/tasks.py",
        before="""            sent = queue.take_window(db, window=window)
        for chunk_ids, lane in ((sent.returned, FIRST_QUEUE), (sent.new, QUEUE)):
            if chunk_ids:
                publish_chunks(chunk_ids, queue=lane)
""",
        after="""            sent = queue.take_window(db, window=window)
            for chunk_ids, lane in ((sent.returned, FIRST_QUEUE), (sent.new, QUEUE)):
                if chunk_ids:
                    publish_chunks(chunk_ids, queue=lane)
""",
        tests=("tests/faults/test_commit_first.py",),
    ),
    Mutation(
        name="the pool's child leaves SIGTERM to its worker",
        file="workers/running/tasks.py",
        before="    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n",
        after="",
        tests=("tests/faults/test_faults.py::test_sigterm_drains_a_worker_and_gives_its_chunk_back",),
    ),
    # jobs
    Mutation(
        name="a job with an open chunk is not done",
        file="db/jobs.py",
        before="""
           AND NOT EXISTS (SELECT 1 FROM chunk WHERE job_id = job.id AND state <> 'done')""",
        after="",
        tests=(f"{_QUERIES}::test_a_job_is_done_when_it_is_listed_and_no_chunk_is_open",),
    ),
    Mutation(
        name="a job is looked at again under its lock before it is done",
        file="db/jobs.py",
        before="WHERE id = ANY(:ids) AND {_OVER} RETURNING id",
        after="WHERE id = ANY(:ids) RETURNING id",
        tests=(f"{_FENCING}::test_a_job_whose_retry_commits_while_it_is_finished_stays_at_work",),
    ),
    Mutation(
        name="a partition is looked at again under its lock before it is emptied",
        file="db/deletion.py",
        before="    if db.execute(_OTHERS, values).scalar_one():",
        after="    if False:",
        tests=(f"{_DELETION}::test_a_partition_in_which_a_listing_has_assets_that_are_not_committed_is_not_emptied",),
    ),
    Mutation(
        name="the cursor's comparison before a page is stored",
        file="db/listing.py",
        before=" AND list_cursor IS NOT DISTINCT FROM :before",
        after="",
        tests=(f"{_QUERIES}::test_a_page_is_stored_once_however_many_listers_come_with_it",),
    ),
    Mutation(
        name="retry takes only what failed",
        file="db/jobs.py",
        before="WHERE o.job_id = :job_id AND o.error_kind IS NOT NULL",
        after="WHERE o.job_id = :job_id",
        tests=(f"{_FENCING}::test_retry_keeps_what_is_labeled",),
    ),
    Mutation(
        name="a retried chunk is taken from the worker that holds it",
        file="db/jobs.py",
        before="SET state = 'new', token = token + 1, in_flight = '{{}}', lease_until = NULL,\n"
        "                   transient_failures",
        after="SET state = CASE state WHEN 'running' THEN state ELSE 'new' END,\n                   transient_failures",
        tests=(f"{_FENCING}::test_what_is_retried_while_its_chunk_runs_is_not_left_behind",),
    ),
    # a chunk's run
    Mutation(
        name="in flight is committed before an asset is read",
        file="workers/running/chunk.py",
        before="""                self._record(outcomes, marked)
                if self._keeper is not None:
                    self._keeper.keep(outcomes)
                for asset in marked:
                    ahead.start(asset)
""",
        after="""                for asset in marked:
                    ahead.start(asset)
                self._record(outcomes, marked)
                if self._keeper is not None:
                    self._keeper.keep(outcomes)
""",
        tests=(f"{_CHUNKS}::test_no_asset_is_read_before_it_is_marked_as_in_flight",),
    ),
    Mutation(
        name="a lost lease stops the work",
        file="workers/running/held_lease.py",
        before="                self._lost.set()\n                return\n",
        after="                return\n",
        tests=(f"{_CHUNKS}::test_a_worker_that_lost_its_lease_starts_no_further_asset",),
    ),
    Mutation(
        name="the heartbeat's stop in a worker where nothing moves",
        file="workers/running/held_lease.py",
        before="                self._worker.on_hang()\n                return\n",
        after="                pass\n",
        tests=(f"{_CHUNKS}::test_a_worker_in_which_no_asset_finishes_gives_itself_up",),
    ),
    # publish and review
    Mutation(
        name="the outbox's intent before the request",
        file="orchestrator/label_studio/outgoing.py",
        before="""                ids = self._write_intents(batch)
                before = thread.submit(self._sender.deliver, batch, before)
                in_flight.append((ids, before))
""",
        after="""                before = thread.submit(self._sender.deliver, batch, before)
                before.result()
                ids = self._write_intents(batch)
                in_flight.append((ids, before))
""",
        tests=(f"{_ORDER}::test_what_a_request_carries_is_in_the_outbox_before_the_server_sees_it",),
    ),
    Mutation(
        name="what is in doubt is looked up before it is sent again",
        file="orchestrator/label_studio/sending.py",
        before="        tasks, versioned = find_on_server(self._client, self._project_id, uids, self._model_version)\n",
        after="        tasks, versioned = {}, {}\n",
        tests=(f"{_PUBLISH}::test_an_outbox_that_was_lost_is_made_again_from_the_server",),
    ),
    Mutation(
        name="a task's number is looked up before it is written to",
        file="orchestrator/label_studio/sending.py",
        before="        if self._careful or any(entry.task_id is not None for entry in entries):\n",
        after="        if self._careful:\n",
        tests=(f"{_PUBLISH}::test_a_number_that_the_server_gave_to_another_task_is_not_written_to",),
    ),
    Mutation(
        name="a request whose answer was lost is waited for before it is sent again",
        file="orchestrator/label_studio/sending.py",
        before="(0 if error.status in _ANSWERED_ITSELF else self._settle_seconds)",
        after="0",
        tests=(f"{_ORDER}::test_a_gateway_that_hands_a_request_on_after_its_504_doubles_nothing",),
    ),
    Mutation(
        name="after a lost answer the server is asked what arrived",
        file="orchestrator/label_studio/sending.py",
        before="                entries = self._missing_at_last(entries, acknowledged, error)\n",
        after="",
        tests=(f"{_PUBLISH}::test_an_answer_that_is_lost_is_looked_up_and_nothing_is_sent_twice[504]",),
    ),
    Mutation(
        name="one publisher a project",
        file="db/publishing.py",
        before='text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")',
        after='text("SELECT true OR hashtextextended(:name, 0) = 0")',
        tests=(f"{_ORDER}::test_a_second_publisher_waits_until_the_first_is_through",),
    ),
    Mutation(
        name="the watermark moves after the pages are stored",
        file="orchestrator/label_studio/review.py",
        before="    count = 0\n    for filters in",
        after="    with engine.begin() as db:\n"
        "        set_watermark(db, ls_project=ls_project, watermark=newest)\n"
        "    count = 0\n    for filters in",
        tests=(f"{_ORDER}::test_a_reader_that_is_stopped_between_two_pages_reads_the_rest_the_next_time",),
    ),
    Mutation(
        name="the watermark's overlap",
        file="orchestrator/label_studio/review.py",
        before="_changed_since(seen - _OVERLAP)",
        after="_changed_since(seen)",
        tests=(f"{_ORDER}::test_a_change_that_was_committed_late_with_an_earlier_time_is_read",),
    ),
    Mutation(
        name="a page of tasks begins behind the last id",
        file="orchestrator/label_studio/client.py",
        before="        if ordering:\n",
        after="        if True:\n",
        tests=(f"{_ORDER}::test_no_task_is_skipped_when_one_is_deleted_and_another_added_between_two_pages",),
    ),
    Mutation(
        name="no older state of a task is put over a newer one",
        file="db/annotations.py",
        before=" AND (changed_at IS NULL OR changed_at <= n.moment)",
        after="",
        tests=(f"{_PULL}::test_a_slow_review_does_not_put_an_older_state_of_a_task_over_a_newer_one",),
    ),
    Mutation(
        name="a following publisher goes on with the other jobs",
        file="orchestrator/label_studio/publish.py",
        before="with _apart(job, troubles) if job_id is None else nullcontext():",
        after="with nullcontext():",
        tests=(f"{_PUBLISH}::test_a_job_that_cannot_be_published_keeps_no_other_from_it",),
    ),
    # what a deletion or a lost device must not hide
    Mutation(
        name="a page of a deleted job is no last page of an export",
        file="db/results.py",
        before="        require_job(db, job_id=job_id)  # a page of",
        after="        # a page of",
        tests=(f"{_TABLES}::test_a_job_that_is_deleted_between_two_pages_is_an_error_and_no_short_export",),
    ),
    Mutation(
        name="a device that is lost in what nobody foresaw ends the process",
        file="workers/running/chunk.py",
        before="        judge(error)  # ends the process when the device is lost\n        # Otherwise",
        after="        # Otherwise",
        tests=(f"{_CHUNKS}::test_a_device_that_is_lost_outside_of_an_assets_look_ends_the_process_too",),
    ),
    Mutation(
        name="the sweep deletes embeddings alone",
        file="workers/embeddings/sweep.py",
        before="found.changed_at < before and is_ours(found.name)",
        after="found.changed_at < before",
        tests=(
            "tests/integration/test_kept_embeddings.py::test_files_that_are_no_embeddings_are_left_alone_however_old",
        ),
    ),
    # what people left
    Mutation(
        name="annotations count for the bytes that were published",
        file="db/reviewed_masks.py",
        before="\n                 AND coalesce(theirs.etag, a.etag) = coalesce(mine.etag, my.etag)",
        after="",
        tests=(f"{_REPLACED}::test_an_annotation_from_nothing_counts_for_the_bytes_that_were_published",),
    ),
    Mutation(
        name="annotations count for the bytes that people saw",
        file="db/reviewed_masks.py",
        before="(n.asset_id IS NULL OR coalesce(seen.etag, began.etag) = coalesce(mine.etag, my.etag))\n"
        "               AND ",
        after="",
        tests=(f"{_REPLACED}::test_an_annotation_of_the_picture_before_is_not_exported_for_the_one_that_replaced_it",),
    ),
    Mutation(
        name="the hash of an image alone says whether it judges a tuning",
        file="workers/tuning/gathering.py",
        before="judging = {one.content for one in gathered if int(one.content[:8], 16) < _FIFTH}",
        after="judging = {*sorted({one.content for one in gathered})[: len(gathered) // 5]}",
        tests=("tests/unit/test_tuning.py::test_an_image_stays_on_its_side_when_others_come",),
    ),
    # one machine: what a command finds of the one before it
    Mutation(
        name="a deletion that was interrupted comes before the newest job",
        file="orchestrator/cli/app.py",
        before="return next(iter(deletion.begun_deletions(db)), newest)",
        after="return newest",
        tests=(f"{_FOLDER}::test_a_deletion_in_a_folder_that_was_interrupted_goes_on_and_spares_the_job_before",),
    ),
    Mutation(
        name="a program that has the number of a server which is gone lives on",
        file="orchestrator/local/postgres.py",
        before="if pid_file.exists() and _is_anothers(pid_file):",
        after="if False:",
        tests=("tests/integration/test_left_postgres.py::test_a_program_that_has_the_servers_old_number_lives_on",),
    ),
    Mutation(
        name="the stop file goes before a worker starts again",
        file="workers/running/devices.py",
        before=", error_file(worker.run_dir), stop_file(worker.run_dir)):",
        after=", error_file(worker.run_dir)):",
        tests=(
            "tests/unit/test_restarts.py::test_a_worker_that_stopped_by_itself_does_not_drain_when_it_is_started_again",
        ),
    ),
    Mutation(
        name="a worker that is killed leaves no semaphores",
        file="workers/running/devices.py",
        before="            os.kill(child, signal.SIGKILL)\n",
        after="            os.killpg(process.pid, signal.SIGKILL)\n",
        tests=("tests/e2e/test_run.py::test_a_run_leaves_no_file_in_the_temporary_folder_and_no_semaphore",),
    ),
    # embeddings
    Mutation(
        name="wanting an embedding is no attempt to make it",
        file="db/embeddings.py",
        before="WHERE embedding.state <> 'stored' AND :seconds > 0",
        after="WHERE embedding.state <> 'stored'",
        tests=(f"{_KEPT}::test_an_answered_asset_that_several_runs_want_was_not_tried_yet",),
    ),
    Mutation(
        name="a claim of a wanted embedding runs out",
        file="db/embeddings.py",
        before="WHERE state = 'wanted' AND attempts >= :most AND claimed_until < now()",
        after="WHERE state = 'wanted' AND attempts >= :most AND claimed_until < now() - interval '1 day'",
        tests=(f"{_KEPT}::test_a_claim_runs_out_and_after_three_deaths_the_embedding_fails",),
    ),
)
