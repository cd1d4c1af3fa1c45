"""The bundled store with the AWS command line, by the commands of docs/deployment.md."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.try_deployment.living import SCENES, STORE, finish
from tests.try_deployment.report import Report, expect
from tests.try_deployment.stack import Stack, run

_BUCKET = "albums"
_EXPORTS = f"s3://{_BUCKET}/exports"


def photos_in_and_exports_out(stack: Stack, report: Report) -> None:
    with report.row("the AWS command line, of PyPI") as row:
        row.found = install_aws(stack.out / "aws")
    with report.row("`aws s3 mb`, `aws s3 sync` of a folder") as row:
        aws(stack, "s3", "mb", f"s3://{_BUCKET}")
        # After an empty file botocore and this store wait a minute for each other on that connection.
        aws(stack, "s3", "sync", str(SCENES), f"s3://{_BUCKET}/street", "--exclude", "*empty*")
        stored = aws(stack, "s3", "ls", "--recursive", f"s3://{_BUCKET}/street").splitlines()
        row.found = f"{len(stored)} objects"
        expect(stored, row.found)
    model = ("--model", "sam_nano", "--param", "points_per_side=8")
    job = int(stack.maskfleet("submit", f"s3://{_BUCKET}/street", *model).split()[-1])
    labeled = finish(stack, job)
    with report.row("`export` to a file, `docker compose cp`") as row:
        stack.maskfleet("export", str(job), "--format", "coco", "--out", "/exports/albums.json")
        stack.compose("cp", "dispatch:/exports/albums.json", str(stack.out))
        coco = json.loads((stack.out / "albums.json").read_text())
        row.found = f"{labeled}: {len(coco['images'])} images, {len(coco['annotations'])} annotations"
        expect(len(coco["images"]) == int(labeled.split()[0]), row.found)
    with report.row("`export` to the store, `aws s3 cp` out of it") as row:
        stack.maskfleet("export", str(job), "--format", "parquet", "--out", _EXPORTS)
        aws(stack, "s3", "cp", "--recursive", _EXPORTS, str(stack.out / "exports"))
        row.found = ", ".join(sorted(path.name for path in (stack.out / "exports").rglob("*.parquet")))
        expect(row.found, "no parquet file came out")


def install_aws(folder: Path) -> str:
    """Its version. It gets an environment of its own, because it pins its own botocore."""
    if not (folder / "bin" / "aws").exists():
        run([sys.executable, "-m", "venv", str(folder)])
        run([str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "awscli"])
    return run([str(folder / "bin" / "aws"), "--version"]).strip()


def aws(stack: Stack, *words: str) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "AWS_SHARED_CREDENTIALS_FILE": "secrets/aws-credentials",
        "AWS_ENDPOINT_URL": STORE,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return run([str(stack.out / "aws" / "bin" / "aws"), *words], cwd=stack.tree, env=environment)
