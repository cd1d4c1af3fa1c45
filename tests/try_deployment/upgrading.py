"""From one version to the next while workers run, and from a dump into fresh volumes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.try_deployment.living import finish, progress, submit, upload
from tests.try_deployment.report import Report, Unexpected, expect
from tests.try_deployment.reviewing import task_ids
from tests.try_deployment.stack import ROOT, Stack, run, wait_until

_OURS = ("db", "workers", "orchestrator")


def begin_with_the_old(stack: Stack, report: Report) -> None:
    """The old version begins a job; the new one finishes it; then the way back."""
    try:
        job = begin(stack, report)
        dumps = back_up(stack, report, "before")
        upgrade(stack, report, job)
        roll_back(stack, report, job, dumps)
    finally:
        use_new(stack)


def use_old(stack: Stack) -> None:
    stack.tag = "trial-old"
    if not (stack.out / "old" / "db" / "secret_files.py").exists():
        stack.override(addresses_in_the_environment(stack))


def use_new(stack: Stack) -> None:
    stack.tag = "trial"
    stack.override(None)


def begin(stack: Stack, report: Report) -> int:
    """The old version's code with today's libraries makes the tables and begins a job."""
    tree = stack.out / "old"
    with report.row(f"image with the code of {stack.old}") as row:
        copy_with_old_code(stack.tree, tree, str(stack.old))
        run(["docker", "build", "--file", "infra/Dockerfile", "--tag", "maskfleet:trial-old", "."], cwd=tree)
        row.found = "on today's dependencies"
    use_old(stack)
    with report.row("`up --wait` of it, from empty volumes") as row:
        stack.up()
        row.found = f"migration {migration(stack)}"
    upload(stack, "upgrade", copies=3)
    job = submit(stack, "upgrade")
    wait_until(lambda: done(stack, job) > 3, lambda: progress(stack, job), 300)
    return job


def upgrade(stack: Stack, report: Report, job: int) -> None:
    """New tables come under the workers of the old version."""
    use_new(stack)  # of the running containers nothing changes
    with report.row("the new version's tables under it (`run --rm migrate`)") as row:
        before, at_first = migration(stack), done(stack, job)
        stack.compose("run", "--rm", "--no-deps", "migrate")
        wait_until(lambda: done(stack, job) > at_first + 3, lambda: f"{done(stack, job)} done", 300)
        row.found = f"{before} -> {migration(stack)}; the old workers went on: {at_first}, then {done(stack, job)} done"
    with report.row("`up --wait` of the new version, the job half done") as row:
        stack.up()
        row.found = finish(stack, job)


def roll_back(stack: Stack, report: Report, job: int, dumps: dict[str, Path]) -> None:
    """The old tag alone is refused, because its code does not know the tables. With the dump it works."""
    use_old(stack)
    with report.row("`up` with the old tag alone") as row:
        row.found = refused_up(stack)
    with report.row("the way back: the dump of before, then `up` with the old tag") as row:
        put_back(stack, dumps["maskfleet"])
        at_first = done(stack, job)
        row.found = f"migration {migration(stack)}; the job from {at_first} done to {finish(stack, job)}"


def refused_up(stack: Stack) -> str:
    """What `up` and `migrate` say, and which services are left."""
    try:
        stack.up()
    except Unexpected as error:
        said = str(error).splitlines()[-1]
    else:
        raise Unexpected("the old code came up on tables that it does not know")
    [why] = stack.compose("logs", "--no-log-prefix", "--tail=1", "migrate").splitlines()
    return f"{said}; {why}; {stack.health()}"


def restore_into_fresh_volumes(stack: Stack, report: Report) -> None:
    counts = "SELECT (SELECT count(*) FROM outcome), (SELECT count(*) FROM mask), (SELECT count(*) FROM ls_task)"
    before = stack.sql(counts)
    dumps = back_up(stack, report, "all")
    with report.row("restored into fresh volumes of Postgres and Redis") as row:
        restore(stack, dumps)
        row.found = f"outcomes, masks, tasks: {stack.sql(counts)}"
        expect(stack.sql(counts) == before, f"{row.found}, expected {before}")
    with report.row("a job after it, and `publish` again") as row:
        job = submit(stack, "street", "--limit", "20")
        row.found = finish(stack, job)
        expect(stack.show(job)["assets"]["reused"] > 0, "nothing was answered from the stored masks")
        published, project = stack.sql(
            "SELECT p.job_id, t.project_id FROM ls_prediction p JOIN ls_task t ON t.id = p.ls_task_id "
            "ORDER BY p.job_id LIMIT 1"
        ).split("|")
        there = len(task_ids(stack, int(project)))
        answer = json.loads(stack.maskfleet("publish", published, "--project", project, "--json"))
        tasks = len(task_ids(stack, int(project)))
        row.found += f"; publish made {answer['created']} tasks, Label Studio has {there}, then {tasks}"
        expect(there and not answer["created"] and tasks == there, row.found)


def back_up(stack: Stack, report: Report, name: str) -> dict[str, Path]:
    """The dump of each database, by its name."""
    dumps = {database: stack.out / f"{name}-{database}.dump" for database in ("maskfleet", "label_studio")}
    with report.row("back-up (`pg_dump` of both databases)") as row:
        for database, path in dumps.items():
            dump(stack, database, path)
        row.found = f"{sum(path.stat().st_size for path in dumps.values()) / 1e6:.1f} MB"
    return dumps


def restore(stack: Stack, dumps: dict[str, Path]) -> None:
    """Into fresh volumes of Postgres and Redis. All services come up on them."""
    stack.compose("down", "--timeout", "60")
    for volume in ("postgres", "redis"):
        run(["docker", "volume", "rm", f"maskfleet-trial_{volume}"])
    stack.up("postgres")
    for name, path in dumps.items():
        pg_restore(stack, name, path)
    stack.up()


def put_back(stack: Stack, dumped: Path) -> None:
    """The dump's tables in the place of newer ones. Label Studio's database stays as it is."""
    stack.compose("stop", "dispatch", "worker", "flower")
    empty = ["-c", "DROP SCHEMA public CASCADE", "-c", "CREATE SCHEMA public AUTHORIZATION pg_database_owner"]
    stack.compose("exec", "-T", "postgres", "psql", "--username=postgres", "--dbname=maskfleet", *empty)
    pg_restore(stack, "maskfleet", dumped)
    flush = "REDISCLI_AUTH=$(cat /run/secrets/redis-password) redis-cli FLUSHDB"
    stack.compose("exec", "-T", "redis", "sh", "-c", flush)
    stack.up()


def pg_restore(stack: Stack, name: str, dumped: Path) -> None:
    words = ["--no-owner", f"--role={name}", "--exit-on-error", "--username=postgres", f"--dbname={name}"]
    stack.compose("exec", "-T", "postgres", "pg_restore", *words, stdin=dumped.read_bytes())


def copy_with_old_code(new: Path, target: Path, commit: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(new, target, ignore=shutil.ignore_patterns("secrets", ".env", *_OURS))
    archive = subprocess.run(["git", "archive", commit, *_OURS], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)


def addresses_in_the_environment(stack: Stack) -> str:
    """A compose file for versions that read no secret from a file."""
    keys = dict(line.split(" = ") for line in stack.secret("aws-credentials").splitlines() if " = " in line)
    broker = {"MASKFLEET_BROKER_URL": stack.secret("broker-url")}
    database = {"MASKFLEET_DATABASE_URL": stack.secret("database-url")}
    variables = {**broker, **database, **{name.upper(): value for name, value in keys.items()}}
    environments = {"migrate": variables, "dispatch": variables, "worker": variables, "flower": broker}
    return json.dumps({"services": {name: {"environment": of} for name, of in environments.items()}})


def migration(stack: Stack) -> str:
    return stack.sql("SELECT version_num FROM alembic_version")


def done(stack: Stack, job: int) -> int:
    """Outcomes in SQL, because the commands of another version refuse the tables."""
    query = f"SELECT count(*) FROM outcome o JOIN asset a ON a.id = o.asset_id WHERE a.job_id = {job}"
    return int(stack.sql(query))


def dump(stack: Stack, name: str, path: Path) -> None:
    words = ["exec", "-T", "postgres", "pg_dump", "--username=postgres", "--format=custom", name]
    command = ["docker", "compose", f"--file={stack.tree / 'docker-compose.yml'}", *words]
    with path.open("wb") as file:
        code = subprocess.run(command, cwd=stack.tree, env=stack.environment, stdout=file, check=False).returncode
    expect(code == 0 and path.stat().st_size > 0, f"pg_dump of {name}: exit {code}")
