"""A copy of the repository with its own compose project, and the commands that an operator gives there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.try_deployment.report import Unexpected, expect

ROOT = Path(__file__).parents[2]
ONE_SHOT = {"migrate"}
OURS = {"dispatch", "worker", "flower", "publisher", "assist", "board"}
_PROJECT = "maskfleet-trial"

T = TypeVar("T")


class Stack:
    """tree: the copy. old: the commit to begin with, or None. tag, profiles, variables: what stands in .env."""

    def __init__(self, out: Path, *, old: str | None, no_cache: bool) -> None:
        self.out, self.tree, self.old, self.no_cache = out, out / "tree", old, no_cache
        self.tag, self.profiles = "trial", ["s3", "label-studio"]
        self._overrides: list[Path] = []
        self.variables: dict[str, str] = {}
        if not self.tree.exists():
            copy_tree(self.tree)
            run([sys.executable, "infra/make_env.py"], cwd=self.tree)
        if authority := os.environ.get("BUILD_CA"):
            override = self.tree / "trial.yml"
            secrets = {"ca": {"file": str(Path(authority).resolve())}}
            override.write_text(
                json.dumps({"services": {"migrate": {"build": {"secrets": ["ca"]}}}, "secrets": secrets})
            )
            self._overrides.append(override)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MASKFLEET_", "AWS_"))},
            "COMPOSE_PROJECT_NAME": _PROJECT,
            "COMPOSE_PROFILES": ",".join(self.profiles),
            "IMAGE_TAG": self.tag,
            **self.variables,
        }

    def compose(self, *words: str, check: bool = True, stdin: bytes | None = None) -> str:
        """`docker compose WORDS`; its stdout."""
        files = [f"--file={path}" for path in (self.tree / "docker-compose.yml", *self._overrides)]
        return run(["docker", "compose", *files, *words], cwd=self.tree, env=self.environment, check=check, stdin=stdin)

    def add(self, file: str, **variables: str) -> None:
        """Put a compose file of the repository behind the others."""
        self._overrides.append(self.tree / file)
        self.variables |= variables

    def remove(self, file: str) -> None:
        self._overrides.remove(self.tree / file)

    def override(self, text: str | None) -> None:
        """Put one more compose file behind the others, or take it away."""
        file = self.tree / "override.yml"
        self._overrides = [path for path in self._overrides if path != file]
        if text is not None:
            file.write_text(text)
            self._overrides.append(file)

    def up(self, *words: str) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", "600", *words)

    def maskfleet(self, *words: str, codes: tuple[int, ...] = (0,)) -> str:
        """A command in the dispatcher's container; its stdout."""
        files = [f"--file={path}" for path in (self.tree / "docker-compose.yml", *self._overrides)]
        command = ["docker", "compose", *files, "exec", "-T", "dispatch", "maskfleet", *words]
        done = subprocess.run(command, cwd=self.tree, env=self.environment, capture_output=True, text=True, check=False)
        expect(done.returncode in codes, f"{words}: exit {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}")
        return done.stdout

    def show(self, job: int) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.maskfleet("show", str(job), "--json"))
        return shown

    def sql(self, query: str, database: str = "maskfleet") -> str:
        words = ["exec", "-T", "postgres", "psql", "--username=postgres", f"--dbname={database}", "-Atc", query]
        return self.compose(*words).strip()

    def secret(self, name: str) -> str:
        return (self.tree / "secrets" / name).read_text().rstrip("\n")

    def containers(self) -> dict[str, tuple[str, str]]:
        """Of each service that stays: its container's id and when it was started."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found = json.loads(run(["docker", "inspect", *ids])) if ids else []
        labeled = {c["Config"]["Labels"]["com.docker.compose.service"]: c for c in found}
        return {name: (c["Id"][:12], c["State"]["StartedAt"]) for name, c in labeled.items() if name not in ONE_SHOT}

    def health(self) -> dict[str, str]:
        """Of each service that stays: `healthy`, `unhealthy`, `starting`, or what its container is instead."""
        lines = self.compose("ps", "--all", "--format", "json").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        return {c["Service"]: c["Health"] or c["State"] for c in found if c["Service"] not in ONE_SHOT}

    def wait_healthy(self, seconds: float = 300) -> None:
        wait_until(lambda: set(self.health().values()) == {"healthy"}, lambda: f"not healthy: {self.health()}", seconds)


def run(
    command: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    check: bool = True,
    stdin: bytes | None = None,
) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, check=False)
    said = f"{done.stdout.decode(errors='replace')[-600:]} {done.stderr.decode(errors='replace')[-2000:]}"
    expect(done.returncode == 0 or not check, f"{' '.join(command)[:300]}: exit {done.returncode}: {said}")
    return done.stdout.decode(errors="replace")


def copy_tree(target: Path) -> None:
    """The files that git knows or would take, as they are now."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def wait_until(condition: Callable[[], T], said: Callable[[], str], seconds: float) -> T:
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > give_up_at:
            raise Unexpected(f"after {seconds:.0f} s: {said()}")
        time.sleep(1)
    return found
