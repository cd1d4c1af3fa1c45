"""A secret may stand in a file that a variable names."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic_settings import SettingsError

from db.secret_files import SecretFiles
from db.settings import Settings
from orchestrator.cli.errors import as_message

SECRETS = ("database_url", "broker_url", "label_studio_api_key", "webhook_secret", "assist_password", "board_password")


@pytest.mark.parametrize("name", SECRETS)
def test_each_secret_is_read_from_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").write_text("redis://:word@host:6379/0\n")
    monkeypatch.setenv(f"MASKFLEET_{name.upper()}_FILE", str(tmp_path / "word"))

    assert getattr(Settings(), name).get_secret_value() == "redis://:word@host:6379/0"


def test_the_secrets_are_these_and_no_other_setting_is_read_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("redis://host:6379/0")
    for name in Settings.model_fields:
        monkeypatch.setenv(f"MASKFLEET_{name.upper()}_FILE", str(tmp_path / "file"))

    assert tuple(SecretFiles(Settings)()) == SECRETS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "MASKFLEET_ASSIST_PASSWORD_FILE: cannot read {path}: No such file or directory"),
        (b"x" * 100_000, "MASKFLEET_ASSIST_PASSWORD_FILE: {path} has more than 65,536 bytes, expected a secret"),
        (b"\xff", "MASKFLEET_ASSIST_PASSWORD_FILE: {path} is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_secret_is_said_in_one_line(
    content: bytes | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "word"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("MASKFLEET_ASSIST_PASSWORD_FILE", str(path))

    with pytest.raises(SettingsError) as raised:
        Settings()

    assert as_message(raised.value) == expected.format(path=path)


def test_a_secret_that_is_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKFLEET_ASSIST_PASSWORD_FILE", str(tmp_path / "word"))
    monkeypatch.setenv("MASKFLEET_ASSIST_PASSWORD", "a password of sixteen")

    with pytest.raises(SettingsError, match="both set"):
        Settings()
