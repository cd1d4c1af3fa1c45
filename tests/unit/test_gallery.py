from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from db.jobs import Counts, Job
from db.results import FailedAsset, LabeledAsset, StoredMask
from db.states import JobState
from orchestrator.pages.choice import MAX_CARDS
from orchestrator.pages.gallery import Gallery, write_page
from orchestrator.pages.page import chart
from orchestrator.pages.photo import instance_colour
from orchestrator.shapes.outlines import outline
from workers.errors import AssetError, ErrorKind, TransientError
from workers.images.pixels import RgbImage
from workers.masks import BoolMask, mask_from_pixels

HOSTILE = [
    '<script>alert("1")</script>.jpg',
    "\"'><img src=x onerror=alert(1)>.jpg",
    "{{cards}}{{name}}.jpg",
    "emoji 🦊👩‍🚀.jpg",
    "line\nbreak\r\t.jpg",
    "\u202egpj.exe",
    "&lt;b&gt;&amp;.jpg",
    "](javascript:alert(1))",
]


def stored(pixels: BoolMask, *, n: int = 0, label: str | None = None) -> StoredMask:
    mask = mask_from_pixels(pixels, predicted_iou=0.91, stability_score=0.97)
    x, y, w, h = map(int, mask.bbox_xywh)
    return StoredMask(
        asset_id=1,
        n=n,
        counts=mask.counts,
        bbox_xywh=(x, y, w, h),
        area_px=mask.area_px,
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        label=label,
        prompt=None,
    )


def square(size_hw: tuple[int, int] = (60, 80)) -> BoolMask:
    pixels = np.zeros(size_hw, np.bool_)
    pixels[10:30, 20:50] = True
    return pixels


def asset(key: str, masks: int = 1, *, asset_id: int = 1, label: str | None = None) -> LabeledAsset:
    found = [stored(square(), n=n, label=label) for n in range(masks)]
    return LabeledAsset(asset_id=asset_id, key=key, size_hw=(60, 80), segment_ms=1234, masks=found)


def photo(_key: str) -> RgbImage:
    return np.full((60, 80, 3), 120, np.uint8)


