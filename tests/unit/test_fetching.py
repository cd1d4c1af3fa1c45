"""Assets that are read ahead of the model."""

from __future__ import annotations

import threading
from pathlib import Path

from db.leases import Asset
from db.settings import Settings
from tests.deployment import draw_pictures
from workers.running.fetching import FetchAhead
from workers.storage.source import open_source


def test_a_block_that_is_left_early_waits_for_no_asset_that_was_not_begun(tmp_path: Path) -> None:
    source = open_source(str(draw_pictures(tmp_path / "pictures", 60)))
    assets = [Asset(id=n, key=f"{n:04}.png", size_bytes=1, etag="e") for n in range(60)]

    def leave_early() -> None:
        with FetchAhead(source, Settings(), "w") as ahead:
            for asset in assets:
                ahead.start(asset)

    leaving = threading.Thread(target=leave_early, daemon=True)
    leaving.start()
    leaving.join(60)
    assert not leaving.is_alive()
