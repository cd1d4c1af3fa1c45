from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from sqlalchemy import Connection, Engine, text

from db import jobs, samples
from db.jobs import Job
from db.leases import NewOutcome
from db.results import LabeledAsset, StoredMask
from orchestrator.export.coco import export_coco
from orchestrator.export.label_studio import export_label_studio
from orchestrator.export.png import export_png
from orchestrator.export.selection import Selection
from orchestrator.export.summary import write_summary
from orchestrator.label_studio.addresses import PublishError
from orchestrator.label_studio.regions import mask_ordinal
from orchestrator.pages.choice import MAX_CARDS, Choice, ChoiceError, Order
from orchestrator.pages.gallery import write_gallery
from tests.factories import chunk_ids, claim, finish, make_job, pending, record
from workers.masks import BoolMask, mask_from_pixels

pytestmark = pytest.mark.integration

KEYS = ['a "quoted".jpg', "emoji 🦊.jpg", "line\nbreak.jpg", "plain/none.jpg", "z <script>alert(1)</script>.jpg"]


def blobs(seed: int, count: int, size_hw: tuple[int, int]) -> list[BoolMask]:
    """Rectangles with holes that overlap, touch every border, and differ in area."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    masks = []
    for n in range(count):
        pixels = np.zeros(size_hw, np.bool_)
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        pixels[top : top + 6 + 2 * n, left : left + 7 + 3 * n] = True
        pixels[top + 2 : top + 4, left + 2 : left + 4] = False
        masks.append(pixels)
    return masks


def stored(
    asset_id: int, n: int, pixels: BoolMask, *, label: str | None = None, predicted_iou: float = 0.9
) -> StoredMask:
    mask = mask_from_pixels(pixels, predicted_iou=predicted_iou, stability_score=0.97)
    x, y, w, h = map(int, mask.bbox_xywh)
    return StoredMask(
        asset_id=asset_id,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
        predicted_iou=predicted_iou,
        stability_score=mask.stability_score,
        label=label,
        prompt={"points": [[1, 2, 1]]} if n == 1 else None,
    )


def finished_job(
    engine: Engine,
    keys: Sequence[str],
    *,
    size_hw: tuple[int, int] = (40, 60),
    masks: int = 4,
    labels: Sequence[str | None] = (None,),
    failed: Sequence[str] = (),
    source: str = "s3://bucket/photos",
) -> tuple[Job, dict[str, list[BoolMask]]]:
    """A job with assets that are labeled with blobs or failed, and its masks by key. A key with "none" has no masks."""
    job = make_job(engine, keys=sorted([*keys, *failed], key=str.encode), source=source)
    drawn: dict[str, list[BoolMask]] = {}
    for chunk_id in chunk_ids(engine, job):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        outcomes = []
        for asset in pending(engine, chunk):
            if asset.key in failed:
                outcomes.append(NewOutcome(asset_id=asset.id, error_kind="truncated", error=f"{asset.key}: cut off"))
                continue
            drawn[asset.key] = blobs(asset.id, 0 if "none" in asset.key else masks, size_hw)
            found = [stored(asset.id, n, m, label=labels[n % len(labels)]) for n, m in enumerate(drawn[asset.key])]
            height, width = size_hw
            outcomes.append(NewOutcome(asset_id=asset.id, width=width, height=height, segment_ms=12, masks=found))
        record(engine, chunk, outcomes)
        finish(engine, chunk)
    with engine.begin() as db:
        done = jobs.get_job(db, job_id=job.id)
    assert done is not None
    return done, drawn


def test_coco_loads_in_pycocotools_and_every_mask_comes_back_bit_by_bit(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, drawn = finished_job(engine, KEYS, labels=["dog", "cat", None], failed=["bad.jpg"])

    with engine.connect() as db:
        export_coco(db, job, tmp_path / "coco.json")

    coco = COCO(str(tmp_path / "coco.json"))
    assert {image["file_name"] for image in coco.imgs.values()} == set(KEYS)
    assert [category["name"] for category in coco.loadCats([1, 2, 3])] == ["cat", "dog", "object"]
    for image in coco.imgs.values():
        assert (image["height"], image["width"]) == (40, 60)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]], iscrowd=0))
        assert len(annotations) == len(drawn[image["file_name"]])
        for annotation, pixels in zip(annotations, drawn[image["file_name"]], strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), pixels)
            rows, columns = np.nonzero(pixels)
            assert annotation["area"] == pixels.sum()
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert annotation["score"] == annotation["predicted_iou"] == pytest.approx(0.9)
    assert capsys.readouterr()


def test_coco_says_where_its_masks_come_from(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["street/a b.jpg"], masks=2)

    with engine.connect() as db:
        export_coco(db, job, tmp_path / "coco.json")

    coco = json.loads((tmp_path / "coco.json").read_text(encoding="utf-8"))
    assert coco["info"]["model_version"] == job.model_version
    assert coco["info"]["job"] == job.id
    assert coco["images"][0]["file_name"] == "street/a b.jpg"
    assert coco["images"][0]["coco_url"] == "s3://bucket/photos/street/a b.jpg"
    assert [a.get("prompt") for a in coco["annotations"]] == [None, {"points": [[1, 2, 1]]}]
    assert coco["categories"] == [{"id": 1, "name": "object", "supercategory": ""}]


@pytest.mark.parametrize(("predicted_iou", "score"), [(1.03, 1.0), (-0.01, 0.0), (float("nan"), 0.0)])
def test_coco_scores_are_kept_between_0_and_1(
    engine: Engine, tmp_path: Path, predicted_iou: float, score: float
) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    mask = stored(asset.id, 0, blobs(1, 1, (40, 60))[0], predicted_iou=predicted_iou)
    record(engine, chunk, [NewOutcome(asset_id=asset.id, width=60, height=40, masks=[mask])])

    with engine.connect() as db:
        export_coco(db, job, tmp_path / "coco.json")

    text = (tmp_path / "coco.json").read_text(encoding="utf-8")
    assert json.loads(text)["annotations"][0]["score"] == score
    assert "NaN" not in text


def test_a_job_without_a_labeled_asset_gives_files_that_load(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, [], failed=["a.jpg"])

    with engine.connect() as db:
        export_coco(db, job, tmp_path / "coco.json")
        export_label_studio(db, job, tmp_path / "tasks.json")
        export_png(db, job, tmp_path / "png")
        write_gallery(db, job, tmp_path / "index.html", seconds=1)

    coco = json.loads((tmp_path / "coco.json").read_text())
    assert (coco["images"], coco["annotations"]) == ([], [])
    assert json.loads((tmp_path / "tasks.json").read_text()) == []
    assert json.loads((tmp_path / "png" / "index.json").read_text()) == []
    assert "<td>cut off</td>" in (tmp_path / "index.html").read_text()


def test_the_summary_counts_every_asset_and_names_the_failed_ones(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, KEYS, failed=['bad "one"\n.jpg'])

    with engine.connect() as db:
        summary = write_summary(db, job, tmp_path / "summary.json", seconds=12.34567)

    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["assets"] == {"listed": 6, "labeled": 5, "failed": 1}
    assert summary["masks"] == 16
    assert summary["seconds"] == 12.346
    assert summary["model_version"] == job.model_version
    assert summary["failed"] == [
        {"key": 'bad "one"\n.jpg', "error_kind": "truncated", "error": 'bad "one"\n.jpg: cut off'}
    ]


def test_png_label_maps_show_the_smaller_of_overlapping_masks_and_each_mask_is_whole(
    engine: Engine, tmp_path: Path
) -> None:
    job, drawn = finished_job(engine, KEYS, masks=9)

    with engine.connect() as db:
        export_png(db, job, tmp_path / "png")

    index = json.loads((tmp_path / "png" / "index.json").read_text(encoding="utf-8"))
    assert {entry["key"] for entry in index} == set(KEYS)
    for entry in index:
        masks = drawn[entry["key"]]
        expected = np.zeros((40, 60), int)
        for n in sorted(range(len(masks)), key=lambda n: (-masks[n].sum(), -n)):
            expected[masks[n]] = n + 1
        label_map = Image.open(tmp_path / "png" / f"{entry['asset_id']}.png")
        assert label_map.mode == "P"
        assert np.array_equal(np.asarray(label_map), expected)
        assert [mask["value"] for mask in entry["masks"]] == [n + 1 for n in range(len(masks))]
        for n, pixels in enumerate(masks):
            alone = Image.open(tmp_path / "png" / str(entry["asset_id"]) / f"{n}.png")
            assert alone.mode == "1"
            assert np.array_equal(np.asarray(alone), pixels)


def test_png_file_names_are_ids_whatever_the_keys_are(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["../../escape.jpg", "/etc/passwd", "nul", "x" * 900], masks=1)

    with engine.connect() as db:
        export_png(db, job, tmp_path / "out" / "png")

    names = {
        path.relative_to(tmp_path / "out" / "png").as_posix() for path in tmp_path.rglob("*.png") if path.is_file()
    }
    assert len(names) == 8
    assert all(name.replace("/", "").removesuffix(".png").isdigit() for name in names)


def test_more_masks_than_a_palette_has_colours_take_16_bits(engine: Engine, tmp_path: Path) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    pixels = np.arange(300).reshape(1, 300) == np.arange(300)[:, None, None]
    masks = [stored(asset.id, n, one) for n, one in enumerate(pixels)]
    record(engine, chunk, [NewOutcome(asset_id=asset.id, width=300, height=1, masks=masks)])

    with engine.connect() as db:
        export_png(db, job, tmp_path / "png")

    label_map = np.asarray(Image.open(tmp_path / "png" / f"{asset.id}.png"))
    assert label_map.tolist() == [list(range(1, 301))]


def test_png_never_mixes_with_what_is_in_a_folder(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a.jpg"])
    (tmp_path / "mine.txt").touch()

    with engine.connect() as db, pytest.raises(FileExistsError, match="new or empty folder"):
        export_png(db, job, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_label_studio_tasks_carry_their_masks_and_the_model_version(engine: Engine, tmp_path: Path) -> None:
    job, drawn = finished_job(engine, KEYS, labels=["cat"], failed=["bad.jpg"])

    with engine.connect() as db:
        export_label_studio(db, job, tmp_path / "tasks.json")

    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert {task["data"]["image"] for task in tasks} == {f"s3://bucket/photos/{key}" for key in KEYS}
    for task in tasks:
        [prediction] = task["predictions"]
        assert prediction["model_version"] == job.model_version
        key = task["data"]["image"].removeprefix("s3://bucket/photos/")
        assert bool(prediction["result"]) == bool(drawn[key])


def many_parts(count: int) -> BoolMask:
    pixels = np.zeros((40, 60), np.bool_)
    for n in range(count):
        pixels[4 * (n // 14) : 4 * (n // 14) + 2, 4 * (n % 14) : 4 * (n % 14) + 2] = True
    return pixels


def test_every_mask_is_in_label_studios_file_however_many_parts_it_has(engine: Engine, tmp_path: Path) -> None:
    """Parts were counted as masks, up to 150, and what was beyond was gone without a word."""
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    lace = np.random.default_rng(0).random((40, 60)) < 0.6
    shapes = [*(many_parts(10) for _ in range(40)), *(many_parts(130) for _ in range(10)), *[lace] * 30]
    shapes += [*blobs(3, 170, (40, 60)), np.zeros((40, 60), np.bool_)]
    masks = [stored(asset.id, n, pixels) for n, pixels in enumerate(shapes)]
    record(engine, chunk, [NewOutcome(asset_id=asset.id, width=60, height=40, masks=masks)])

    with engine.connect() as db:
        notes = export_label_studio(db, job, tmp_path / "tasks.json")

    [task] = json.loads((tmp_path / "tasks.json").read_text())
    found = {mask_ordinal(region["id"], asset.id) for region in task["predictions"][0]["result"]}
    assert found == set(range(len(shapes) - 1))
    assert notes == ["tasks.json: 1 masks without a single pixel are not in it"]


def test_a_folders_tasks_have_addresses_that_label_studio_shows_or_it_is_said(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a b?.jpg"], source=str(tmp_path / "photos 50%"))

    with engine.connect() as db:
        plain = export_label_studio(db, job, tmp_path / "plain.json")
        shown = export_label_studio(db, job, tmp_path / "shown.json", local_files=f"{tmp_path}/x/..")
        with pytest.raises(PublishError, match="is not below"):
            export_label_studio(db, job, tmp_path / "no.json", local_files=str(tmp_path / "other"))

    one, other = (json.loads((tmp_path / f"{name}.json").read_text())[0]["data"] for name in ("plain", "shown"))
    assert other["image"] == "/data/local-files/?d=photos%2050%25/a%20b%3F.jpg"
    assert one["image"].startswith("file://")
    assert one["asset_id"] == other["asset_id"]
    assert [note for note in plain if "--local-files" in note]
    assert [note for note in shown if f"Absolute local path {tmp_path}/photos 50%" in note]


def test_keys_that_label_studio_would_cut_are_said(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a?b.jpg", "line\nbreak.jpg", "plain.jpg"])

    with engine.connect() as db:
        [note] = export_label_studio(db, job, tmp_path / "tasks.json")

    assert "cannot show 2 images" in note
    assert "'a?b.jpg'" in note


@pytest.mark.parametrize("write", [export_coco, export_label_studio])
def test_a_failed_export_leaves_the_old_file_and_nothing_else(engine: Engine, tmp_path: Path, write: Any) -> None:
    job, _ = finished_job(engine, ["a.jpg"])
    out = tmp_path / "out.json"
    out.write_text("the old one")
    db = engine.connect()
    db.close()

    with pytest.raises(Exception, match="closed"):
        write(db, job, out)

    assert out.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_an_export_does_not_replace_a_device(engine: Engine) -> None:
    job, _ = finished_job(engine, ["a.jpg"])

    with engine.connect() as db, pytest.raises(FileExistsError, match="name of a file"):
        export_coco(db, job, Path("/dev/null"))


def test_exporting_twice_gives_the_same_ids(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, KEYS, labels=["b", "a"])

    with engine.connect() as db:
        for name in ("one", "two"):
            export_coco(db, job, tmp_path / name)

    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert all(one[part] == two[part] for part in ("images", "annotations", "categories"))


def test_the_gallery_of_a_folder_holds_its_photos(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "photos" / "a.jpg")
    job, _ = finished_job(engine, ["a.jpg", "deleted.jpg"], source=str(tmp_path / "photos"))

    with engine.connect() as db:
        write_gallery(db, job, tmp_path / "index.html", seconds=3, notice="only a demonstration")

    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count('class="card"') == 2
    assert "not_found" in page
    assert "only a demonstration" in page


def test_the_gallery_of_a_large_job_shows_assets_from_all_over_it(engine: Engine, tmp_path: Path) -> None:
    keys = [f"{n:04}.jpg" for n in range(2 * MAX_CARDS + 37)]
    job, _ = finished_job(engine, keys, masks=1, source=str(tmp_path))

    with engine.connect() as db:
        ids = samples.sample_ids(db, job_id=job.id, limit=MAX_CARDS)
        some = samples.sample_ids(db, job_id=job.id, limit=MAX_CARDS, at_random=True)
        few = [asset.key for asset in all_of(db, job, samples.sample_ids(db, job_id=job.id, limit=10_000))]
        places = [keys.index(asset.key) for asset in all_of(db, job, ids)]

    assert len(set(some)) == MAX_CARDS
    assert some != ids
    assert len(places) == MAX_CARDS
    assert places[0] == 0
    assert {b - a for a, b in itertools.pairwise(places)} == {2, 3}
    assert few == keys


def all_of(db: Connection, job: Job, ids: list[int]) -> list[LabeledAsset]:
    return list(samples.labeled_of_ids(db, job_id=job.id, asset_ids=ids))


def cards(page: Path) -> list[str]:
    return re.findall(r'aria-label="Enlarge ([^,]+)', page.read_text(encoding="utf-8"))


def test_a_gallery_shows_what_is_asked_for(engine: Engine, tmp_path: Path) -> None:
    keys = [f"{n}.jpg" for n in range(6)]
    job, _ = finished_job(engine, keys, masks=3, labels=["cat", "dog"], failed=["z.jpg"], source=str(tmp_path))
    page = tmp_path / "index.html"
    unsure = text("UPDATE mask SET predicted_iou = :iou WHERE asset_id = (SELECT id FROM asset WHERE key = :key)")
    with engine.begin() as db:
        db.execute(unsure, [{"iou": 0.3, "key": "4.jpg"}, {"iou": 0.2, "key": "2.jpg"}])
        db.execute(text("DELETE FROM mask WHERE label = 'dog' AND asset_id % 2 = 0"))

    shown: dict[str, list[str]] = {}
    with engine.connect() as db:
        asked = {
            "worst": Choice(limit=3, order=Order.WORST),
            "random": Choice(order=Order.RANDOM),
            "dog": Choice(label="dog"),
            "failed": Choice(only_failed=True),
        }
        for name, choice in asked.items():
            write_gallery(db, job, page, choice=choice)
            shown[name] = cards(page)
            assert "z.jpg" in page.read_text()
        with pytest.raises(ChoiceError, match="has cat, dog, object"):
            write_gallery(db, job, page, choice=Choice(label="dgo"))

    assert shown["worst"][:2] == ["2.jpg", "4.jpg"]
    assert len(shown["worst"]) == 3
    assert sorted(shown["random"]) == [f"{n}.jpg" for n in range(6)]
    assert len(shown["dog"]) == 3
    assert shown["failed"] == []


_EXPORT = """
import sys
from itertools import islice
from pathlib import Path
from db import jobs, results
from db.session import open_engine
from orchestrator.export.coco import export_coco
from orchestrator.export.summary import write_summary
def peak_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
url, job_id, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with open_engine(url, statement_timeout_seconds=0).connect() as db:
    job = jobs.get_job(db, job_id=job_id)
    write_summary(db, job, out / "summary.json", seconds=0)
    export_coco(db, job, out / "few.json", islice(results.bare_assets(db, job_id=job.id), 100))  # loads libraries
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; it had been that of the process that forked
    before = peak_kb()
    export_coco(db, job, out / "coco.json")
    print(before, peak_kb())
