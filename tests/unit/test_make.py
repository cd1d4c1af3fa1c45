"""What stands twice around the tests is the same in both places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.needs import miss

ROOT = Path(__file__).parents[2]


def test_the_hooks_of_pre_commit_are_the_commands_of_make_lint() -> None:
    found = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    commands = [line.strip() for line in found[1].splitlines()]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())

    assert [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]] == commands


def test_what_a_test_needs_and_is_not_there_skips_it_but_fails_it_where_ci_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no photos"):
        miss("no photos")

    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no photos"):
        miss("no photos")
