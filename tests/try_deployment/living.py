"""A deployment's ordinary life: it comes up, works, is not touched without a reason, and outlives each service."""

from __future__ import annotations

import time

import boto3

from tests.try_deployment.building import has_secret
from tests.try_deployment.report import Report, expect
from tests.try_deployment.stack import ROOT, Stack, wait_until

BUCKET = "photos"
STORE = "http://127.0.0.1:8333"
SCENES = ROOT / "orchestrator" / "scenes"


def come_up(stack: Stack, report: Report) -> None:
    with report.row("`up --build --wait`, from empty volumes" if not stack.old else "`up` with this version") as row:
        stack.up("--build")
        row.found = f"{len(stack.containers())} services healthy"
    with report.row("`maskfleet doctor`"):
        stack.maskfleet("doctor")
    with report.row("secrets outside of their files") as row:
        places = has_secret(stack)
        row.found = ", ".join(places) or "none in `docker inspect`, `compose config`, `history`, logs, processes, .env"
        expect(not places, row.found)


def stay_untouched(stack: Stack, report: Report) -> None:
    before = stack.containers()
    for words in (["--build"], ["--build"], []):
        with report.row(f"`{' '.join(['up', *words])}` again") as row:
            stack.up(*words)
            touched = {name for name, now in stack.containers().items() if now != before[name]}
            row.found = f"restarted: {', '.join(sorted(touched)) or 'nothing'}"
            expect(not touched, row.found)


def survive_kills(stack: Stack, report: Report) -> None:
    """One job through the crash of each service: kill -9 of everything in the container, which its policy restarts."""
    with report.row("photos into the bundled bucket") as row:
        row.found = f"{upload(stack, 'street', copies=5)} objects"
    job = submit(stack, "street")
    for name in ("worker", "redis", "dispatch", "postgres", "s3", "flower", "label-studio"):
        with report.row(f"kill -9 in `{name}`") as row:
            before = stack.containers()[name]
            stack.compose("exec", "-T", name, "sh", "-c", "kill -9 -1", check=False)
            wait_until(lambda n=name, b=before: stack.containers()[n] != b, lambda: "it was not restarted", 60)
            stack.wait_healthy()
            row.found = f"restarted and healthy; {progress(stack, job)}"
    with report.row("Postgres stopped for 20 s") as row:
        stack.compose("stop", "postgres")
        time.sleep(20)
        stack.compose("start", "postgres")
        stack.wait_healthy()
        row.found = progress(stack, job)
    with report.row("worker restarted (SIGTERM)") as row:
        stack.compose("restart", "worker")
        row.found = progress(stack, job)
    with report.row("the job's end") as row:
        row.found = finish(stack, job)


def replace_a_frozen_worker(stack: Stack, report: Report) -> None:
    """Celery's main process alone is frozen: the container's command still beats."""
    with report.row("Celery's main process frozen (SIGSTOP)") as row:
        program = (
            "import glob, os, signal\n"
            "for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
            "    words = open(path, 'rb').read().split(b'\\0')\n"
            "    if b'workers.running.app' in words:\n"
            "        os.kill(int(path.split('/')[2]), signal.SIGSTOP)\n"
        )
        stack.compose("exec", "-T", "worker", "python", "-c", program)
        job = submit(stack, "street", "--fresh", "--limit", "5")
        wait_until(
            lambda: "its event loop stood still" in stack.compose("logs", "worker"), lambda: "it was not ended", 400
        )
        row.found = f"ended and started again; a job that waited: {finish(stack, job)}"


def upload(stack: Stack, prefix: str, copies: int) -> int:
    """Put the sample scenes, with those that must fail, into the bundled store through its published port."""
    keys = dict(line.split(" = ") for line in stack.secret("aws-credentials").splitlines() if " = " in line)
    client = boto3.session.Session(region_name="us-east-1", **keys).client("s3", endpoint_url=STORE)
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    files = [path for path in sorted(SCENES.rglob("*")) if path.is_file()]
    for copy in range(copies):
        for path in files:
            client.upload_file(str(path), BUCKET, f"{prefix}/{copy}/{path.relative_to(SCENES)}")
    return copies * len(files)


def submit(stack: Stack, prefix: str, *words: str, points: int = 8) -> int:
    """Few points a side, because the trial is about what surrounds the model. `--include *` takes what must fail."""
    model = ("--model", "sam_nano", "--param", f"points_per_side={points}", "--include", "*")
    return int(stack.maskfleet("submit", f"s3://{BUCKET}/{prefix}", *model, *words, codes=(0, 1)).split()[-1])


def progress(stack: Stack, job: int) -> str:
    assets = stack.show(job)["assets"]
    return f"{assets['labeled'] + assets['failed']} of {assets['listed']} done"


def finish(stack: Stack, job: int, seconds: float = 1200) -> str:
    """Wait for the job, and count in SQL: each asset has one outcome."""
    wait_until(lambda: stack.show(job)["state"] == "done", lambda: progress(stack, job), seconds)
    assets = stack.show(job)["assets"]
    counted = stack.sql(
        "SELECT count(*), count(o.asset_id), count(DISTINCT o.asset_id) FROM asset a "
        f"LEFT JOIN outcome o ON o.asset_id = a.id WHERE a.job_id = {job}"
    )
    listed, outcomes, different = (int(n) for n in counted.split("|"))
    expect(listed == outcomes == different == assets["listed"], f"{counted}: expected one outcome an asset")
    return f"{assets['labeled']} labeled + {assets['failed']} failed = {listed} listed, one outcome each"
