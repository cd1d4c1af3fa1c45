"""`maskfleet config` shows where each setting comes from, and no secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from db.settings import Settings


def test_each_setting_is_shown_with_its_source_and_secrets_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("redis://:hidden-word@host:6379/0")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")},
        "MASKFLEET_DATABASE_URL": "postgresql://user:hidden-word@host/name",
        "MASKFLEET_BROKER_URL_FILE": str(tmp_path / "word"),
        "MASKFLEET_WEIGHTS_MIRROR": "https://user:hidden-word@host/weights",
        "MASKFLEET_MODEL": "sam_vit_b",
        "maskfleet_batch_size": "2",
    }

    command = [sys.executable, "-P", "-m", "orchestrator.cli", "config"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    rows = {line.split()[0]: line.split() for line in said.splitlines()[1:]}
    assert rows.keys() == {f"MASKFLEET_{name.upper()}" for name in Settings.model_fields}
    assert rows["MASKFLEET_DATABASE_URL"][1:3] == ["(hidden)", "environment"]
    assert rows["MASKFLEET_BROKER_URL"][1:3] == ["(hidden)", str(tmp_path / "word")]
    assert rows["MASKFLEET_MODEL"][1:3] == ["sam_vit_b", "environment"]
    assert rows["MASKFLEET_BATCH_SIZE"][1:3] == ["2", "environment"]
    assert rows["MASKFLEET_CHUNK_SIZE"][1:3] == ["64", "default"]
    assert "hidden-word" not in said