def make_page(
    folder: Path,
    assets: list[LabeledAsset],
    *,
    failed: list[FailedAsset] | None = None,
    read: Callable[[str], RgbImage] = photo,
    notice: str | None = None,
    **changes: Any,
) -> str:
    failed = failed or []
    job = Job(
        id=7,
        name=changes.pop("name", "a job"),
        state=JobState.DONE,
        source="/photos",
        model="stub",
        model_version="stub@1+2",
        asked={},
        fresh=False,
        priority=5,
        list_cursor=None,
        list_failures=0,
        asset_count=len(assets),
        matched=None,
        skipped=changes.pop("skipped", {}),
        error=None,
        created_at=datetime.now(UTC),
        listed_at=None,
        finished_at=None,
    )
    labeled = changes.pop("labeled", len(assets))
    counts = Counts(
        listed=labeled + len(failed),
        labeled=labeled,
        failed=changes.pop("failed_count", len(failed)),
        running=0,
        masks=sum(len(a.masks) for a in assets),
        failed_by_kind={f.error_kind: 1 for f in failed},
        without_prompts=0,
        reused=0,
    )
    labels = sorted({m.label for a in assets for m in a.masks if m.label is not None})
    gallery = Gallery(
        job=job,
        counts=counts,
        seconds=12.3,
        notice=notice,
        assets=assets,
        cards=changes.pop("cards", len(assets)),
        said=changes.pop("said", "all of them"),
        failed=failed,
        labels=labels,
        masks_per_asset={len(a.masks): 1 for a in assets},
        iou_percents={91: counts.masks} if counts.masks else {},
        read=read,
    )
    out = folder / "index.html"
    write_page(gallery, out)
    return out.read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """All start tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_source_becomes_markup(tmp_path: Path, text: str) -> None:
    harmless = Elements(
        make_page(
            tmp_path,
            [asset("a.jpg", label="b"), asset("b.jpg", label="c")],
            failed=[FailedAsset(asset_id=2, key="c.jpg", error_kind="strange", error="d")],
            notice="e",
            said="e",
            skipped={"f": 1},
        )
    )

    page = Elements(
        make_page(
            tmp_path,
            [asset(text, label=text), asset("b.jpg", label="c")],
            failed=[FailedAsset(asset_id=2, key=text, error_kind=text, error=text)],
            notice=text.replace("`", ""),
            said=text,
            skipped={text: 1},
            name=text,
        )
    )

    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in page.tags] == [
        sorted(attributes) for _, attributes in harmless.tags
    ]
    assert not re.search("[\u202e\r\t]", page.text.partition("<main>")[2])
    if text.isprintable():
        assert text in page.text


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = make_page(tmp_path, [asset("a.jpg")], notice="run `maskfleet models pull sam_vit_b`")

    elements = Elements(page)
    links = [a[name] for _, a in elements.tags for name in ("src", "href", "action", "data", "poster") if a.get(name)]
    assert links
    assert all(link.startswith("data:image/jpeg;base64,") for link in links if link)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    policy = next(
        a["content"] for t, a in elements.tags if t == "meta" and "Content-Security" in str(a.get("http-equiv"))
    )
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for _, a in elements.tags for name in a if name.startswith("on")]


def test_every_picture_has_a_text_and_a_button_that_enlarges_it(tmp_path: Path) -> None:
    elements = Elements(make_page(tmp_path, [asset("street/a.jpg", masks=3)])).tags

    [image] = [a for tag, a in elements if tag == "img"]
    [button] = [a for tag, a in elements if a.get("class") == "shot"]
    assert image["alt"] == "street/a.jpg"
    assert button["aria-label"] == "Enlarge street/a.jpg, 3 masks"
    assert image["src"] is not None
    decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    assert decoded.size == (80, 60)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssetError(ErrorKind.NOT_FOUND, "gone"), "not_found"),
        (TransientError("the store is away"), "the store does not answer"),
    ],
)
def test_an_asset_that_cannot_be_read_any_more_keeps_its_card_and_its_outlines(
    tmp_path: Path, error: Exception, said: str
) -> None:
    def read(key: str) -> RgbImage:
        if key == "gone.jpg":
            raise error
        return photo(key)

    page = make_page(tmp_path, [asset("a.jpg"), asset("gone.jpg"), asset("z.jpg")], read=read)

    elements = Elements(page)
    assert len([tag for tag, _ in elements.tags if tag == "img"]) == 2
    assert len([a for tag, a in elements.tags if tag == "path" and "data-n" in a]) == 3
    assert said in elements.text


def test_a_picture_that_is_another_now_is_not_shown_under_the_old_masks(tmp_path: Path) -> None:
    page = make_page(tmp_path, [asset("a.jpg")], read=lambda _: np.zeros((80, 60, 3), np.uint8))

    assert "<img" not in page
    assert "has changed since" in page


def test_masks_that_make_no_sense_are_left_out_and_counted(tmp_path: Path) -> None:
    broken = asset("a.jpg", masks=2)
    broken.masks[1] = StoredMask(
        asset_id=1,
        n=1,
        counts="~~~",
        bbox_xywh=(0, 0, 1, 1),
        area_px=1,
        predicted_iou=float("nan"),
        stability_score=None,
        label=None,
        prompt=None,
    )

    page = make_page(tmp_path, [broken])

    assert "the smallest 1 not drawn" in page


@pytest.mark.slow
@pytest.mark.parametrize("cards", [160, MAX_CARDS])
def test_a_page_of_noisy_photos_with_ragged_masks_stays_below_5_mb(tmp_path: Path, cards: int) -> None:
    size_hw = (240, 320)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*size_hw, 3), np.uint8)
    speckled = [stored(rng.random(size_hw) < 0.3, n=n) for n in range(6)]
    worst = LabeledAsset(asset_id=1, key="a.jpg", size_hw=size_hw, masks=speckled)

    page = make_page(tmp_path, [worst], read=lambda _: noise, cards=cards)
    rest = make_page(tmp_path, [], cards=cards)

    assert "<img" in page
    assert "data-n" in page
    assert (len(page) - len(rest)) * cards < 4_500_000


def test_a_page_of_few_photos_shows_them_large(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    large = LabeledAsset(asset_id=1, key="a.jpg", size_hw=(300, 400), masks=[stored(np.ones((300, 400), np.bool_))])

    page = make_page(tmp_path, [large], read=lambda _: noise)

    [data] = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (400, 300)


def bars(numbers: dict[int, int]) -> list[float]:
    drawn = chart("Masks per asset", numbers, "asset", "{:,}", step=1)
    return [float(height) for height in re.findall(r'height="([\d.]+)"><title>', drawn)]


def test_an_outlier_does_not_flatten_the_histogram() -> None:
    usual = {n: 3 + n % 5 for n in range(10, 40)}

    with_outlier = bars({**usual, 5000: 1})

    assert len(with_outlier) > 12
    assert max(with_outlier[:-1]) == 100
    assert with_outlier[:-1] == bars(usual)
    assert "more than 39: 1 asset" in chart("", {**usual, 5000: 1}, "asset", "{:,}", step=1)
    assert "up to 5,000" in chart("", {**usual, 5000: 1}, "asset", "{:,}", step=1)


def test_a_histogram_counts_every_value_once() -> None:
    wide = {n * n: 1 for n in range(60)}  # no value is far from all others

    said = chart("", wide, "asset", "{:,}", step=1)

    assert sum(int(n) for n in re.findall(r": (\d+) asset", said)) == 60
    assert "more than" not in said


def test_the_failed_assets_stand_under_their_kind_with_what_was_found(tmp_path: Path) -> None:
    failed = [
        FailedAsset(asset_id=1, key="b.png", error_kind="truncated", error="cut off"),
        FailedAsset(asset_id=2, key="c.png", error_kind="not_image", error="starts b'<html>'"),
    ]

    failed.sort(key=lambda asset: asset.error_kind)
    page = Elements(make_page(tmp_path, [], failed=failed, skipped={"folder_marker": 3})).text

    assert page.index("not_image · 1") < page.index("starts b'<html>'") < page.index("truncated · 1")
    assert "3 folder marker" in page
    assert "No labeled asset to show" in page


def test_the_failed_assets_come_first_with_their_photo_where_it_can_be_read(tmp_path: Path) -> None:
    kinds = {"a.jpg": "bad_prompt", "b.jpg": "crashed_worker", "c.jpg": "gpu_oom"}
    failed = [FailedAsset(asset_id=2, key=key, error_kind=kind, error="why") for key, kind in kinds.items()]
    asked: list[str] = []

    def read(key: str) -> RgbImage:
        asked.append(key)
        if key == "c.jpg":
            raise AssetError(ErrorKind.NOT_FOUND, "gone")
        return photo(key)

    page = make_page(tmp_path, [asset("d.jpg")], failed=failed, read=read)

    assert page.index("bad_prompt") < page.index('aria-label="Enlarge d.jpg')
    assert asked == ["d.jpg", "a.jpg", "c.jpg"] or asked == ["a.jpg", "c.jpg", "d.jpg"]  # never what killed a worker
    assert page.count("<img") == 2
    assert "cannot be read any more: not_found" in page


def test_the_notice_shows_its_commands_as_code(tmp_path: Path) -> None:
    page = make_page(tmp_path, [], notice="a demonstration: `maskfleet models pull sam_vit_b` brings <real> ones")

    assert "a demonstration: <code>maskfleet models pull sam_vit_b</code> brings &lt;real&gt; ones" in page


def painted(path: str, size_hw: tuple[int, int]) -> BoolMask:
    """What a browser fills: the path's rings, even-odd, at the image's size."""
    scale = 1280 / max(size_hw)
    canvas = np.zeros((round(size_hw[0] * scale), round(size_hw[1] * scale)), np.bool_)
    for ring in re.findall(r"M(-?\d+) (-?\d+)l([^z]*)z", path):
        steps = np.array([float(v) for v in ring[2].split()]).reshape(-1, 2)
        points = np.cumsum(np.vstack([[float(ring[0]), float(ring[1])], steps]), axis=0)
        one = Image.new("1", canvas.shape[::-1])
        ImageDraw.Draw(one).polygon([tuple(p) for p in points.tolist()], fill=1)
        canvas ^= np.asarray(one)
    return canvas


@settings(max_examples=30, deadline=None)
@given(
    size_hw=st.sampled_from([(40, 50), (97, 200), (200, 63), (999, 1281), (2700, 3000)]),
    x=st.floats(0.2, 0.8),
    y=st.floats(0.2, 0.8),
    radius=st.floats(0.1, 0.3),
    hole=st.booleans(),
)
def test_outlines_show_the_mask_with_its_holes(
    size_hw: tuple[int, int], x: float, y: float, radius: float, hole: bool
) -> None:
    height, width = size_hw
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows - y * height, columns - x * width) / min(height, width)
    pixels = (distance < radius) & ~(hole & (distance < radius / 2))

    shown = painted(outline(stored(pixels), size_hw), size_hw)

    expected = np.asarray(Image.fromarray(pixels).resize(shown.shape[::-1], Image.Resampling.NEAREST))
    iou = (shown & expected).sum() / (shown | expected).sum()
    assert iou > 0.85


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 400), (400, 1), (3000, 4000)])
def test_the_smallest_masks_are_still_seen(size_hw: tuple[int, int]) -> None:
    pixels = np.zeros(size_hw, np.bool_)
    pixels[size_hw[0] // 2, size_hw[1] // 2] = True

    assert outline(stored(pixels), size_hw).startswith("M")


def test_an_empty_mask_has_no_outline() -> None:
    assert outline(stored(np.zeros((5, 7), np.bool_)), (5, 7)) == ""


def test_neighbouring_instances_have_different_colours() -> None:
    assert len({instance_colour(n) for n in range(200)}) > 190
