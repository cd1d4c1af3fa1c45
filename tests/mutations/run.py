"""Remove the safeguards of `catalogue` one at a time, in a copy of the tree, and see which test notices.

    make mutate                            every mutation; ends with 1 when one survives or no longer applies
    make mutate ONLY="the token check"     those with this text in their name

The named tests must pass without a mutation first. Otherwise their failure would say nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS, ROOT, Mutation

_PASSED, _FAILED = 0, 1  # exit statuses of pytest
_PATIENCE_SECONDS = 900.0
_LEFT_OUT = (".git", ".venv", ".uv", "__pycache__", ".*_cache", ".hypothesis", "maskfleet-demo", "out", "dist")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """caught_by: the first test that failed. None: the mutation survived, or `trouble` says why nothing is known."""

    mutation: Mutation
    caught_by: str | None
    seconds: float
    trouble: str = ""

    def line(self) -> str:
        what = self.caught_by or f"SURVIVED {self.trouble}".strip()
        return f"{self.mutation.name:60} {what:100} {self.seconds:6.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose name holds this text")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
    print(f"{'removed':60} {'caught by':100} {'s':>6}")
    survived = 0
    for found in try_all(chosen):
        print(found.line(), flush=True)
        survived += found.caught_by is None
    print(f"\n{len(chosen)} mutations, {survived} survived")
    sys.exit(1 if survived or not chosen else 0)


def try_all(mutations: Sequence[Mutation]) -> Iterator[Found]:
    """Try each mutation in one copy of the tree. Exits when the named tests fail without any."""
    with copy_of_the_tree() as copy:
        tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
        status, output = run_tests(copy, tests)
        if status != _PASSED or "skipped" in output.splitlines()[-1]:
            sys.exit(f"the named tests do not all pass without a mutation:\n{output}")
        for mutation in mutations:
            yield try_one(copy, mutation)


def try_one(copy: Path, mutation: Mutation) -> Found:
    began = time.monotonic()
    original = (copy / mutation.file).read_text()
    try:
        mutation.apply(copy)
        status, output = run_tests(copy, mutation.tests)
    except (ValueError, subprocess.TimeoutExpired) as error:
        return Found(mutation=mutation, caught_by=None, seconds=time.monotonic() - began, trouble=str(error)[:200])
    finally:
        (copy / mutation.file).write_text(original)
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    caught_by = failed[1] if failed and status == _FAILED else None
    trouble = "" if caught_by or status == _PASSED else f"(pytest ended with {status}: {output[-300:]})"
    return Found(mutation=mutation, caught_by=caught_by, seconds=time.monotonic() - began, trouble=trouble)


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """A copy with a Python of its own, in whose processes the copy's code comes before the tree's."""
    with tempfile.TemporaryDirectory(prefix="maskfleet-mutations-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
        (copy / ".uv").symlink_to(ROOT / ".uv")  # the Label Studio of the tests
        venv.create(copy / ".venv", symlinks=True)
        own = sysconfig.get_path("purelib", vars={"base": str(copy / ".venv")})
        libraries = sysconfig.get_path("purelib")
        (Path(own) / "copy.pth").write_text(f"{copy}\nimport site; site.addsitedir({libraries!r})\n")
        yield copy


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run tests of the copy. Returns pytest's exit status and output. Nothing compiled stays, as it could be stale."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MASKFLEET_"))}
    for name in ("MASKFLEET_TEST_DATABASE_URL", "MASKFLEET_TEST_REDIS_URL"):
        if name in os.environ:
            environment[name] = os.environ[name]
    command = [str(copy / ".venv" / "bin" / "python"), "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests],
        cwd=copy,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    main()
