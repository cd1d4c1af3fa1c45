"""Exports of a part of a job, in parts, and as Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from sqlalchemy import Connection, Engine, text

from db import jobs, results
from db.jobs import Job
from db.publishing import LsProject
from db.results import LabeledAsset
from db.settings import settings
from orchestrator.export.errors import ExportError
from orchestrator.export.formats import ExportFormat, Question, Written
from orchestrator.export.keys import Keys
from orchestrator.export.selection import Selection
from tests.integration.test_export import KEYS, finished_job
from tests.reviewed_job import LABEL, draw_scenes, plant_review
from tests.s3_server import serve_s3
from workers.storage.client import s3_client, store_of_settings
from workers.storage.objects import open_objects

pytestmark = pytest.mark.integration

Export = Callable[..., Written]


@pytest.fixture
def export(engine: Engine) -> Export:
    def write(
        job: Job,
        out: object,
        file_format: ExportFormat,
        selection: Selection,
        part_assets: int | None = None,
        processes: int = 1,
    ) -> Written:
        question = Question(file_format=file_format, part_assets=part_assets, selection=selection, processes=processes)
        with engine.connect() as db:
            return question.write(db, job, jobs.count_job(db, job_id=job.id), str(out))

    return write


def test_duckdb_reads_each_mask_of_parquet_as_it_is_stored(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, drawn = finished_job(engine, KEYS, labels=["dog", "cat", None], failed=["bad.jpg"])

    export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(), part_assets=2)

    with duckdb.connect() as db:
        masks = db.read_parquet(str(tmp_path / "out" / "masks" / "*.parquet")).order("key, n")
        rows = [dict(zip(masks.columns, row, strict=True)) for row in masks.fetchall()]
        assets = db.sql(
            f"SELECT key, mask_count, error_kind, error FROM '{tmp_path}/out/assets/*.parquet' ORDER BY key"
        ).fetchall()
    with engine.connect() as connection:
        stored = [(a, m) for a in results.labeled_assets(connection, job_id=job.id) for m in a.masks]
    assert len(stored) == len(rows) == 16
    for (asset, mask), row in zip(stored, rows, strict=True):
        assert (row["asset_id"], row["key"], row["uri"]) == (asset.asset_id, asset.key, f"{job.source}/{asset.key}")
        assert (row["counts"], row["label"], row["n"]) == (mask.counts, mask.label, mask.n)
        assert (tuple(row["box_xywh"]), row["area_px"]) == (mask.bbox_xywh, mask.area_px)
        assert (row["predicted_iou"], row["stability_score"]) == (mask.predicted_iou, mask.stability_score)
        assert (row["job_id"], row["model_version"], row["score"]) == (job.id, job.model_version, mask.predicted_iou)
        assert mask.prompt == (None if row["prompt"] is None else json.loads(row["prompt"]))
        pixels = coco_masks.decode({"size": [row["height"], row["width"]], "counts": row["counts"].encode()})
        assert np.array_equal(pixels.astype(bool), drawn[asset.key][mask.n])
    labeled = [(key, 0 if "none" in key else 4, None, None) for key in KEYS]
    assert assets == sorted([*labeled, ("bad.jpg", 0, "truncated", "bad.jpg: cut off")])


def test_an_export_of_nothing_is_parquet_that_can_be_read(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, _ = finished_job(engine, [], failed=["bad.jpg"])

    export(job, tmp_path / "out", ExportFormat.PARQUET, Selection())

    assert pq.read_table(tmp_path / "out" / "masks").num_rows == 0
    assert pq.read_table(tmp_path / "out" / "assets").column("key").to_pylist() == ["bad.jpg"]


def test_conditions_choose_masks_and_leave_every_asset(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, drawn = finished_job(engine, ["a.jpg", "none.jpg"], labels=["dog", "cat", None])
    areas = [int(pixels.sum()) for pixels in drawn["a.jpg"]]

    export(
        job, tmp_path / "dogs.json", ExportFormat.COCO, Selection(labels=frozenset(["dog"]), min_area_px=areas[0] + 1)
    )
    export(job, tmp_path / "bare.json", ExportFormat.COCO, Selection(labels=frozenset(["object"])))
    export(job, tmp_path / "best.json", ExportFormat.COCO, Selection(min_score=0.95))

    read = {path.stem: COCO(str(path)) for path in tmp_path.glob("*.json")}
    assert [a["area"] for a in read["dogs"].anns.values()] == [areas[3]]
    assert [a["area"] for a in read["bare"].anns.values()] == [areas[2]]
    assert not read["best"].anns
    assert {len(coco.imgs) for coco in read.values()} == {2}
    with pytest.raises(ExportError, match=r"--label dgo \(did you mean dog\?\): job \d+ has cat, dog, object"):
        export(job, tmp_path / "typo.json", ExportFormat.COCO, Selection(labels=frozenset(["dgo"])))


def test_what_people_left_is_chosen_by_their_labels(engine: Engine, export: Export, tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 2)
    job = plant_review(
        engine,
        tmp_path / "scenes",
        scenes,
        model="stub",
        model_version="stub@1",
        ls_project=LsProject("http://ls.example", 7),
    )

    export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(reviewed=True, labels=frozenset([LABEL])))
    export(job, tmp_path / "other", ExportFormat.PARQUET, Selection(reviewed=True, labels=frozenset(["object"])))

    masks = pq.read_table(tmp_path / "out" / "masks").to_pylist()
    assert {mask["verdict"] for mask in masks} == {"kept", "edited", "added"}
    assert {(mask["label"], mask["score"]) for mask in masks} == {(LABEL, 1.0)}
    assert all(mask["predicted_iou"] is None for mask in masks if mask["verdict"] == "added")
    others = pq.read_table(tmp_path / "other" / "assets").to_pylist()
    assert [(asset["mask_count"], asset["reviewed"]) for asset in others] == [(0, True), (0, True)]
    with pytest.raises(ExportError, match="--reviewed with --shard-assets"):
        export(job, tmp_path / "coco", ExportFormat.COCO, Selection(reviewed=True), part_assets=1)


def test_keys_choose_assets_and_the_rest_of_the_file_is_told(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a.jpg", "b.jpg", "ü.jpg"], failed=["bad.jpg", "other.jpg"])
    lines = ["ü.jpg\r".encode(), b"bad.jpg", b"", b"a.jpg", b"gone.jpg", b"a.jpg", b"\xff", b"x" * 20_000, b"n\0"]

    (tmp_path / "keys").write_bytes(b"\n".join(lines))

    with closing(Keys(tmp_path / "keys")) as keys:
        notes = export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(keys=keys, page=2)).notes

    masks = pq.read_table(tmp_path / "out" / "masks")
    assert sorted(set(masks.column("key").to_pylist())) == ["a.jpg", "ü.jpg"]
    assert masks.num_rows == 8
    assets = pq.read_table(tmp_path / "out" / "assets").select(["key", "error_kind"]).to_pylist()
    assert {a["key"]: a["error_kind"] for a in assets} == {"a.jpg": None, "ü.jpg": None, "bad.jpg": "truncated"}
    assert "2 keys are no labeled asset" in notes[-2]
    assert "'bad.jpg'" in notes[-2]
    assert "3 lines are no key" in notes[-1]
    assert "line 7" in notes[-1]


def test_keys_with_tabs_are_read_in_the_order_of_whole_keys_and_none_comes_twice(
    engine: Engine, export: Export, tmp_path: Path
) -> None:
    names = ["a", "a\t2", "a\x01", "b"]
    job, _ = finished_job(engine, names)
    (tmp_path / "keys").write_text("\n".join(reversed(names)))
    out, request = tmp_path / "out", {"part_assets": 1}

    with closing(Keys(tmp_path / "keys")) as keys:
        assert list(keys) == sorted(names)
        with pytest.raises(Stopped):
            export(job, out, ExportFormat.PARQUET, StopsAfterThree(keys=keys), **request)
        export(job, out, ExportFormat.PARQUET, Selection(keys=keys), **request)

    assert pq.read_table(out / "assets").column("key").to_pylist() == sorted(names)


class Stopped(Exception):
    pass


class StopsAfterThree(Selection):
    """The stream of a database that goes away in the middle of the second part."""

    def assets(self, db: Connection, job: Job, after: str = "") -> Iterator[LabeledAsset]:
        yield from islice(super().assets(db, job, after), 3)
        raise Stopped


@pytest.mark.parametrize("file_format", ExportFormat)
def test_a_stopped_export_goes_on_after_its_last_part(
    engine: Engine, export: Export, tmp_path: Path, file_format: ExportFormat
) -> None:
    job, _ = finished_job(engine, [f"{n}.jpg" for n in range(5)])
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(job, whole, file_format, Selection(), part_assets=2)
    with pytest.raises(Stopped):
        export(job, out, file_format, StopsAfterThree(), part_assets=2)
    first = min(out.rglob("part-00000*"))
    written_at = first.stat().st_mtime_ns
    (out / ".1.part-00001.partial").mkdir()  # what a killed writer leaves, and a part that it did not name
    if not file_format.suffix:
        (out / "part-00001").mkdir()
        (out / "part-00001" / "index.json").touch()

    with pytest.raises(ExportError, match="shard_assets was 2, is 3"):
        export(job, out, file_format, Selection(), part_assets=3)
    assert not export(job, out, file_format, Selection(), part_assets=2).was_there
    assert export(job, out, file_format, Selection(), part_assets=2).was_there

    assert first.stat().st_mtime_ns == written_at
    assert {p.relative_to(out) for p in out.rglob("*")} == {p.relative_to(whole) for p in whole.rglob("*")}
    document = json.loads((out / "export.json").read_text())
    assert [part["assets"] for part in document["parts"]] == [2, 2, 1]
    assert [part["notes"] for part in document["parts"]] == [[], [], []] or file_format is ExportFormat.YOLO


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_s3() as address:
        monkeypatch.setenv("MASKFLEET_S3_ENDPOINT", address)
        settings.cache_clear()
        s3_client(store_of_settings(settings().s3_endpoint), 3).create_bucket(Bucket="exports")
        yield "s3://exports/job"
    settings.cache_clear()


@pytest.mark.parametrize("file_format", [ExportFormat.PARQUET, ExportFormat.PNG])
def test_parts_go_to_a_bucket_and_go_on_there(
    engine: Engine, export: Export, tmp_path: Path, bucket: str, file_format: ExportFormat
) -> None:
    job, _ = finished_job(engine, [f"{n}.jpg" for n in range(3)], failed=["bad.jpg"], source="/photos")
    export(job, tmp_path / "here", file_format, Selection(), part_assets=2)
    with pytest.raises(Stopped):
        export(job, bucket, file_format, StopsAfterThree(), part_assets=2)

    export(job, bucket, file_format, Selection(), part_assets=2)

    place = open_objects(bucket)
    here = {p.relative_to(tmp_path / "here").as_posix(): p for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert {stored.name: place.read(stored.name, 10**6) for stored in place.stored()} == {
        name: path.read_bytes() for name, path in here.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("file_format", [ExportFormat.COCO, ExportFormat.PARQUET])
def test_parts_that_are_written_at_once_are_those_of_one_process_and_go_on_alike(
    engine: Engine, export: Export, tmp_path: Path, bucket: str, file_format: ExportFormat
) -> None:
    job, _ = finished_job(engine, [f"{n}.jpg" for n in range(5)], failed=["2b.jpg", "bad.jpg"], source="/photos")
    bucket, at_once = f"{bucket}/at once/{file_format}", {"part_assets": 2, "processes": 2}
    export(job, tmp_path / "one", file_format, Selection(), part_assets=2)

    export(job, tmp_path / "two", file_format, Selection(), **at_once)
    export(job, bucket, file_format, Selection(), **at_once)

    assert rows_of(tmp_path / "one", file_format) == rows_of(tmp_path / "two", file_format)
    document = json.loads((tmp_path / "two" / "export.json").read_text())
    assert [(part["assets"], part["last_key"]) for part in document["parts"]] == [
        (2, "1.jpg"),
        (1, "2b.jpg"),
        (2, "4.jpg"),
        (0, "4.jpg"),
    ]
    there = {stored.name: open_objects(bucket).read(stored.name, 10**6) for stored in open_objects(bucket).stored()}
    assert there.keys() == {
        path.relative_to(tmp_path / "two").as_posix() for path in (tmp_path / "two").rglob("*") if path.is_file()
    }
    # As after a kill: one part is named, another is written and not named.
    first = next(path for path in (tmp_path / "two").rglob("part-00000*"))
    written_at = first.stat().st_mtime_ns
    del document["parts"][1:]
    (tmp_path / "two" / "export.json").write_text(json.dumps(document | {"complete": False}))
    export(job, tmp_path / "two", file_format, Selection(), **at_once)
    assert rows_of(tmp_path / "one", file_format) == rows_of(tmp_path / "two", file_format)
    assert first.stat().st_mtime_ns == written_at
    with pytest.raises(ExportError, match="has parts"):
        export(job, tmp_path / "x.json", ExportFormat.COCO, Selection(), processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a folder", "a bucket"])
def test_an_export_that_goes_on_with_one_process_leaves_no_part_of_the_others(
    engine: Engine, export: Export, tmp_path: Path, bucket: str, place: str
) -> None:
    failed = [f"{n}b.jpg" for n in range(4)]
    job, _ = finished_job(engine, [f"{n}.jpg" for n in range(4)], failed=failed, source="/photos")
    out = str(tmp_path / "out") if place == "a folder" else f"{bucket}/goes on"
    export(job, out, ExportFormat.PARQUET, Selection(), part_assets=2, processes=2)
    # As after a kill: one part is named, the others are written and not named.
    document = json.loads(open_objects(out).read("export.json", 10**6))
    del document["parts"][1:]
    open_objects(out).write("export.json", json.dumps(document | {"complete": False}).encode())
    open_objects(out).write("masks/part of a talk.txt", b"a person's own")

    export(job, out, ExportFormat.PARQUET, Selection(), part_assets=2)

    names = sorted(stored.name for stored in open_objects(out).stored())
    assert names == [
        "assets/failed.parquet", *(f"assets/part-0000{n}.parquet" for n in range(3)), "export.json",
        "masks/part of a talk.txt", *(f"masks/part-0000{n}.parquet" for n in range(3)),
    ]  # fmt: skip


def rows_of(out: Path, file_format: ExportFormat) -> list[object]:
    """The images and masks of all parts, in order."""
    if file_format is ExportFormat.PARQUET:
        return [row for kind in ("masks", "assets") for row in pq.read_table(out / kind).sort_by("key").to_pylist()]
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("part-*"))]
    masks = [mask for part in parts for mask in part["annotations"]]
    return [[image for part in parts for image in part["images"]], [{**mask, "id": 0} for mask in masks]]


@pytest.mark.slow
def test_a_part_in_a_bucket_has_no_file_of_a_part_of_this_name_that_was_not_named(
    engine: Engine, export: Export, tmp_path: Path, bucket: str
) -> None:
    failed = [f"{n}b.jpg" for n in range(4)]
    job, _ = finished_job(engine, [f"{n}.jpg" for n in range(4)], failed=failed, source="/photos")
    export(job, tmp_path / "one", ExportFormat.PNG, Selection(), part_assets=2)
    whole = sorted(p.relative_to(tmp_path / "one").as_posix() for p in (tmp_path / "one").rglob("*") if p.is_file())
    for others in (2, 1):
        out = f"{bucket}/{others}"
        export(job, out, ExportFormat.PNG, Selection(), part_assets=2, processes=others)
        # As after a kill: parts are written, and none is named. The same command goes on in another way.
        document = json.loads(open_objects(out).read("export.json", 10**6))
        open_objects(out).write("export.json", json.dumps(document | {"parts": [], "complete": False}).encode())

        export(job, out, ExportFormat.PNG, Selection(), part_assets=2, processes=3 - others)

        names = sorted(stored.name for stored in open_objects(out).stored())
        assert len(names) == len(set(names))
        of_assets = [name.partition("/")[2] for name in names if not name.endswith("json")]
        assert sorted(of_assets) == sorted(name.partition("/")[2] for name in whole if not name.endswith("json"))


def test_parts_do_not_go_into_a_place_of_other_files(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a.jpg"])
    (tmp_path / "photo.jpg").touch()

    with pytest.raises(ExportError, match="expected a new or empty place"):
        export(job, tmp_path, ExportFormat.PARQUET, Selection())
    (tmp_path / "export.json").write_text('{"parts": [{}]}')
    with pytest.raises(ExportError, match="is not of an export"):
        export(job, tmp_path, ExportFormat.PARQUET, Selection())
    with pytest.raises(ExportError, match="only --format parquet"):
        export(job, "s3://bucket/x", ExportFormat.COCO, Selection())

    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "photo.jpg"]


def test_annotations_that_were_read_later_are_another_export(engine: Engine, export: Export, tmp_path: Path) -> None:
    job = reviewed_scenes(engine, tmp_path / "scenes")
    export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(reviewed=True))
    assert export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(reviewed=True)).was_there

    with engine.begin() as db:
        db.execute(text("UPDATE ls_annotation SET updated_at = updated_at + interval '1 s' WHERE annotation_id = 1"))

    with pytest.raises(ExportError, match="annotations was"):
        export(job, tmp_path / "out", ExportFormat.PARQUET, Selection(reviewed=True))


def test_a_place_that_is_taken_and_an_image_that_is_gone_are_said_in_a_line(
    engine: Engine, export: Export, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    job, _ = finished_job(engine, ["a.jpg"], source=str(tmp_path / "photos"))

    with pytest.raises(ExportError, match="new or empty folder"):
        export(job, tmp_path / "taken", ExportFormat.PNG, Selection())
    with pytest.raises(ExportError, match="name of a file"):
        export(job, tmp_path / "taken", ExportFormat.COCO, Selection())
    question = Question(file_format=ExportFormat.YOLO, selection=Selection(), images=True)
    with engine.connect() as db, pytest.raises(ExportError, match=r"a\.jpg"):
        question.write(db, job, jobs.count_job(db, job_id=job.id), str(tmp_path / "yolo"))


def test_numbers_of_peoples_labels_do_not_depend_on_the_conditions(
    engine: Engine, export: Export, tmp_path: Path
) -> None:
    job = reviewed_scenes(engine, tmp_path / "scenes")
    with engine.begin() as db:
        db.execute(text("UPDATE ls_region SET label = 'van' WHERE verdict = 'kept'"))
        db.execute(text("UPDATE ls_region SET label = 'bus' WHERE verdict = 'edited'"))

    export(job, tmp_path / "all.json", ExportFormat.COCO, Selection(reviewed=True))
    export(job, tmp_path / "van.json", ExportFormat.COCO, Selection(reviewed=True, labels=frozenset(["van"])))

    categories = [json.loads((tmp_path / f"{name}.json").read_text())["categories"] for name in ("all", "van")]
    assert categories[0] == categories[1]
    assert [category["name"] for category in categories[0]] == [LABEL, "bus", "van"]


def test_parts_with_notes_are_all_said(engine: Engine, export: Export, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a.jpg", "b?.jpg", "c?.jpg"])

    notes = export(job, tmp_path / "out", ExportFormat.LABEL_STUDIO, Selection(), part_assets=1).notes

    assert notes[1].startswith("part-00001.json: Label Studio cannot show 1 images")
    assert notes[2:] == ["1 more parts have notes: export.json has them"]


def reviewed_scenes(engine: Engine, folder: Path) -> Job:
    project = LsProject("http://ls.example", 7)
    return plant_review(
        engine, folder, draw_scenes(folder, 2), model="stub", model_version="stub@1", ls_project=project
    )
