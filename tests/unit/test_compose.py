"""docker-compose.yml, its overlays, its variables and its two small programs."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from flower import options as flower_options

from db.settings import Settings
from db.states import ProcessKind
from workers.running import devices

ROOT = Path(__file__).parents[2]
BASE = ROOT / "docker-compose.yml"
GPU_OVERLAYS = [ROOT / "infra" / "gpu.yml", ROOT / "infra" / "gpu-per-device.yml"]
HEAD = ROOT / "infra" / "head.yml"
OWN_POSTGRES = ROOT / "infra" / "own-postgres.yml"
OVERLAYS = [*GPU_OVERLAYS, HEAD, OWN_POSTGRES]
WORKER_ALONE = ROOT / "infra" / "worker.yml"
FILES = [BASE, *OVERLAYS, WORKER_ALONE]
EXAMPLE = ROOT / "infra" / "env.example"
SERVICES = yaml.safe_load(BASE.read_text())["services"]
OURS = ["migrate", "dispatch", "worker", "publisher", "assist", "board", "flower"]
ONE_SHOT = {"migrate"}
WRITES_INTO_ITSELF = {"label-studio"}

every_service = pytest.mark.parametrize("name", SERVICES)


def test_the_deployment_has_every_part():
    assert SERVICES.keys() == {"postgres", "redis", "s3", *OURS, "label-studio"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_key_stands_twice(path):
    """PyYAML takes the last of two; docker compose refuses the file."""
    mappings = [yaml.compose(path.read_text())]
    while mappings:
        node = mappings.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if key.value != "<<"]
            assert len(keys) == len(set(keys)), keys
            mappings += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            mappings += node.value


@every_service
def test_a_service_says_whether_it_is_well(name):
    check = SERVICES[name]["healthcheck"]

    if name in ONE_SHOT:
        assert check == {"disable": True}
    else:
        assert check["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= check.keys()


@every_service
def test_a_service_is_no_root_and_cannot_become_it(name):
    service = SERVICES[name]

    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is (name not in WRITES_INTO_ITSELF)
    assert "privileged" not in service


@every_service
def test_a_service_restarts_and_keeps_its_logs_memory_and_cores_bounded(name):
    service = SERVICES[name]

    assert service["restart"] == ("on-failure:5" if name in ONE_SHOT else "unless-stopped")
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    # Docker Compose refuses a service that has `pids_limit` beside these.
    limits = service["deploy"]["resources"]["limits"]
    assert limits.keys() == {"memory", "pids", "cpus"}
    assert re.fullmatch(r"\$\{[A-Z_]+_CPUS:-0\}", limits["cpus"])
    assert "pids_limit" not in service


@every_service
def test_an_image_is_pinned(name):
    repository, _, tag = SERVICES[name]["image"].partition(":")

    assert re.search(r"\d", tag), f"{repository} has no version"
    if name in OURS:
        assert (repository, tag) == ("maskfleet", f"${{IMAGE_TAG:-{_project_version()}}}")


@every_service
def test_only_loopback_is_published_and_only_from_the_edge(name):
    service = SERVICES[name]

    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not service.get("ports") or "edge" in service["networks"]


@every_service
def test_a_service_waits_for_what_it_needs(name):
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
        assert how["condition"] == expected
        # What a profile leaves out is waited for only where it runs.
        assert how.get("required", True) is ("profiles" not in SERVICES[needed])


def test_databases_and_queues_lead_nowhere_outside():
    networks = yaml.safe_load(BASE.read_text())["networks"]

    assert networks["database"] == networks["broker"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert SERVICES["redis"]["networks"] == ["broker"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_environment_holds_a_secret(path):
    """`docker inspect` shows the environment and the command. A secret is in a file, whose path they may name."""
    secret = re.compile(r"PASSWORD|TOKEN|SECRET|ACCESS_KEY|BASIC_AUTH|_AUTH$|CREDENTIALS|(DATABASE|BROKER)_URL")
    of_no_secret = {"LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN", "SECRETS_DIR", "AWS_WEB_IDENTITY_TOKEN_FILE"}

    variables = set(re.findall(r"(?<!\$)\$\{(\w+)", path.read_text())) - of_no_secret
    assert [name for name in variables if secret.search(name)] == []
    for service in yaml.safe_load(path.read_text())["services"].values():
        for name, value in service.get("environment", {}).items():
            if secret.search(name) and name not in of_no_secret:
                assert name.endswith("_FILE")
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_each_secret_has_a_file_that_make_env_writes_and_a_service_sees_those_that_it_reads(tmp_path):
    text = BASE.read_text()
    declared = yaml.safe_load(text)["secrets"]
    written = {path.name for path in (_make_env(tmp_path) / "secrets").iterdir()}

    assert declared == {name: {"file": f"${{SECRETS_DIR:-./secrets}}/{name}"} for name in written}
    programs = {
        "postgres": (ROOT / "infra" / "postgres" / "roles.sh").read_text(),
        "label-studio": (ROOT / "infra" / "label-studio" / "start.sh").read_text(),
    }
    for name, service in SERVICES.items():
        said = f"{service} {programs.get(name, '')}"
        read = set(re.findall(r"/run/secrets/([a-z-]+)", said)) | set(re.findall(r"\$\(secret ([a-z-]+)\)", said))
        assert set(service["secrets"]) == read, name


def test_the_broker_keeps_what_it_was_given():
    command = SERVICES["redis"]["command"][0]

    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "requirepass $$(cat /run/secrets/redis-password)" in command


def test_every_variable_is_explained_and_every_explained_one_is_used():
    written = "".join(path.read_text() for path in FILES)
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", written)) | _handed_on() | {"COMPOSE_PROFILES"}
    explained = set(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]*)=", EXAMPLE.read_text()))

    assert used == explained


def test_maskfleet_variables_are_the_settings():
    fields = {f"MASKFLEET_{name.upper()}" for name in Settings.model_fields}
    written = "".join(path.read_text() for path in [EXAMPLE, *FILES])
    found = re.findall(r"MASKFLEET_[A-Z0-9_]+", written)

    assert {name.removesuffix("_FILE") for name in found} == fields


def test_the_defaults_shown_are_the_defaults():
    for name, value in re.findall(r"(?m)^#MASKFLEET_([A-Z0-9_]+)=(\S+)$", EXAMPLE.read_text()):
        default = Settings.model_fields[name.lower()].default
        if default is not None:
            assert getattr(Settings(**{name.lower(): value}), name.lower()) == default, name


def test_the_settings_of_an_unchanged_deployment_are_valid(monkeypatch, tmp_path):
    secrets = _make_env(tmp_path) / "secrets"
    for name, value in SERVICES["dispatch"]["environment"].items():
        if name.startswith("MASKFLEET_") and value is not None:
            default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
            monkeypatch.setenv(name, default.replace("/run/secrets", str(secrets)))

    made = Settings()

    assert made.database_url is not None
    address = f"postgresql://maskfleet:{(secrets / 'database-password').read_text().strip()}@postgres:5432/maskfleet"
    assert made.database_url.get_secret_value() == address
    assert str(made.weights_dir) == "/weights"


def test_a_stopping_worker_has_the_time_to_drain():
    grace = SERVICES["worker"]["stop_grace_period"]

    assert float(grace.removesuffix("s")) > Settings.model_fields["drain_seconds"].default


def test_the_health_checks_look_for_what_runs():
    kinds = {"dispatch": ProcessKind.DISPATCHER, "publisher": ProcessKind.PUBLISHER, "worker": ProcessKind.WORKER}
    for name, kind in kinds.items():
        argument, said = SERVICES[name]["healthcheck"]["test"][-2:]
        assert argument in SERVICES[name]["command"] or name == "worker"
        assert said == kind
    assert SERVICES["worker"]["healthcheck"]["test"][-2] == "workers.running.app"
    assert '"workers.running.app"' in Path(devices.__file__).read_text()
    argument, address = SERVICES["flower"]["healthcheck"]["test"][-2:]
    assert argument in SERVICES["flower"]["entrypoint"][2].split()
    assert f"--port={urlsplit(address).port}" in SERVICES["flower"]["command"]


def test_one_service_builds_the_image_and_the_others_take_it():
    """If several built it, each `up --build` would restart all of them: compose labels an image with its service."""
    assert [name for name in OURS if "build" in SERVICES[name]] == ["migrate"]
    assert all(SERVICES[name]["pull_policy"] == "${IMAGE_PULL_POLICY:-never}" for name in OURS)


def test_profiles_leave_out_what_others_have_and_env_starts_what_a_new_deployment_needs():
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}

    assert profiles == {
        "s3": ["s3"],
        "label-studio": ["label-studio"],
        "publisher": ["publish"],
        "assist": ["assist"],
        "board": ["board"],
    }
    assert "\nCOMPOSE_PROFILES=s3,label-studio\n" in EXAMPLE.read_text()


def test_keys_of_aws_may_be_left_to_a_role_but_the_bundled_store_needs_them():
    for name in ("dispatch", "worker", "publisher", "label-studio"):
        assert SERVICES[name]["environment"]["AWS_SHARED_CREDENTIALS_FILE"] == "/run/secrets/aws-credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert f"$${{{name}:?" in SERVICES["s3"]["command"][0]


def test_flower_knows_its_options_and_only_watches():
    given = dict(option.removeprefix("--").split("=") for option in SERVICES["flower"]["command"])

    assert given.keys() <= {name.replace("-", "_") for name in flower_options.options}
    assert given["read_only"] == "True"
    assert "basic_auth" not in given
    assert "FLOWER_UNAUTHENTICATED_API" not in SERVICES["flower"]["environment"]


@pytest.mark.parametrize("overlay", GPU_OVERLAYS, ids=lambda path: path.stem)
def test_a_gpu_is_chosen_in_one_place_only(overlay):
    for service in yaml.safe_load(overlay.read_text())["services"].values():
        assert "CUDA_VISIBLE_DEVICES" not in service.get("environment", {})
        assert "CUDA_VISIBLE_DEVICES" not in SERVICES["worker"]["environment"]
        for device in service["deploy"].get("resources", {}).get("reservations", {}).get("devices", []):
            assert ("count" in device) != ("device_ids" in device)
            assert {"gpu", "utility"} <= set(device["capabilities"])


def test_the_image_is_not_roots_and_takes_what_is_locked():
    dockerfile = (ROOT / "infra" / "Dockerfile").read_text()

    assert "USER 10001:10001" in dockerfile
    assert all(SERVICES[name]["user"] == "10001:10001" for name in OURS)
    assert "VOLUME" not in dockerfile  # each container would leave an anonymous one
    assert 'locked="--frozen --no-dev --extra models"' in (ROOT / "infra" / "install_dependencies.sh").read_text()
    for copied in re.findall(r"(?m)^COPY (?!--)(.+) \S+$", dockerfile):
        for path in copied.split():
            assert (ROOT / path).exists(), path
            assert f"!{path}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_head_publishes_postgres_and_redis_over_tls_alone_and_on_the_address_that_is_named():
    head = yaml.safe_load(HEAD.read_text())

    assert head["networks"] == {"head": {}}
    assert head["services"].keys() == {"postgres", "redis"}
    for name, port in (("postgres", "5432"), ("redis", "6380")):
        service = head["services"][name]
        address = "${HEAD_ADDRESS:?set HEAD_ADDRESS in .env, see infra/env.example}"
        assert service["ports"] == [f"{address}:{port}:{port}"]
        assert service["networks"] == ["head"]
    postgres, redis = head["services"]["postgres"]["command"], head["services"]["redis"]["command"][0]
    assert set(SERVICES["postgres"]["command"]) | {"ssl=on", "hba_file=/etc/pg_hba.conf"} <= set(postgres)
    lines = [line.split() for line in (ROOT / "infra" / "pg_hba.conf").read_text().splitlines() if line[0] != "#"]
    assert {line[0] for line in lines} == {"local", "hostssl"}
    assert {line[-1] for line in lines if line[0] == "hostssl"} == {"scram-sha-256"}
    plain, _, after = SERVICES["redis"]["command"][0].partition(" <<END")
    assert redis.startswith(plain)
    assert redis.endswith(f" <<END{after}")
    assert "--tls-port 6380" in redis


def test_a_machine_that_only_works_has_the_worker_of_the_deployment_and_its_secrets_as_files():
    alone = yaml.safe_load(WORKER_ALONE.read_text())["services"]
    assert alone.keys() == {"worker"}
    here, there = dict(alone["worker"]), dict(SERVICES["worker"])

    environment, beside = here.pop("environment"), there.pop("environment")
    assert here.pop("secrets") == [*there.pop("secrets"), "ca.crt"]
    own = {
        "MASKFLEET_EMBEDDINGS": None,
        "MASKFLEET_MODEL": None,
    }  # no folder of one machine; only `submit` takes a model
    assert {**environment, **own} == {**beside, **own}
    for key in ("depends_on", "networks"):
        del there[key]
    for service in (here, there):
        del service["volumes"]
    assert here.pop("hostname").startswith("${WORKER_HOST:?")
    assert here == there


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda path: path.stem if path else "base")
def test_docker_compose_accepts_it(overlay, tmp_path):
    if not _has_compose():
        pytest.skip("`docker compose` is not installed")
    env = _make_env(tmp_path) / ".env"
    env.write_text(f"{env.read_text()}\nHEAD_ADDRESS=127.0.0.1\nTLS_DIR=/tls\nSECRETS_DIR={env.parent / 'secrets'}\n")
    files = [f"--file={path}" for path in [BASE, overlay] if path]
    command = ["docker", "compose", f"--env-file={env}", *files, "config", "--quiet"]

    done = subprocess.run(command, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_make_env_with_a_word_behind_it_says_what_it_does_and_writes_nothing(tmp_path):
    (tmp_path / "infra").mkdir()
    command = [sys.executable, shutil.copy(ROOT / "infra" / "make_env.py", tmp_path / "infra"), "--help"]

    asked = subprocess.run(command, capture_output=True, text=True)

    assert asked.returncode == 2
    assert "Writes what a new deployment needs" in asked.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["infra"]


def test_make_env_writes_every_secret_once_where_the_owner_alone_can_enter(tmp_path):
    folder = _make_env(tmp_path)
    secrets = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
    drawn = re.findall(r"\b[0-9a-f]{40}\b", "".join(secrets.values()))

    assert len(drawn) == 13
    assert len(set(drawn)) == 11  # two of them are in an address too
    assert (folder / "secrets").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (folder / "secrets").iterdir()} == {0o444}
    assert (folder / ".env").read_text() == EXAMPLE.read_text()
    again = subprocess.run([sys.executable, folder / "infra" / "make_env.py"], capture_output=True, text=True)
    assert again.returncode == 2
    assert "nothing is changed" in again.stderr
    assert secrets == {path.name: path.read_text() for path in (folder / "secrets").iterdir()}


def test_make_env_renews_the_secret_whose_file_was_deleted(tmp_path):
    secrets = _make_env(tmp_path) / "secrets"
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    for name in ("redis-password", "broker-url"):
        (secrets / name).unlink()

    subprocess.run([sys.executable, tmp_path / "infra" / "make_env.py"], check=True, capture_output=True)

    after = {path.name: path.read_text() for path in secrets.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"redis-password", "broker-url"}
    assert after["broker-url"] == f"redis://:{after['redis-password'].strip()}@redis:6379/0\n"


def test_make_env_takes_the_passwords_of_an_older_env_into_files(tmp_path):
    (tmp_path / ".env").write_text("DATABASE_PASSWORD=a b/c\nFLOWER_USER=fl\nFLOWER_PASSWORD=p\nAWS_ACCESS_KEY_ID=AK\n")

    secrets = _make_env(tmp_path) / "secrets"

    assert (secrets / "database-url").read_text() == "postgresql://maskfleet:a%20b%2Fc@postgres:5432/maskfleet\n"
    assert (secrets / "flower-auth").read_text() == "fl:p\n"
    assert "aws_access_key_id = AK\n" in (secrets / "aws-credentials").read_text()
    assert (tmp_path / ".env").read_text().startswith("DATABASE_PASSWORD=a b/c\n")


def test_a_container_is_well_while_its_process_runs_and_its_servers_answer():
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        here, nowhere = (f"x://user:secret@127.0.0.1:{s.getsockname()[1]}/0" for s in (listening, silent))

        assert _check("pytest-of-nobody", here, here) == (1, "no process with the argument 'pytest-of-nobody'\n")
        with subprocess.Popen(["sleep", "4711"]) as process:
            assert _check("4711", here, here) == (0, "")
            code, said = _check("4711", here, nowhere)
            process.kill()

    assert code == 1
    assert said.startswith("MASKFLEET_BROKER_URL: 127.0.0.1:")
    assert "secret" not in said


def _check(argument: str, database_url: str, broker_url: str) -> tuple[int, str]:
    command = [sys.executable, "-I", ROOT / "infra" / "healthcheck.py", argument]
    environment = {"MASKFLEET_DATABASE_URL": database_url, "MASKFLEET_BROKER_URL": broker_url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def _make_env(tmp_path: Path) -> Path:
    (tmp_path / "infra").mkdir()
    for path in [EXAMPLE, ROOT / "infra" / "make_env.py"]:
        shutil.copy(path, tmp_path / "infra")
    subprocess.run([sys.executable, tmp_path / "infra" / "make_env.py"], check=True, capture_output=True)
    return tmp_path


def _handed_on() -> set[str]:
    """Variables named without a value, which compose takes from .env."""
    environments = [service.get("environment", {}) for service in SERVICES.values()]
    return {name for environment in environments for name, value in environment.items() if value is None}


def _has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


def _project_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