"""


def test_exporting_20000_assets_takes_no_more_memory_than_a_page(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    job = make_job(engine, keys=20_000, chunk_size=5_000)
    pixels = np.random.default_rng(0).random((40, 40)) < 0.5
    mask = mask_from_pixels(pixels, predicted_iou=0.9)
    for chunk_id in chunk_ids(engine, job):
        chunk = claim(engine, chunk_id)
        assert chunk is not None
        outcomes = [
            NewOutcome(
                asset_id=asset.id,
                width=40,
                height=40,
                masks=[
                    StoredMask(
                        asset_id=asset.id,
                        n=n,
                        counts=mask.counts,
                        bbox_xywh=(0, 0, 40, 40),
                        area_px=mask.area_px,
                        predicted_iou=0.9,
                        stability_score=None,
                        label=None,
                        prompt=None,
                    )
                    for n in range(4)
                ],
            )
            for asset in pending(engine, chunk)
        ]
        record(engine, chunk, outcomes)

    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, database_url, str(job.id), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )

    before_kb, after_kb = map(int, done.stdout.split())
    assert (tmp_path / "coco.json").stat().st_size > 80_000_000
    assert after_kb - before_kb < 70_000  # 20 to 55 MB, as much with a fourth of the assets


def test_a_region_names_its_stored_mask_where_others_were_left_out(engine: Engine, tmp_path: Path) -> None:
    job, _ = finished_job(engine, ["a.jpg"], labels=["cat", "dog"])

    with engine.connect() as db:
        dogs = Selection(labels=frozenset(["dog"])).assets(db, job)
        export_label_studio(db, job, tmp_path / "dogs.json", dogs)

    [task] = json.loads((tmp_path / "dogs.json").read_text())
    assert {region["id"].split("-")[1] for region in task["predictions"][0]["result"]} == {"1", "3"}


def test_the_index_of_png_is_json_where_a_score_is_none(engine: Engine, tmp_path: Path) -> None:
    job = make_job(engine, keys=1)
    chunk = claim(engine, chunk_ids(engine, job)[0])
    assert chunk is not None
    [asset] = pending(engine, chunk)
    mask = stored(asset.id, 0, blobs(1, 1, (40, 60))[0], predicted_iou=float("nan"))
    record(engine, chunk, [NewOutcome(asset_id=asset.id, width=60, height=40, masks=[mask])])

    with engine.connect() as db:
        export_png(db, job, tmp_path / "png")

    index = (tmp_path / "png" / "index.json").read_text(encoding="utf-8")
    assert "NaN" not in index
    assert json.loads(index)[0]["masks"][0]["predicted_iou"] is None
