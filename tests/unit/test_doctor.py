"""What `doctor` says of a database's address that cannot be used, or that must not be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from db.settings import settings
from orchestrator.local import doctor


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def name(url: str) -> None:
        monkeypatch.setenv("MASKFLEET_DATABASE_URL", url)
        monkeypatch.setenv("MASKFLEET_ASSIST_PASSWORD", "sixteen characters")
        settings.cache_clear()

    yield name
    settings.cache_clear()


def test_an_address_that_cannot_be_used_is_a_finding(database: Callable[[str], None]) -> None:
    database("mysql://user@host/name")

    for found in (doctor._postgres(), doctor._assist()):
        assert found.ok is False
        assert "expected postgresql://" in found.found


@pytest.mark.integration
def test_a_password_among_the_options_of_an_address_is_not_shown(
    database: Callable[[str], None], database_url: str
) -> None:
    database(f"{database_url}&password=hunter2")

    found = doctor._postgres()

    assert found.ok
    assert "maskfleet_test" in found.found
    assert "hunter2" not in found.found
