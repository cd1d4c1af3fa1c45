"""The image: how long it takes, how large it is, what a changed line costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.try_deployment.report import Report, expect
from tests.try_deployment.stack import OURS, Stack, run

_CHANGED = "orchestrator/__init__.py"


def build(stack: Stack, report: Report) -> None:
    with report.row("build, without a cache" if stack.no_cache else "build, the first time here") as row:
        stack.compose("build", *(["--no-cache"] if stack.no_cache else []), "migrate")
        row.found = sizes(image(stack))
    with report.row("build again, nothing changed") as row:
        before = image_id(stack)
        stack.compose("build", "migrate")
        expect(image_id(stack) == before, "another image came out")
        row.found = "the same image"


def change_a_line(stack: Stack, report: Report) -> None:
    """A change of our code ships megabytes and restarts our services alone."""
    before, layers = stack.containers(), layers_of(stack)
    run(["docker", "tag", image(stack), "maskfleet:trial-before"])
    file = stack.tree / _CHANGED
    file.write_text(f"{file.read_text()}\n# A changed line, {image_id(stack)[-12:]}\n")
    with report.row("build after a one-line change") as row:
        stack.compose("build", "migrate")
        new = [digest for digest in layers_of(stack) if digest not in layers]
        code = layer_bytes(image(stack))["our code"]
        row.found = f"{len(new)} new layer(s), {code / 1e6:.1f} MB"
        expect(len(new) == 1 and code < 20e6, row.found)
    with report.row("`up --build` after it") as row:
        stack.up("--build")
        after = stack.containers()
        restarted = {name for name in after if after[name] != before.get(name)}
        row.found = f"restarted: {', '.join(sorted(restarted))}"
        expect(restarted == OURS & after.keys(), row.found)
    with report.row("the way back without new tables: the tag of before, `up`") as row:
        stack.tag = "trial-before"
        stack.up()
        restarted = {name for name, now in stack.containers().items() if now != after[name]}
        row.found = f"restarted: {', '.join(sorted(restarted))}"
        expect(restarted == OURS & after.keys(), row.found)
    stack.tag = "trial"


def image(stack: Stack) -> str:
    return f"maskfleet:{stack.tag}"


def image_id(stack: Stack) -> str:
    return run(["docker", "image", "inspect", "--format", "{{.Id}}", image(stack)]).strip()


def layers_of(stack: Stack) -> list[str]:
    """The digests of its layers, which a registry stores once."""
    layers: list[str] = json.loads(
        run(["docker", "image", "inspect", "--format", "{{json .RootFS.Layers}}", image(stack)])
    )
    return layers


def layer_bytes(name: str) -> dict[str, int]:
    history = run(["docker", "history", "--human=false", "--no-trunc", "--format", "{{.Size}} {{.CreatedBy}}", name])
    return {
        what: next((int(line.split()[0]) for line in history.splitlines() if re.search(pattern, line)), 0)
        for what, pattern in {"dependencies": r"COPY /app/\.venv", "our code": r"COPY /app/code"}.items()
    }


def sizes(name: str) -> str:
    total = int(run(["docker", "image", "inspect", "--format", "{{.Size}}", name]))
    return f"{total / 1e9:.2f} GB: " + ", ".join(f"{what} {n / 1e6:,.1f} MB" for what, n in layer_bytes(name).items())


def has_secret(stack: Stack) -> list[str]:
    """Places outside of the files that show a secret."""
    secrets = set()
    for path in (stack.tree / "secrets").iterdir():
        secrets |= set(re.findall(r"(?<!aws_access_key_id = )[0-9a-f]{40}", path.read_text()))  # an id is a name
    ids = stack.compose("ps", "--all", "--quiet").split()
    shown = {
        "docker inspect": run(["docker", "inspect", *ids]),
        "docker compose config": stack.compose("config"),
        "docker history": run(["docker", "history", "--no-trunc", image(stack)]),
        "docker compose logs": stack.compose("logs", "--no-color"),
        "processes": "\n".join(run(["docker", "top", i, "-eo", "args"], check=False) for i in ids),
        ".env": Path(stack.tree / ".env").read_text(),
    }
    return [place for place, text in shown.items() if any(secret in text for secret in secrets)]
