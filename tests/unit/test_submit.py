from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest

from db.jobs import Job
from orchestrator.jobs.listing import Walks, select
from orchestrator.jobs.request import Request
from orchestrator.jobs.shards import middle
from orchestrator.prompts.files import read_prompts
from workers.models.registry import find_model
from workers.storage.source import open_source


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def taken(folder: Path, **asked: object) -> tuple[list[str], dict[str, int]]:
    pages = list(select(open_source(str(folder)), asked=asked, after=None, found=0))
    assert [page.complete for page in pages] == [False] * (len(pages) - 1) + [True]
    skipped: dict[str, int] = {}
    for page in pages:
        for reason, n in page.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    return [asset.key for page in pages for asset in page.assets], skipped


def test_image_suffixes_are_taken_in_any_case_and_the_rest_is_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.JPG", "b.jpeg", "c.txt", "d/e.TiF", "f")
    assert taken(tmp_path) == (["a.JPG", "b.jpeg", "d/e.TiF"], {"not_image_suffix": 2})


def test_what_phones_write_is_taken(tmp_path: Path) -> None:
    make(tmp_path, "a.HEIC", "b.heif", "c.HIF", "d.avif", "e.mov")
    assert taken(tmp_path) == (["a.HEIC", "b.heif", "c.HIF", "d.avif"], {"not_image_suffix": 1})


def test_what_systems_leave_beside_photos_is_counted_and_never_an_asset(tmp_path: Path) -> None:
    make(
        tmp_path, "a.jpg", "._a.jpg", "d/._b.jpg", "d/Thumbs.db", ".DS_Store", "d/desktop.ini", "_.jpg", "d/.hidden.jpg"
    )
    assert taken(tmp_path) == (["_.jpg", "a.jpg", "d/.hidden.jpg"], {"system_file": 5})
    assert taken(tmp_path, include=["*"]) == (["_.jpg", "a.jpg", "d/.hidden.jpg"], {"system_file": 5})


def test_include_and_exclude_are_globs_over_whole_keys(tmp_path: Path) -> None:
    make(tmp_path, "2024/a.jpg", "2024/b.dat", "2025/a.jpg")
    assert taken(tmp_path, include=["*"])[0] == ["2024/a.jpg", "2024/b.dat", "2025/a.jpg"]
    assert taken(tmp_path, include=["2024/*"], exclude=["*.jpg"]) == (
        ["2024/b.dat"],
        {"excluded": 1, "not_included": 1},
    )


def test_a_limit_counts_what_was_found_before(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n}.jpg" for n in range(9)))
    assert taken(tmp_path, limit=4)[0] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    [page] = select(open_source(str(tmp_path)), asked={"limit": 4}, after="2.jpg", found=3)
    assert ([asset.key for asset in page.assets], page.complete) == (["3.jpg"], True)


def test_a_walk_goes_on_where_its_job_is_and_begins_anew_where_it_is_not(tmp_path: Path) -> None:
    make(tmp_path, *(f"{n:04}.jpg" for n in range(2500)))
    source, walks = open_source(str(tmp_path)), Walks()
    job = a_job(cursor=None, count=0)
    first = walks.take(job, source)
    cursor = next(first).cursor
    moved = a_job(cursor=cursor, count=1000)
    walks.keep(moved, first)

    assert walks.take(moved, source) is first  # the folder is not read again
    walks.keep(moved, first)
    other = walks.take(a_job(cursor="0100.jpg", count=101), source)  # another dispatcher was faster
    assert next(other).assets[0].key == "0101.jpg"
    assert next(walks.take(moved, source)).assets[0].key == "1000.jpg"  # after a restart
    for n in range(20):
        walks.keep(replace(moved, id=n), first)
    assert walks.take(replace(moved, id=0), source) is not first
    assert walks.take(replace(moved, id=19), source) is first


def a_job(*, cursor: str | None, count: int) -> Job:
    nothing = dict.fromkeys((field.name for field in fields(Job)), None)
    return Job(**nothing | {"id": 1, "asked": {}, "list_cursor": cursor, "asset_count": count})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_a_middle_lies_between_its_two_keys(seed: int) -> None:
    draw = Random(seed)
    for _ in range(2000):
        low, high = ("".join(draw.choices("ab~é図\U0001f436 0/", k=draw.randint(0, 5))) for _ in range(2))
        bound = high if draw.random() < 0.7 else None
        if bound is None or low < bound:
            found = middle(low, bound)
            assert found is None or (low < found and (bound is None or found < bound)), (low, bound, found)
    assert middle("img_0001", "img_0002") == "img_0001O"
    assert middle("~" * 1024, None)
    assert middle("2022/02/B93.jpg", "2021/C") is None  # else a key far behind both


def test_the_model_version_changes_with_what_changes_masks_and_with_nothing_else() -> None:
    plain = Request(source="/a", model="sam_vit_b").model_version()
    # Pinned: another version for the same masks would have people's stored answers computed again.
    assert plain == "sam_vit_b@ec2df627+efbab663"
    assert Request(source="/b", model="sam_vit_b", name="n", limit=3).model_version() == plain
    assert Request(source="/a", model="sam_vit_b", params={"points_per_side": 32}).model_version() == plain
    assert Request(source="/a", model="sam_vit_b", params={"points_per_batch": 8}).model_version() == plain
    assert Request(source="/a", model="sam_vit_b", params={"points_per_side": 16}).model_version() != plain
    assert Request(source="/a", model="sam_vit_b", params={"decoder": "torch"}).model_version() == plain
    assert Request(source="/a", model="sam_vit_b", params={"decoder": "onnx"}).model_version() != plain
    assert Request(source="/a", model="sam_vit_b", label="car").model_version() != plain
    assert Request(source="/a", model="sam_vit_l").model_version() != plain


def test_the_model_version_changes_with_the_prompts_and_how_they_are_answered(tmp_path: Path) -> None:
    def version(box: list[int], name: str = "p.jsonl", **changes: object) -> str:
        (tmp_path / name).write_text(json.dumps({"key": "a.jpg", "prompts": [{"box_xyxy": box}]}))
        spec = find_model("sam_vit_b")
        found = read_prompts(str(tmp_path / name), source="/a", spec=spec, s3_endpoint=None)
        with found.stored:
            return Request(source="/a", model="sam_vit_b", prompts=found, **changes).model_version()  # type: ignore[arg-type]

    plain = version([1, 2, 3, 4])
    assert plain != Request(source="/a", model="sam_vit_b").model_version()
    assert version([1, 2, 3, 4], name="other") == plain
    assert version([1, 2, 3, 4], params={"multimask": "best"}) == plain
    assert version([1, 2, 3, 4], params={"multimask": "all"}) != plain
    assert version([1, 2, 3, 4], params={"decoder": "torch"}) == plain
    assert version([1, 2, 3, 4], params={"decoder": "onnx"}) != plain
    assert version([1, 2, 3, 5]) != plain
