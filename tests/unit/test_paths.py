"""`workers.paths`: what a path that a person wrote means."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.paths import own_path


def test_a_tilde_is_the_home_and_a_name_of_no_user_stays_a_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert own_path("~/out") == tmp_path / "out"
    assert own_path(Path("~no-such-user/out")) == Path("~no-such-user/out")
    assert own_path("out/~") == Path("out/~")
