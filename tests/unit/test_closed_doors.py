"""What must not get out, and what must not get in: secrets in messages, forged log lines, settings that are wrong."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from db.session import DatabaseNotReady, open_engine
from db.settings import Settings, settings
from orchestrator.cli.errors import as_message
from orchestrator.export.yolo_images import file_name
from workers.errors import redact
from workers.logs import TextFormatter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "secret_text",
    [
        "postgresql://user:SECRET1 with spaces@host:5432/db",
        "postgresql://user:with spaces SECRET1@host:5432/db does not answer",
        r"host=h password='it\'s SECRET1' dbname=x",
        'host=h password="a \\" SECRET1" dbname=x',
        "host=h sslpassword=SECRET1 dbname=x",
        "401 for https://huggingface.co/x with hf_SECRET1SECRET1SECRET1",
        "clone with ghp_SECRET1SECRET1SECRET1SECRET1SECRET1",
        "clone with github_pat_11ABCDEFG_SECRET1SECRET1SECRET1",
        "https://a.blob.core.windows.net/c/k.jpg?sv=2024&sig=SECRET1%2Bx%3D&se=2026",
        "https://b.s3.amazonaws.com/k?AWSAccessKeyId=SECRET1&Expires=1&Signature=SECRET1",
        "https://minio:9000/b/k?X-Amz-Credential=minio%2FSECRET1&X-Amz-Signature=SECRET1",
        "x-api-key: SECRET1",
        "aws_access_key_id = SECRET1",
    ],
)
def test_a_message_loses_its_secret(secret_text: str) -> None:
    assert "SECRET1" not in redact(secret_text)
    assert redact(redact(secret_text)) == redact(secret_text)


@pytest.mark.parametrize(
    "harmless",
    [
        "redis://localhost: connection refused; write to admin@example.com",
        "the store does not know this access key: fix it",
        "significant=7&design=3",
        "hf_home and ghp_ are not tokens",
    ],
)
def test_an_ordinary_message_keeps_its_words(harmless: str) -> None:
    assert redact(harmless) == harmless


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    """What a logger named `doors` writes, as the commands write it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter())
    logger = logging.getLogger("doors")
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)
    logger.propagate = True


FORGED = "a.jpg\nERROR doors: forged\r\x1b[2J\x1b[31m\x85\u2028\u202e.png"


def test_a_key_cannot_forge_a_log_line_or_reach_the_terminal(log_text: io.StringIO) -> None:
    logging.getLogger("doors").warning("asset %s: gone", FORGED)

    [line, end] = log_text.getvalue().split("\n")
    assert r" WARNING doors: asset a.jpg\nERROR doors: forged\r\x1b[2J" in line
    assert line.isprintable()
    assert end == ""


def test_a_traceback_keeps_its_lines_but_none_can_be_taken_for_a_record(log_text: io.StringIO) -> None:
    try:
        raise ValueError(f"{FORGED} password=hunter2")
    except ValueError:
        logging.getLogger("doors").exception("asset %s: failed", FORGED)

    first, *rest = log_text.getvalue().splitlines()
    assert " ERROR doors: asset a.jpg" in first
    assert len(rest) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert "hunter2" not in log_text.getvalue()


WRONG = {
    "database_url": ["nonsense", "mysql://h/x", "postgresql://h:port/x"],
    "broker_url": ["nonsense", "redis://h:port/0", "redis"],
    "s3_endpoint": ["nonsense", "ftp://h", "http://h:port"],
    "s3_addressing_style": ["sideways"],
    "s3_request_payer": ["me"],
    "s3_anonymous": ["perhaps"],
    "label_studio_url": ["nonsense", "h:8080", "http://h:port"],
    "label_studio_public_url": ["nonsense", "labels.example.com"],
    "label_studio_api_key": ["two\nlines", "ключ"],
    "label_studio_project": ["first", "1.5"],
    "webhook_secret": ["two\nlines", " blank"],
    "chunk_size": ["0", "10001", "many"],
    "batch_size": ["0", "257", "4.5"],
    "window_chunks": ["0", "-1", "x"],
    "lease_seconds": ["0", "-5", "abc", "inf", "nan", "1e12"],
    "resend_seconds": ["0", "inf", "1e300"],
    "hang_seconds": ["0", "inf"],
    "drain_seconds": ["0", "1e999"],
    "log_format": ["xml"],
    "decode_seconds": ["0", "inf"],
    "embeddings_format": ["fp8"],
    "embeddings_bytes": ["-1", "10 GB"],
    "embeddings_days": ["0", "nan", "9999999"],
    "max_pixels": ["0", "1 MP"],
    "max_object_bytes": ["0", "200MiB"],
}
# Any text is a name or a path. What is wrong with it is said by the command that uses it.
ANY_TEXT = {
    "weights_dir",
    "weights_mirror",
    "state_dir",
    "model",
    "embeddings",
    "assist_user",
    "assist_password",
    "board_password",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_setting_with_a_wrong_value_is_one_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MASKFLEET_{name.upper()}", value)
    settings.cache_clear()
    try:
        with pytest.raises((ValidationError, DatabaseNotReady)) as raised:
            use(name)
    finally:
        settings.cache_clear()

    said = as_message(raised.value)
    assert said is not None
    assert re.search(rf"MASKFLEET_{name.upper()}|the database's address", said)
    assert "expected" in said
    assert "Input should" not in said  # the validator's words
    assert "\n" not in said


def use(name: str) -> None:
    url = settings().database_url
    if name == "database_url" and url is not None:
        open_engine(url.get_secret_value())


def test_each_setting_was_tried_with_a_wrong_value() -> None:
    tried = WRONG.keys() | ANY_TEXT
    assert sorted(Settings.model_fields.keys() - tried) == [], "add a wrong value above"


def test_an_image_is_exported_under_a_name_that_every_disk_takes() -> None:
    for key in ("photo." + "x" * 600, "photo.jp\ng", "photo.j/../pg", "photo.é", "\x1b[2J.\x1b"):
        assert file_name(7, key) == "7"
    assert file_name(7, "a/photo.JPG") == "7.jpg"


# ruff's rules about security


def test_each_silenced_security_rule_has_its_reason() -> None:
    silenced = [
        f"{path.relative_to(ROOT)}:{number}"
        for room in ("db", "workers", "orchestrator")
        for path in (ROOT / room).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"#\s*noqa(:\s*\S*\bS\d{3}|\s*$)", line) and not re.search(r"noqa: [A-Z0-9, ]+  \S", line)
    ]
    assert silenced == []
