"""The Helm chart, rendered by Helm's own library and held to Kubernetes' schemas and to our rules for every pod."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from db.settings import Settings
from db.states import ProcessKind

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is installed on Linux only")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "infra" / "helm" / "maskfleet"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
OLDEST, NEWEST = "1.27", "1.37"  # of Kubernetes; Chart.yaml says the oldest
NOT_KUBERNETES_OWN = {"ScaledObject", "TriggerAuthentication", "PodMonitor"}
EVERYTHING = {
    "image": {"repository": "registry.example/maskfleet", "tag": "0.2.0-abc", "pullSecrets": ["registry"]},
    "secret": {
        "keys": {
            "ca": "ca.crt",
            "awsCredentials": "aws",
            "labelStudioApiKey": "label-studio",
            "assistPassword": "assist",
            "boardPassword": "board",
            "flowerBasicAuth": "flower",
        }
    },
    "s3": {"endpoint": "https://s3.example"},
    "labelStudio": {"url": "https://label-studio.example", "project": 3},
    "weights": {"existingClaim": "weights", "mirror": "s3://bucket/weights"},
    "exports": {"existingClaim": "exports"},
    "embeddings": "s3://bucket/embeddings",
    "settings": {"MASKFLEET_CHUNK_SIZE": "32", "MASKFLEET_LOG_FORMAT": "json"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/maskfleet"}},
    "worker": {"nodeSelector": {"gpu": "h100"}},
    "networkPolicy": {
        "metricsFrom": [{"namespaceSelector": {}}],
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 8080}]}],
    },
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    **{name: {"enabled": True} for name in ("autoscaling", "publisher", "assist", "board", "flower")},
}
SPOT = yaml.safe_load((CHART / "values-spot.yaml").read_text())
WAYS = {"defaults": {}, "everything": EVERYTHING, "spot": SPOT}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="street", namespace="fleet")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


RENDERED = {way: rendered(values) for way, values in WAYS.items()}
every_way = pytest.mark.parametrize("documents", RENDERED.values(), ids=RENDERED)


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The component and the pod's spec of each Job and Deployment."""
    for document in documents:
        if document["kind"] in ("Job", "Deployment"):
            template = document["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == f"street-maskfleet-{name}"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_helm_lint_finds_nothing(way: str) -> None:
    report = helm.lint(CHART, WAYS[way], strict=True)

    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(("way", "version"), [("everything", OLDEST), ("everything", NEWEST), ("spot", NEWEST)])
def test_each_object_is_one_of_kubernetes(way: str, version: str) -> None:
    for document in RENDERED[way]:
        if document["kind"] not in NOT_KUBERNETES_OWN:
            kubernetes_validate.validate(document, version, strict=True)


def test_everything_has_every_part_and_the_defaults_those_that_a_fleet_needs() -> None:
    assert {name for name, _ in pods(RENDERED["defaults"])} == {"migrate", "dispatch", "worker"}
    ours = {name for name, service in COMPOSE.items() if str(service["image"]).startswith("maskfleet:")}
    assert {name for name, _ in pods(RENDERED["everything"])} == ours


@every_way
def test_a_pod_is_no_root_has_no_capability_and_cannot_write_its_image(documents: list[dict[str, Any]]) -> None:
    for name, pod in pods(documents):
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])
        assert container["resources"]["limits"]["memory"]


@every_way
def test_what_a_container_mounts_is_a_volume_and_tmp_can_be_written(documents: list[dict[str, Any]]) -> None:
    for _, pod in pods(documents):
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert mounts["tmp"] == "/tmp"


@every_way
def test_secrets_are_files_and_each_pod_has_only_those_that_it_reads(documents: list[dict[str, Any]]) -> None:
    for name, pod in pods(documents):
        [secret] = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        files = {f"/run/secrets/maskfleet/{item['path']}" for item in secret["items"]}
        named = {e["value"] for e in environment(pod).values() if str(e.get("value", "")).startswith("/run/secrets/")}
        assert named == files - {"/run/secrets/maskfleet/ca.crt"}, name
        by_reference = {variable for variable, e in environment(pod).items() if "valueFrom" in e}
        assert by_reference <= {"FLOWER_BASIC_AUTH"}


