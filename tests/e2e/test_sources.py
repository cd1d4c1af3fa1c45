"""Sources as people have them, through the real command: what phones, disks, stores of links and buckets hold."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from PIL import Image

from tests.deployment import draw_pictures
from tests.e2e.test_run import run
from tests.heif_files import Heif, hevc_item
from tests.s3_server import serve_s3

pytestmark = pytest.mark.integration


@pytest.fixture
def reports(testdata: Path) -> Path:
    if not (testdata / "reports").is_dir():
        pytest.skip("the shared test data hold no reports")
    return testdata / "reports"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_s3() as address:
        yield address


def outcome(out: Path) -> tuple[set[str], dict[str, str], dict[str, Any]]:
    """Keys that were labeled, error kinds of those that were not, and what was skipped."""
    summary = json.loads((out / "summary.json").read_text())
    labeled = {image["file_name"] for image in json.loads((out / "coco.json").read_text())["images"]}
    return labeled, {one["key"]: one["error_kind"] for one in summary["failed"]}, summary["skipped"]


def test_a_card_of_a_phone_is_labeled_and_the_companions_of_report_22_are_skipped(
    tmp_path: Path, reports: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(reports / "22-apple-double-companions" / "images", photos)
    photos.chmod(0o755)
    (photos / "Thumbs.db").write_bytes(b"x")
    (photos / "IMG_2.HEIC").write_bytes(Heif(items={1: hevc_item(Image.new("RGB", (160, 96), "teal"))}).write())
    Image.new("RGB", (64, 48), "teal").save(photos / "IMG_3.avif")

    run(photos, "--out", tmp_path / "out", "--model", "stub")

    labeled, failed, skipped = outcome(tmp_path / "out")
    assert labeled == {"IMG_1.jpg", "IMG_2.HEIC", "IMG_3.avif"}
    assert failed == {}
    assert skipped == {"system_file": 2}


def test_photos_that_are_links_out_of_the_folder_are_counted_as_report_25_asks(tmp_path: Path, reports: Path) -> None:
    shutil.copytree(reports / "25-photos-that-are-links" / "store", tmp_path / "store")
    photos = draw_pictures(tmp_path / "photos", 1)
    (photos / "a.png").symlink_to("../store/ab/cd1.png")

    run(photos, "--out", tmp_path / "out", "--model", "stub")

    assert outcome(tmp_path / "out") == ({"0000.png"}, {}, {"link_out_of_source": 1})


def test_the_keys_of_report_46_are_labeled_as_they_are(tmp_path: Path, reports: Path, s3: str) -> None:
    keys: list[str] = json.loads((reports / "46-object-keys" / "keys.json").read_text())
    keys.remove("p/a\nb.jpg")  # moto's HTTP server cannot hold it; tests of the wire cover it
    right = json.loads((reports / "46-object-keys" / "expect.json").read_text())
    photo = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(photo, "JPEG")
    bodies = {"p/fold/ (9 bytes)": b"a folder.", "p/zero.jpg (0 bytes)": b"", "p/cold.jpg (GLACIER)": photo.getvalue()}
    boto3.session.Session().client("s3", endpoint_url=s3, region_name="us-east-1").create_bucket(Bucket="bucket")
    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    for key in keys:
        storage_class = "GLACIER" if key.endswith(" (GLACIER)") else "STANDARD"
        name = key.partition(" (")[0] if key in bodies else key
        backend.put_object("bucket", name, bodies.get(key, photo.getvalue()), storage=storage_class)

    run("s3://bucket", "--out", tmp_path / "out", "--model", "stub", code=1, MASKFLEET_S3_ENDPOINT=s3)

    labeled, failed, skipped = outcome(tmp_path / "out")
    assert failed == {"p/cold.jpg": "not_found", "p/zero.jpg": "not_image"}
    assert labeled == {key for key in keys if key not in bodies}
    assert len(labeled) == right["labeled"]
    assert skipped == {"not_image_suffix": 1}
