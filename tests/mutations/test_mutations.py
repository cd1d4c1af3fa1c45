"""The list of mutations does not rot, and the command notices what is caught and what is not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, ROOT, Mutation
from tests.mutations.run import try_all

TOKENS = [mutation for mutation in MUTATIONS if "token check" in mutation.name]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_is_in_its_file_once_the_change_is_python_and_the_tests_exist(
    mutation: Mutation, tmp_path: Path
) -> None:
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    copy.write_text((ROOT / mutation.file).read_text())

    mutation.apply(tmp_path)

    ast.parse(copy.read_text())
    for test in mutation.tests:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert not name or name.partition("[")[0] in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_names_are_told_apart() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 16


@pytest.mark.slow
@pytest.mark.integration
def test_a_removed_check_is_caught_and_a_change_that_harms_nothing_survives() -> None:
    harmless = Mutation(
        name="nothing",
        file="db/leases.py",
        before="MAX_TRANSIENT_FAILURES = 6",
        after="MAX_TRANSIENT_FAILURES = 3 + 3",
        tests=TOKENS[0].tests,
    )

    *caught, survived = try_all([*TOKENS, harmless])

    assert [found.caught_by for found in caught] == [mutation.tests[0] for mutation in TOKENS]
    assert (survived.caught_by, survived.trouble) == (None, "")