@every_way
def test_each_variable_is_a_setting_and_each_setting_is_valid(
    documents: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _, pod in pods(documents):
        for variable, entry in environment(pod).items():
            if variable.startswith("MASKFLEET_"):
                assert variable.removesuffix("_FILE").removeprefix("MASKFLEET_").lower() in Settings.model_fields
                if not variable.endswith("_FILE"):
                    monkeypatch.setenv(variable, entry["value"])
        assert pod["enableServiceLinks"] is False  # a Service street-… is harmless, MASKFLEET_… would be a setting
    assert str(Settings().weights_dir) == "/weights"


def test_settings_that_the_chart_does_not_make_itself_can_be_given_and_no_others() -> None:
    made = {variable for _, pod in pods(rendered({**EVERYTHING, "settings": {}})) for variable in environment(pod)}
    secrets = {
        f"MASKFLEET_{n.upper()}" for n, field in Settings.model_fields.items() if "Secret" in str(field.annotation)
    }
    others = {f"MASKFLEET_{name.upper()}" for name in Settings.model_fields} - made - secrets

    assert set(SCHEMA["properties"]["settings"]["propertyNames"]["enum"]) == others - {"MASKFLEET_STATE_DIR"}


@every_way
def test_a_stopping_worker_has_the_time_to_drain(documents: list[dict[str, Any]]) -> None:
    pod = dict(pods(documents))["worker"]

    assert pod["terminationGracePeriodSeconds"] > float(environment(pod)["MASKFLEET_DRAIN_SECONDS"]["value"])


def test_a_worker_on_a_spot_node_is_gone_within_its_notice() -> None:
    pod = dict(pods(RENDERED["spot"]))["worker"]

    assert environment(pod)["MASKFLEET_DRAIN_SECONDS"]["value"] == "25"
    assert pod["terminationGracePeriodSeconds"] < 30


def test_commands_and_checks_are_those_of_compose() -> None:
    kinds = {"dispatch": ProcessKind.DISPATCHER, "publisher": ProcessKind.PUBLISHER, "worker": ProcessKind.WORKER}
    for name, pod in pods(RENDERED["everything"]):
        [container] = pod["containers"]
        assert container["args"] == COMPOSE[name]["command"], name
        if name != "migrate":
            assert container["readinessProbe"]["exec"]["command"] == COMPOSE[name]["healthcheck"]["test"][1:]
        if name in kinds:
            assert container["readinessProbe"]["exec"]["command"][-1] == kinds[name]
            # It would end every pod while Postgres is away. The check itself kills a command that is frozen.
            assert "livenessProbe" not in container
            assert pod["shareProcessNamespace"] is True


def test_tables_are_migrated_before_the_new_pods_start() -> None:
    annotations = one(RENDERED["defaults"], "Job", "migrate")["metadata"]["annotations"]

    assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"


def test_a_worker_has_one_gpu_and_the_autoscaler_alone_says_how_many_workers_there_are() -> None:
    for way, replicas in (("defaults", 1), ("everything", None)):
        worker = one(RENDERED[way], "Deployment", "worker")["spec"]
        assert worker.get("replicas") == replicas
        assert worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    scaled = one(RENDERED["everything"], "ScaledObject", "worker")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "street-maskfleet-worker"
    assert scaled["minReplicaCount"] == 0


@every_way
def test_selectors_find_the_pods_they_mean(documents: list[dict[str, Any]]) -> None:
    templates = {n: d["spec"]["template"]["metadata"]["labels"] for d in documents for n in [component(d)] if is_pod(d)}
    for document in documents:
        spec = document.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector", {}))
        labels = selector if document["kind"] == "Service" else selector.get("matchLabels", {})
        if labels and document["kind"] != "PodMonitor":
            assert labels.items() <= templates[component(document)].items(), document["metadata"]["name"]


@every_way
def test_every_pod_has_a_network_policy_and_nobody_calls_in_unless_it_is_said(documents: list[dict[str, Any]]) -> None:
    policies = {component(d): d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}

    assert policies.keys() == {name for name, _ in pods(documents)}
    for name, policy in policies.items():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        is_open = documents is RENDERED["everything"] and name in ("dispatch", "worker")
        assert bool(policy["ingress"]) is is_open
        assert all(rule["ports"] for rule in policy["egress"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"worker": {"graceSeconds": 50}}, "worker.graceSeconds is 50, expected more than worker.drainSeconds"),
        ({"publisher": {"enabled": True}}, "publisher.enabled needs labelStudio.url"),
        ({"board": {"enabled": True}}, "board.enabled needs secret.keys.boardPassword"),
        ({"flower": {"enabled": True}}, "flower.enabled needs secret.keys.flowerBasicAuth"),
        ({"settings": {"MASKFLEET_CHUNKSIZE": "64"}}, "value must be one of"),
        ({"settings": {"MASKFLEET_DATABASE_URL": "postgresql://user:word@host/db"}}, "value must be one of"),
        ({"settings": {"MASKFLEET_CHUNK_SIZE": 64}}, "got number, want string"),
        ({"wroker": {}}, "additional properties 'wroker' not allowed"),
        ({"worker": {"resources": {"limits": {"memory": None}}}}, "missing property 'memory'"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmError, match=said.replace(".", r"\.")):
        rendered(values)


def test_prometheus_leaves_our_label_job_as_it_is() -> None:
    [monitor] = [document for document in RENDERED["everything"] if document["kind"] == "PodMonitor"]
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics", "honorLabels": True}]


def test_what_the_page_gives_to_helm_survives_the_shell_and_is_taken_as_text() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    # `--set` would read 64 as a number, which the chart refuses. Bash takes braces and backslashes for itself.
    ways = re.findall(r"(\S+) settings\.MASKFLEET_", page)
    assert {way.strip("`") for way in ways} == {"--set-string"}
    for value in (r"worker.resources.limits.nvidia\.com/gpu=null", "networkPolicy.webPorts={443,9000,8080}"):
        assert page.count(value) == page.count(f"--set '{value}'") == 1


def environment(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in pod["containers"][0].get("env", [])}


def component(document: dict[str, Any]) -> str:
    return str(document["metadata"]["labels"]["app.kubernetes.io/component"])


def is_pod(document: dict[str, Any]) -> bool:
    return document["kind"] in ("Job", "Deployment")
