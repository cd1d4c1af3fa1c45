"""Writes what a new deployment needs beside docker-compose.yml: .env, and a file for each secret in secrets/.

What exists is not changed, because the databases' volumes have its passwords. A secret that an older .env still holds
goes into its file. To renew one, delete its file and the files with addresses made of it, and run this again: see
"Renew a secret" in docs/deployment.md. Needs only Python.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).parent.parent
EXAMPLE = Path(__file__).parent / "env.example"
# What the secret was called in .env before it had a file.
OLD_NAMES = {
    "postgres-password": "POSTGRES_PASSWORD",
    "database-password": "DATABASE_PASSWORD",
    "label-studio-database-password": "LABEL_STUDIO_DATABASE_PASSWORD",
    "redis-password": "REDIS_PASSWORD",
    "assist-password": "ASSIST_PASSWORD",
    "board-password": "BOARD_PASSWORD",
    "label-studio-password": "LABEL_STUDIO_PASSWORD",
    "label-studio-token": "LABEL_STUDIO_USER_TOKEN",
}
OLD_PAIRS = ("FLOWER_USER", "FLOWER_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def read_env(path: Path) -> dict[str, str]:
    """The variables of a .env file that have a value."""
    if not path.exists():
        return {}
    lines = (line.partition("=") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {name: value.strip("\"'") for name, _, value in lines if value}


def write_secrets(folder: Path, known: dict[str, str]) -> list[str]:
    """Write the files that are missing. Returns their names.

    Only the folder's owner can enter the folder. The files can be read by all, because compose shows each to
    containers of other users, and to those alone that name it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    written = []

    def keep(name: str, value: str) -> None:
        if not (folder / name).exists():
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(file, "w") as secret:
                secret.write(f"{value}\n")
            (folder / name).chmod(0o444)
            written.append(name)

    for name, old_name in OLD_NAMES.items():
        keep(name, known.get(old_name) or secrets.token_hex(20))
    database, redis = (
        quote((folder / f"{of}-password").read_text().rstrip("\n"), safe="") for of in ("database", "redis")
    )
    keep("database-url", f"postgresql://maskfleet:{database}@postgres:5432/maskfleet")
    keep("broker-url", f"redis://:{redis}@redis:6379/0")
    keep("flower-auth", f"{known.get('FLOWER_USER', 'flower')}:{known.get('FLOWER_PASSWORD') or secrets.token_hex(20)}")
    keep("aws-credentials", aws_credentials(known))
    return written


def aws_credentials(known: dict[str, str]) -> str:
    """The text of an AWS credentials file. The bundled store knows exactly this pair."""
    pair = {
        "aws_access_key_id": known.get("AWS_ACCESS_KEY_ID") or secrets.token_hex(20),
        "aws_secret_access_key": known.get("AWS_SECRET_ACCESS_KEY") or secrets.token_hex(20),
    }
    if token := known.get("AWS_SESSION_TOKEN"):
        pair["aws_session_token"] = token
    return "\n".join(["[default]", *(f"{name} = {value}" for name, value in pair.items())])


def main() -> int:
    """Returns 0 when something was written, 2 when everything was there or an argument was given."""
    if sys.argv[1:]:
        say(f"{__doc__}\nTakes no arguments.")
        return 2
    env, folder = ROOT / ".env", ROOT / "secrets"
    known = read_env(env)
    written = [f"{folder.name}/{name}" for name in write_secrets(folder, known)]
    if not env.exists():
        shutil.copyfile(EXAMPLE, env)
        written.append(env.name)
    if not written:
        say(f"{env} and {folder} are there, and nothing is changed: their passwords are in the volumes")
        return 2
    say(f"wrote {', '.join(written)}")
    if moved := sorted(known.keys() & {*OLD_NAMES.values(), *OLD_PAIRS}):
        say(f"nothing reads these in {env} any more, so delete the lines: {', '.join(moved)}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
