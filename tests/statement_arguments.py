"""Arguments for every function of db/ that takes a connection, on the database that `tests.filled` makes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, text

from db import copied_outcomes, jobs, leases, list_shards, listing, results, review_order
from db.annotations import AnnotationRow
from db.clicks import Click
from db.embedding_sweep import StoredEmbedding
from db.jobs import Job
from db.leases import ClaimedChunk, NewOutcome
from db.listing import NewAsset
from db.partitions import Partition
from db.processes import Beat
from db.publishing import Intent
from db.same_bytes import ReadBytes
from db.states import AnnotationStatus, AnsweredBy, ClickKind, LsState, MaskCount, ProcessKind
from tests.factories import labeled
from tests.filled import CHUNK, LS_PROJECT, SOURCE, VERSION, Filled

Given = dict[str, Any]


def arguments(db: Connection, filled: Filled, function: str) -> Given:
    """Values by parameter name: mostly a chunk's worth of the large job, about its middle."""
    middle = filled.first_asset_id + filled.assets // 2 // CHUNK * CHUNK
    given = {
        "job_id": filled.job_id,
        "job_ids": [filled.job_id],
        "asset_id": middle + 1,
        "asset_ids": list(range(middle, middle + CHUNK)),
        "error": "e",
        "limit": 100,
        "page": 64,
    }
    given |= _of_chunks(db, filled, middle) | _of_jobs(middle) | _of_tasks(db, filled, middle) | _of_embeddings(db)
    return given | OTHERS.get(function, lambda *_: {})(db, given)


def _of_chunks(db: Connection, filled: Filled, middle: int) -> Given:
    chunk = claim(db, filled.open_chunk)
    first, last = chunk.first_asset_id, chunk.last_asset_id
    return {
        "chunk": chunk,
        "chunk_id": filled.open_chunk + 1,
        "chunk_ids": list(range(filled.open_chunk, filled.open_chunk + 64)),
        "worker": "w",
        "pid": 1,
        "lease_seconds": 60.0,
        "in_flight": [first, last],
        "outcomes": [
            *(labeled(n, masks=4) for n in range(first, last)),
            NewOutcome(asset_id=last, error_kind="truncated"),
        ],
        "transient_error": False,
        "most_failures": None,
        "queue_is_empty": True,
        "resend_seconds": 60.0,
        "window": 64,
        "last_asset_id": middle,
        "kind": MaskCount.LABEL,
        # As far as it is the large job's alone.
        "partition": Partition(
            table="mask_part_0", first=filled.first_asset_id, bound=filled.first_asset_id + filled.assets
        ),
        "most": 4,
        "beats": [Beat(kind=ProcessKind.WORKER, name="w", host="h", pid=1, version="1")],
    }


def _of_jobs(middle: int) -> Given:
    return {
        "name": "n",
        "source": SOURCE,
        "model": "stub",
        "model_version": VERSION,
        "asked": {},
        "fresh": False,
        "lasting": False,
        "error_kind": None,
        "priority": 7,
        "moment": datetime(2020, 1, 1, tzinfo=UTC),
        "assets": [NewAsset(key=f"z{n:05}", size_bytes=1, etag="e") for n in range(CHUNK)],
        "cursor": "z99",
        "skipped": {},
        "complete": False,
        "chunk_size": CHUNK,
        "rows": [("a", "[1]")],
        "after": f"{middle:09}.jpg",
        "pairs": [(middle, "k")],
        "matched": {"n": 1},
        "min_score": 0.5,
        "label": None,
        "at_random": True,
        "chunks": 48,
        "each": 40,
    }


