"""Which keys a real Label Studio can show: the ones it would take for others are the ones that `publish` refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import quote

import boto3
import httpx
import pytest

from orchestrator.label_studio.addresses import address_faults, image_address
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.config import label_config
from orchestrator.label_studio.setup import Wanted, make_project
from tests.label_studio.server import Server, serve
from tests.s3_server import serve_s3
from workers.storage.source import open_source

pytestmark = [pytest.mark.integration, pytest.mark.label_studio]

BUCKET = "street"
GOOD_KEYS = [
    "a.png", "a b.png", "a#b.png", "a;b.png", "a%41.png", "a+b.png", "a&b=c.png", "'\"<>.png", "a[1]{2}.png",
    "猫 🚌.png", "a\\b.png", "a:b@c.png", "a//b.png", " a.png", "a|b^c`d~.png", "$image.png", "a,b.png",
]  # fmt: skip
CUT_KEYS = ["a?b.png", "?", "a\tb.png", "a.png ", "a.png\u3000"]  # moto holds no line ends, which are lost like tabs


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with serve_s3() as address:
        yield address


@pytest.fixture(scope="module")
def with_store(installed_label_studio: None, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Label Studio whose own environment has the store's address and keys."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "S3_ENDPOINT": store}
    with serve(tmp_path_factory.mktemp("label-studio-s3"), **keys) as server:
        yield server


def test_a_key_is_refused_just_where_label_studio_would_show_another_object(with_store: Server, store: str) -> None:
    s3 = boto3.client("s3", endpoint_url=store, aws_access_key_id="key", aws_secret_access_key="secret")
    s3.create_bucket(Bucket=BUCKET)
    keys = [*GOOD_KEYS, *CUT_KEYS]
    for key in keys:
        s3.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    source = open_source(f"s3://{BUCKET}")
    with LabelStudio(with_store.url, with_store.token) as client:
        project = client.create_project(title="keys", label_config=label_config(["car"]))
        client.create_storage("s3", project.id, title="keys", bucket=BUCKET, prefix="", presign=False)
        shown = {key: _fetch(client, with_store, project.id, source.uri(key)) for key in keys}

    assert [key for key in keys if address_faults(source.uri(key))] == CUT_KEYS
    assert [key for key in keys if shown[key] != key.encode()] == CUT_KEYS


def test_a_file_of_any_name_is_shown(label_studio: Server, client: LabelStudio) -> None:
    root = label_studio.files / "names"
    names = [
        "a?b.png",
        "a\tb.png",
        "a\nb.png",
        "a#b.png",
        "a%41.png",
        "a.png ",
        "猫 🚌.png",
        "'\"&+=;.png",
        "$image.png",
    ]
    root.mkdir()
    for name in names:
        (root / name).write_bytes(name.encode())
    project = client.create_project(title="names", label_config=label_config(["car"]))
    client.create_storage("localfiles", project.id, title="names", path=str(root))
    source = open_source(str(root))

    shown = {
        name: _fetch(client, label_studio, project.id, image_address(source.uri(name), str(label_studio.files)))
        for name in names
    }

    assert shown == {name: name.encode() for name in names}


@pytest.mark.parametrize("as_address", [False, True])
def test_setup_takes_a_folder_by_the_name_it_has(
    label_studio: Server, client: LabelStudio, request: pytest.FixtureRequest, as_address: bool
) -> None:
    folder = label_studio.files / "50%41 off" / str(as_address)
    folder.mkdir(parents=True)
    source = f"file://{quote(str(folder))}" if as_address else str(folder)

    set_up = make_project(client, request.node.name[:50], Wanted(source=source, local_files=True))

    assert [storage["path"] for storage in client.list_storages("localfiles", set_up.project.id)] == [str(folder)]


def _fetch(client: LabelStudio, server: Server, project_id: int, address: str) -> bytes | None:
    """What the page gets as the task's image."""
    (task_id,) = client.import_tasks(project_id, json.dumps([{"data": {"image": address}}]).encode()).task_ids
    headers = {"Authorization": f"Token {server.token}"}
    task = httpx.get(f"{server.url}/api/tasks/{task_id}/", headers=headers, timeout=60).json()
    url = httpx.URL(server.url).join(task["data"]["image"])
    answer = httpx.get(url, headers=headers, timeout=60, follow_redirects=True)
    return answer.content if answer.is_success else None
