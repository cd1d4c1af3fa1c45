"""One object never holds a worker up: a slow decode, a decode without end, bytes that changed after the listing."""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from db.leases import Asset, NewOutcome
from db.settings import Settings
from tests.deployment import Deployment, draw_pictures
from tests.faults.test_faults import assert_nothing_lost
from tests.waiting import wait_for
from workers.errors import AssetError, ErrorKind
from workers.images import decode as decoding
from workers.running import fetching
from workers.running.fetching import DecodeStuck, FetchAhead, NotFetched
from workers.storage.folder import Folder

pytestmark = [pytest.mark.integration, pytest.mark.faults]


def slow_bmp(pixels_wh: tuple[int, int]) -> bytes:
    """A BMP of runs of one pixel, which Pillow unpacks in Python: about 3 million pixels a second."""
    width, height = pixels_wh
    rows = (b"\x01\x05" * width + b"\x00\x00") * height
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 2835, 2835, 256, 0)
    offset = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + header + bytes(1024) + rows


def test_a_slow_decode_ends_with_its_verdict_and_its_neighbours_are_labeled(
    deployment: Deployment, tmp_path: Path
) -> None:
    deployment.settings |= {"MASKFLEET_DECODE_SECONDS": "0.5", "MASKFLEET_CHUNK_SIZE": "100"}
    deployment.settings["MASKFLEET_LEASE_SECONDS"] = "60"  # none ends early because the machine is busy
    source = draw_pictures(tmp_path / "pictures", 12)
    for name in ("0003-slow.bmp", "0007-slow.bmp"):
        (source / name).write_bytes(slow_bmp((3000, 3000)))
    deployment.start("dispatch")
    worker = deployment.start("worker", "--devices", "cpu")
    job = deployment.submit(source)

    counts = deployment.wait_until_done(job)

    assert_nothing_lost(counts, listed=14, failed={"decode_timeout": 2})
    [error, _] = [failed["error"] for failed in deployment.call_json("show", str(job), "--failed")["failed"]]
    assert "not decoded within 0.5 s" in error
    assert worker.poll() is None
    with deployment.engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM suspect")).scalar_one() == 0  # the process left, and did not die


def test_decodes_without_end_hold_neither_their_neighbours_nor_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(fetching, "decode", lambda *_, **__: never.wait())
    for n in range(5):
        (tmp_path / f"{n}.png").write_bytes(b"anything")
    assets = [Asset(id=n, key=f"{n}.png", size_bytes=8, etag="") for n in range(5)]
    verdicts = []

    with pytest.raises(DecodeStuck), FetchAhead(Folder(str(tmp_path)), Settings(decode_seconds=0.01), "cpu0") as ahead:  # noqa: PT012
        for asset in assets:
            ahead.start(asset)
        for asset in assets:
            try:
                ahead.image(asset)
            except AssetError as error:
                verdicts.append(error.kind)
            except NotFetched:
                verdicts.append(None)
    never.set()

    assert verdicts == [ErrorKind.DECODE_TIMEOUT] * 4 + [
        None
    ]  # four threads are held, and nothing is known of the fifth


def test_time_in_which_a_decode_does_not_compute_is_no_decoding_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is busy or frozen gives no verdict."""
    (tmp_path / "a.png").write_bytes(b"anything")
    monkeypatch.setattr(fetching, "decode", lambda *_, **__: time.sleep(1) or "pixels")
    with FetchAhead(Folder(str(tmp_path)), Settings(decode_seconds=0.3), "cpu0") as ahead:
        asset = Asset(id=1, key="a.png", size_bytes=8, etag="")
        ahead.start(asset)
        assert ahead.image(asset) == "pixels"


def test_other_threads_run_while_a_large_picture_is_decoded() -> None:
    """A decoder that kept Python's lock would also stop the heartbeat and the time limit."""
    data = slow_bmp((1000, 1000))
    ticks, over = [], threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(time.monotonic())

    ticker = threading.Thread(target=tick)
    ticker.start()
    decoding.decode(data, name="slow.bmp")
    over.set()
    ticker.join()
    assert len(ticks) > 3


def test_an_object_that_changed_after_its_listing_is_known_by_the_bytes_that_were_read(
    deployment: Deployment, tmp_path: Path
) -> None:
    source = draw_pictures(tmp_path / "pictures", 4)
    listed = (source / "0001.png").read_bytes()
    moment = (source / "0001.png").stat().st_mtime_ns
    deployment.start("dispatch")
    first = deployment.submit(source)
    wait_for(lambda: deployment.read(first)[0].state == "running", "the listing", logs=deployment.logs)
    (source / "0001.png").write_bytes((source / "0002.png").read_bytes() + b" changed")
    deployment.start("worker", "--devices", "cpu")

    assert deployment.wait_until_done(first).changed == 1
    assert "1 were changed after the listing" in deployment.call("show", str(first))
    as_it_is_now = deployment.submit(source)
    assert deployment.wait_until_done(as_it_is_now).reused == 4

    (source / "0001.png").write_bytes(listed)
    os.utime(source / "0001.png", ns=(moment, moment))
    as_it_was = deployment.submit(source)
    counts = deployment.wait_until_done(as_it_was)
    assert (counts.reused, counts.changed) == (3, 0)


def test_an_outcome_says_the_etag_that_was_read_when_the_listing_said_another_or_none(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(slow_bmp((3, 3)))
    folder = Folder(str(tmp_path))
    [page] = folder.list()
    [found] = page.objects
    etags = []
    for listed in (found.etag, "5-1", ""):
        with FetchAhead(folder, Settings(), "cpu0") as ahead:
            asset = Asset(id=1, key="a.bmp", size_bytes=1, etag=listed)
            ahead.start(asset)
            ahead.image(asset)
            etags.append(ahead.with_etag(NewOutcome(asset_id=1)).etag)
    assert etags == [None, found.etag, found.etag]