def _of_tasks(db: Connection, filled: Filled, middle: int) -> Given:
    early = filled.first_asset_id + 2 * CHUNK
    published = {"ids": [n for n in range(early, early + CHUNK) if n % 100]}
    rows = db.execute(text("SELECT id, task_id, asset_uid FROM ls_task WHERE task_id = ANY(:ids)"), published).all()
    tasks, one = {row.id: row.task_id for row in rows}, rows[0]
    now = datetime.now(UTC)
    annotation = AnnotationRow(
        annotation_id=1,
        annotator=1,
        standing=AnnotationStatus.CHOSEN,
        ground_truth=False,
        lead_seconds=1.0,
        updated_at=now,
        model_version=VERSION,
        asset_id=early,
    )
    click = Click(
        ls_task_id=one.id,
        kind=ClickKind.POINT,
        answered_by=AnsweredBy.DECODER,
        label=None,
        milliseconds=9,
        prompt_id="p",
        region_id=None,
    )
    return {
        "ls_project": LS_PROJECT,
        "ls_projects": [LS_PROJECT],
        "ls_task_ids": list(tasks),
        "task_ids": tasks,
        "task_id": one.task_id,
        "asset_uid": one.asset_uid,
        "asset_uids": [row.asset_uid for row in rows],
        "annotations": {one.id: [annotation]},
        "changed_at": {one.id: now},
        "watermark": now,
        "click": click,
        "x": 5,
        "y": 5,
        "box_xyxy": (1.0, 1.0, 9.0, 9.0),
        "numbers": [0, 1],
        "state": LsState.SENDING,
        "after_ls_task_id": 0,
        "errors": dict.fromkeys(tasks, "e"),
        "intents": [_intent(n) for n in range(middle, middle + CHUNK)],
    }


def _intent(n: int) -> Intent:
    return Intent(
        asset_uid=f"uid {n}", uri=f"s3://b/{n}", asset_id=n, mask_count=4, left_out=0, iou_sum=4.0, iou_min=0.9
    )


def _of_embeddings(db: Connection) -> Given:
    kept = {
        row.id: row.address for row in db.execute(text("SELECT id, address FROM embedding ORDER BY id LIMIT 64")).all()
    }
    return {
        "ids": list(kept),
        "addresses": list(kept.values()),
        "address": next(iter(kept.values())),
        "sizes": dict.fromkeys(kept.values(), 5),
        "days": 14.0,
        "budget_bytes": 10**6,
        "may_resend": True,
        "seconds": 60.0,
        "retry_seconds": 9.0,
    }


def claim(db: Connection, chunk_id: int) -> ClaimedChunk:
    chunk = leases.claim_chunk(db, chunk_id=chunk_id, worker="w", lease_seconds=60, pid=1)
    assert chunk is not None
    return chunk


def listed_again(db: Connection) -> Job:
    """A new job over the source of the large one."""
    return jobs.insert_job(db, name="", source=SOURCE, model="stub", model_version=VERSION, asked={}, fresh=False)


def _with_known_bytes(db: Connection, given: Given) -> Given:
    """A chunk of assets whose bytes those of the middle had."""
    chunk = given["chunk"]
    ids = range(chunk.first_asset_id, chunk.last_asset_id + 1)
    copied_outcomes.remember_bytes(db, keys=[(f"{n:032}", n) for n in given["asset_ids"]])
    read = {n: ReadBytes(keys=[f"{m:032}"]) for n, m in zip(ids, given["asset_ids"], strict=True)}
    return {"read": read}


def _in_shards(db: Connection) -> Given:
    job = listed_again(db)
    [shard] = list_shards.open_shards(db, job_id=job.id)
    return {"job": job, "shard": shard}


def chunk_of_known_keys(db: Connection, given: Given) -> ClaimedChunk:
    """A chunk of a new job, of assets that the large job labeled."""
    statement = text("SELECT key, size_bytes, etag FROM asset WHERE id = ANY(:ids)")
    assets = [NewAsset(**row) for row in db.execute(statement, {"ids": given["asset_ids"]}).mappings()]
    job = listing.add_assets(
        db, job=listed_again(db), assets=assets, cursor="z", skipped={}, complete=True, chunk_size=CHUNK
    )
    assert job is not None
    [chunk_id] = db.execute(text("SELECT id FROM chunk WHERE job_id = :id"), {"id": job.id}).scalars()
    return claim(db, chunk_id)


def _copied(db: Connection, given: Given) -> Given:
    chunk = chunk_of_known_keys(db, given)
    behind = chunk.first_asset_id - given["asset_ids"][0]
    pairs = f"""SELECT id, CAST(NULL AS text) AS etag, id - {behind} AS from_id FROM asset
                WHERE job_id = :job_id AND id BETWEEN {chunk.first_asset_id} AND {chunk.last_asset_id}"""
    return {"pairs": pairs, "values": {"job_id": chunk.job_id}, "counted": None}


