"""A second machine: a worker alone, in networks of its own, that reaches Postgres and Redis over TLS alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.try_deployment.living import finish, submit, upload
from tests.try_deployment.report import Report, expect
from tests.try_deployment.stack import Stack, run

_HEAD_NAME = "head.trial"
_WORKER_HOST = "machine-2"


def join_a_worker_over_tls(stack: Stack, report: Report) -> None:
    address, tls = own_address(), stack.out / "tls"
    make_certificates(tls)
    stack.add("infra/head.yml", HEAD_ADDRESS=address, TLS_DIR=str(tls))
    # The bundled store stays on loopback; for this trial alone the other machine reaches it too.
    stack.override(json.dumps({"services": {"s3": {"ports": [f"{address}:8333:8333"]}}}))
    try:
        with report.row("`infra/head.yml`: `up --wait --scale worker=0`"):
            stack.up("--scale", "worker=0")
        with report.row("`infra/worker.yml`: `up --wait` in other networks") as row:
            machine(stack, address, "up", "--detach", "--wait", "--wait-timeout", "300")
            workers = next(f for f in json.loads(stack.maskfleet("doctor", "--json")) if f["what"] == "workers")
            row.found = workers["found"]
            expect(_WORKER_HOST in row.found, row.found)
        with report.row("a job that only the other machine can do") as row:
            upload(stack, "joined", copies=1)
            row.found = finish(stack, submit(stack, "joined"))
        with report.row("Postgres and Redis without TLS from outside") as row:
            row.found = refusals(stack, address)
        with report.row("the machine taken away (`down`)") as row:
            machine(stack, address, "down")
            row.found = "drained"
    finally:
        machine(stack, address, "down", "--volumes", check=False)
        stack.remove("infra/head.yml")
        stack.override(None)
        stack.up()


def machine(stack: Stack, address: str, *words: str, check: bool = True) -> None:
    """`docker compose WORDS` on the machine that only works."""
    secrets = stack.out / "machine" / "secrets"
    secrets.mkdir(parents=True, exist_ok=True)
    suffixes = {
        "database-url": f"@{_HEAD_NAME}:5432/maskfleet?sslmode=verify-full&sslrootcert=/run/secrets/ca.crt",
        "broker-url": f"@{_HEAD_NAME}:6380/0?ssl_ca_certs=/run/secrets/ca.crt",
    }
    for name, suffix in suffixes.items():
        user = stack.secret(name).rpartition("@")[0].replace("redis://", "rediss://")
        (secrets / name).write_text(f"{user}{suffix}\n")
    (secrets / "aws-credentials").write_text(stack.secret("aws-credentials") + "\n")
    (secrets / "ca.crt").write_bytes((stack.out / "tls" / "ca.crt").read_bytes())
    # The trial has no DNS server that knows the head's name.
    name = secrets.parent / "name.yml"
    name.write_text(json.dumps({"services": {"worker": {"extra_hosts": [f"{_HEAD_NAME}:{address}"]}}}))
    environment = {
        **stack.environment,
        "COMPOSE_PROJECT_NAME": "maskfleet-trial-machine",
        "COMPOSE_PROFILES": "",
        "SECRETS_DIR": str(secrets),
        "WORKER_HOST": _WORKER_HOST,
        "MASKFLEET_S3_ENDPOINT": f"http://{address}:8333",
    }
    files = ["--file=infra/worker.yml", f"--file={name}"]
    run(["docker", "compose", *files, *words], cwd=stack.tree, env=environment, check=check)


def refusals(stack: Stack, address: str) -> str:
    """What happens to a password over a connection without TLS."""
    url = stack.secret("database-url").rpartition("@")[0] + f"@{address}:5432/maskfleet?sslmode=disable"
    program = f"import psycopg2\ntry: psycopg2.connect({url!r})\nexcept Exception as e: print(str(e).splitlines()[0])"
    said = stack.compose("exec", "-T", "dispatch", "python", "-c", program).strip()
    expect("no encryption" in said, said)
    with socket.create_connection((address, 6380), timeout=10) as plain:
        try:
            plain.sendall(b"PING\r\n")
            answer = plain.recv(100)
        except ConnectionResetError:
            answer = b""
    expect(b"PONG" not in answer and b"NOAUTH" not in answer, answer)
    return f"Postgres: {said}; Redis closes the connection"


def own_address() -> str:
    """An address of this machine that containers reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; it asks for the way there
        return str(probe.getsockname()[0])


def make_certificates(folder: Path) -> None:
    """As docs/deployment.md makes them."""
    folder.mkdir(parents=True, exist_ok=True)

    def openssl(*words: str, stdin: str = "") -> None:
        run(["openssl", *words], cwd=folder, stdin=stdin.encode())

    ca = ["req", "-x509", "-newkey", "rsa:3072", "-nodes", "-days", "3650", "-subj", "/CN=maskfleet authority"]
    openssl(*ca, "-keyout", "ca.key", "-out", "ca.crt")
    server = ["req", "-newkey", "rsa:3072", "-nodes", "-subj", f"/CN={_HEAD_NAME}"]
    openssl(*server, "-keyout", "server.key", "-out", "server.csr")
    sign = ["x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "825"]
    openssl(*sign, "-extfile", "/dev/stdin", "-out", "server.crt", stdin=f"subjectAltName=DNS:{_HEAD_NAME}\n")
    key = "chown 999 /tls/server.key && chmod 0400 /tls/server.key"
    image = "postgres:18.3-bookworm"
    run(["docker", "run", "--rm", "--user=0", "--entrypoint=sh", f"--volume={folder}:/tls", image, "-c", key])
