"""Two minutes of the campaign: every kind of fault once, on assets whose outcomes are known."""

from __future__ import annotations

import pytest

from tests.faults.campaign import run
from tests.faults.kinds import KINDS

pytestmark = [pytest.mark.integration, pytest.mark.faults]


def test_nothing_is_lost_doubled_or_wrong_under_a_fault_of_each_kind() -> None:
    books, recoveries = run(assets=400, faults=len(KINDS), seed=1)

    assert books.balanced, books
    assert books.assets == 400
    assert sorted(recoveries) == sorted(KINDS)