def _keys(db: Connection, given: Given) -> list[str]:
    statement = text("SELECT key FROM asset WHERE id = ANY(:ids)")
    return list(db.execute(statement, {"ids": given["asset_ids"]}).scalars())


def _stored_rows(db: Connection) -> list[StoredEmbedding]:
    found = db.execute(text("SELECT id, address, stored_at FROM embedding WHERE state = 'stored' LIMIT 64")).mappings()
    return [StoredEmbedding(**row) for row in found]


# Where a parameter of the same name means something else.
OTHERS: dict[str, Callable[[Connection, Given], Given]] = {
    "annotations.remember_unjudged": lambda db, given: {"asset_uids": {1: "uid"}},
    "annotations.forget_unjudged": lambda db, given: {"task_ids": [1, 2]},
    "counters.add_masks": lambda db, given: {"numbers": {(MaskCount.LABEL, f"label {n}"): 9 for n in range(4)}},
    "embedding_sweep.drop_without_file": lambda db, given: {"rows": _stored_rows(db)},
    "embeddings.want": lambda db, given: {"addresses": {n: f"d10efaca/fp16/{n:032x}" for n in given["asset_ids"]}},
    "embeddings.reserve": lambda db, given: {"addresses": {given["asset_id"]: "d10efaca/fp16/new"}},
    "embeddings.claim": lambda db, given: {"ids": None},
    "jobs.record_list_failure": lambda db, given: {"job": listed_again(db)},
    "listing.add_assets": lambda db, given: {"job": listed_again(db)},
    "list_shards.add_shard_page": lambda db, given: _in_shards(db) | {"is_done": True},
    "list_shards.shorten_shard": lambda db, given: _in_shards(db) | {"upto": "m"},
    "list_shards.split_shard": lambda db, given: _in_shards(db) | {"at": "m"},
    "leases.answer_from_stored": lambda db, given: {"chunk": chunk_of_known_keys(db, given)},
    # As in a pass of `publish --follow`: what is before was published.
    "publishing.unpublished": lambda db, given: {"after_asset_id": given["chunk"].first_asset_id - 100 * CHUNK},
    "copied_outcomes.copy_outcomes": lambda db, given: _copied(db, given),
    "copied_outcomes.remember_bytes": lambda db, given: {"keys": [(f"{n:032}", n) for n in given["asset_ids"]]},
    "same_bytes.answer_same_bytes": lambda db, given: _with_known_bytes(db, given),
    "results.key_after": lambda db, given: {"assets": 64},
    "results.labeled_of_keys": lambda db, given: {"keys": _keys(db, given)},
    "results.bare_of_keys": lambda db, given: {"keys": _keys(db, given)},
    "results.failed_of_keys": lambda db, given: {"keys": _keys(db, given)},
    "reviewed_masks.reviewed_assets": lambda db, given: {
        "assets": results.labeled_of_keys(db, job_id=given["job_id"], keys=_keys(db, given))
    },
    "review_order.add_ranks": lambda db, given: (
        _in_order(db, given) | {"ranks": dict.fromkeys(given["asset_ids"], 0.5)}
    ),
    "review_order.finish_order": lambda db, given: _in_order(db, given, numbered=True),
    "review_order.order_by_score": lambda db, given: _in_order(db, given),
    "review_order.pairs": lambda db, given: _in_order(db, given) | {"job": jobs.get_job(db, job_id=given["job_id"])},
    "review_order.unpublished_in_order": lambda db, given: _in_order(db, given, numbered=True),
    "review_order.unpublished_without_order": lambda db, given: _in_order(db, given),
}


def _in_order(db: Connection, given: Given, *, numbered: bool = False) -> Given:
    """An order of what a pass of `publish` has before it, numbered or still empty."""
    after = given["chunk"].first_asset_id - 100 * CHUNK
    review_order.start_order(db)
    if numbered:
        review_order.order_by_score(db, job_id=given["job_id"], after_asset_id=after)
    return {"after_asset_id": after, "after_position": 0}
