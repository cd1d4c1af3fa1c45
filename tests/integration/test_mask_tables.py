"""Masks that go from Postgres to columns: the same values as the rows have, whatever is in them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sqlalchemy import Engine, text

from db import jobs, results
from db.jobs import Job
from orchestrator.export.coco import export_coco
from orchestrator.export.formats import ExportFormat, Question
from orchestrator.export.mask_tables import mask_tables
from orchestrator.export.selection import Selection
from tests.factories import chunk_ids, claim, delete, labeled, make_job, record

pytestmark = pytest.mark.integration

LABELS = ('a,"b"', "two\nlines\r\n", "", "NULL", "\\N", "ü 猫", " spaces ", None)
SCORES = (0.9, 1.0, 1.03, 0.0, -0.01, 1e-5, math.nan, math.inf, -math.inf)


def job_with(engine: Engine, *, keys: list[str]) -> Job:
    """Each asset has all labels and all scores among its masks."""
    job = make_job(engine, keys=keys)
    for chunk_id in chunk_ids(engine, job):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        outcomes = []
        for asset_id in range(chunk.first_asset_id, chunk.last_asset_id + 1):
            outcome = labeled(asset_id, masks=len(LABELS) * len(SCORES))
            masks = [
                replace(mask, area_px=mask.n, label=LABELS[mask.n % len(LABELS)], predicted_iou=SCORES[mask.n // 8])
                for mask in outcome.masks
            ]
            outcomes.append(replace(outcome, masks=masks))
        record(engine, chunk, outcomes)
    return job


def test_columns_hold_what_the_rows_hold(engine: Engine) -> None:
    job = job_with(engine, keys=["a.jpg", "b.jpg"])
    with engine.connect() as db:
        stored = list(results.labeled_assets(db, job_id=job.id))
        [table] = mask_tables(db, job, results.bare_assets(db, job_id=job.id), Selection())

    rows = table.masks.to_pylist()
    masks = [(asset, mask) for asset in stored for mask in asset.masks]
    assert len(rows) == len(masks) == 144
    assert table.mask_counts == [72, 72]
    for row, (asset, mask) in zip(rows, masks, strict=True):
        assert (row["asset_id"], row["key"], row["n"]) == (asset.asset_id, asset.key, mask.n)
        assert (row["height"], row["width"]) == asset.size_hw
        assert (row["counts"], row["label"], tuple(row["box_xywh"])) == (mask.counts, mask.label, mask.bbox_xywh)
        assert json.loads(row["prompt"]) == mask.prompt
        finite = math.isfinite(mask.predicted_iou)
        assert row["predicted_iou"] == (mask.predicted_iou if finite else None)
        assert row["stability_score"] == mask.stability_score
        assert row["score"] == (min(max(mask.predicted_iou, 0.0), 1.0) if finite else 0.0)


def test_coco_is_json_whatever_labels_and_scores_there_are(engine: Engine, tmp_path: Path) -> None:
    job = job_with(engine, keys=["a.jpg"])
    with engine.connect() as db:
        [asset] = results.labeled_assets(db, job_id=job.id)
        export_coco(db, job, tmp_path / "coco.json")

    found = json.loads((tmp_path / "coco.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    names = {category["id"]: category["name"] for category in found["categories"]}
    assert [a["id"] for a in found["annotations"]] == list(range(1, 73))
    for annotation, mask in zip(found["annotations"], asset.masks, strict=True):
        assert names[annotation["category_id"]] == ("object" if mask.label is None else mask.label)
        assert annotation["segmentation"] == {"size": [3, 4], "counts": mask.counts}
        assert (annotation["bbox"], annotation["area"]) == ([*mask.bbox_xywh], mask.area_px)
        assert annotation["predicted_iou"] == (mask.predicted_iou if math.isfinite(mask.predicted_iou) else None)
        assert (annotation["stability_score"], annotation["prompt"]) == (mask.stability_score, mask.prompt)
        assert isinstance(annotation["score"], float)


def test_masks_are_in_the_order_of_keys_though_ids_are_not(engine: Engine) -> None:
    job = job_with(engine, keys=["a.jpg", "b.jpg", "c.jpg"])
    with engine.begin() as db:  # as parts of a source that were listed side by side
        db.execute(text("UPDATE asset SET key = 'd.jpg' WHERE key = 'a.jpg'"))

    with engine.connect() as db:
        [table] = mask_tables(db, job, results.bare_assets(db, job_id=job.id), Selection())

    rows = table.masks.select(["key", "n"]).to_pylist()
    assert [row["key"] for row in rows] == ["b.jpg"] * 72 + ["c.jpg"] * 72 + ["d.jpg"] * 72
    assert [row["n"] for row in rows] == [*range(72)] * 3


@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_a_table_ends_with_the_asset_that_fills_it(engine: Engine, rows: int) -> None:
    job = job_with(engine, keys=["a.jpg", "b.jpg", "c.jpg"])
    with engine.connect() as db:
        tables = list(mask_tables(db, job, results.bare_assets(db, job_id=job.id), Selection(), rows=rows))

    assert [len(table.assets) for table in tables] == {1: [1, 1, 1], 100: [2, 1], 10_000: [3]}[rows]
    assert sum(table.masks.num_rows for table in tables) == 3 * 72


@pytest.mark.parametrize(
    "selection",
    [
        Selection(labels=frozenset(["object", 'a,"b"'])),
        Selection(labels=frozenset([""])),
        Selection(min_area_px=30),
        Selection(min_score=0.9),
        Selection(min_score=-1.0, labels=frozenset(["NULL"]), min_area_px=4),
    ],
)
def test_conditions_choose_of_columns_what_they_choose_of_rows(
    engine: Engine, tmp_path: Path, selection: Selection
) -> None:
    job = job_with(engine, keys=["a.jpg", "b.jpg"])
    with engine.connect() as db:
        rows = [(asset.key, mask.n) for asset in selection.assets(db, job) for mask in asset.masks]
        question = Question(file_format=ExportFormat.PARQUET, selection=selection)
        question.write(db, job, jobs.count_job(db, job_id=job.id), str(tmp_path / "out"))

    found = pq.read_table(tmp_path / "out" / "masks")
    assert list(zip(found["key"].to_pylist(), found["n"].to_pylist(), strict=True)) == rows
    assert 0 < len(rows) < 144
    [part] = json.loads((tmp_path / "out" / "export.json").read_text())["parts"]
    assert (part["assets"], part["masks"]) == (2, len(rows))
    counts = pq.read_table(tmp_path / "out" / "assets").column("mask_count").to_pylist()
    assert counts == [len(rows) // 2] * 2


def test_masks_of_a_job_that_was_deleted_meanwhile_are_an_error(engine: Engine) -> None:
    job = job_with(engine, keys=["a.jpg"])
    with engine.connect() as db:
        assets = list(results.bare_assets(db, job_id=job.id))
        db.rollback()
        delete(engine, job)

        with pytest.raises(LookupError, match=f"job {job.id} was deleted while its masks were read"):
            list(mask_tables(db, job, assets, Selection()))


def test_a_job_that_is_deleted_between_two_pages_is_an_error_and_no_short_export(engine: Engine) -> None:
    job = job_with(engine, keys=["a.jpg", "b.jpg", "c.jpg"])
    with engine.connect() as db:
        assets = results.bare_assets(db, job_id=job.id, page=1)
        assert next(assets).key == "a.jpg"
        db.rollback()
        delete(engine, job)

        with pytest.raises(LookupError, match=f"job {job.id} was deleted"):
            list(assets)
        with pytest.raises(LookupError, match=f"job {job.id} was deleted"):
            results.bare_of_keys(db, job_id=job.id, keys=["b.jpg"])


def test_a_mask_of_more_bytes_than_a_table_usually_has_is_read(engine: Engine) -> None:
    job = make_job(engine, keys=["a.jpg"])
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    outcome = labeled(chunk.first_asset_id, masks=2)
    counts = "0" * (40 << 20)
    record(engine, chunk, [replace(outcome, masks=[replace(outcome.masks[0], counts=counts), outcome.masks[1]])])

    with engine.connect() as db:
        [table] = mask_tables(db, job, results.bare_assets(db, job_id=job.id), Selection())

    assert table.masks["counts"].to_pylist() == [counts, outcome.masks[1].counts]
