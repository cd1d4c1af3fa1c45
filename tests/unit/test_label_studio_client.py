"""The client of Label Studio against answers that a Label Studio of the tests does not give."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from orchestrator.label_studio.addresses import server_key
from orchestrator.label_studio.client import LabelStudio
from orchestrator.label_studio.errors import Refused
from tests.answering import server_of

WEB_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJ0b2tlbiI6InNlY3JldCJ9.c2lnbmF0dXJl"


class Tasks:
    """A project's tasks, answered as Label Studio does: those that pass the filter of ids, a page at a time.

    most: its setting TASK_API_PAGE_SIZE_MAX.
    """

    def __init__(self, count: int, most: int) -> None:
        self.tasks = [{"id": n + 1, "data": {"asset_id": f"{n:016x}"}, "total_predictions": 1} for n in range(count)]
        self.most = most

    def answer(self, _: str, address: str, __: bytes) -> tuple[int, bytes]:
        asked = parse_qs(urlsplit(address).query)
        items = json.loads(asked["query"][0])["filters"]["items"]
        behind = max([item["value"] for item in items if item["filter"] == "filter:tasks:id"], default=0)
        left = [task for task in self.tasks if task["id"] > behind]
        page, size = int(asked["page"][0]), min(self.most, int(asked["page_size"][0]))
        found = left[(page - 1) * size : page * size]
        if not found and page > 1:
            return 404, b'{"detail": "Invalid page."}'
        return 200, json.dumps({"tasks": found, "total": len(left)}).encode()


@pytest.mark.parametrize("most", [1, 30, 50, 100])
def test_every_task_is_found_on_a_server_that_caps_its_pages(most: int) -> None:
    """A task that is not found would be sent a second time."""
    with server_of(Tasks(100, most).answer) as url, LabelStudio(url, "token") as client:
        found = client.find_tasks(3, [f"{n:016x}" for n in range(100)])

    assert [task.id for tasks_of_one in found.values() for task in tasks_of_one] == list(range(1, 101))


def test_no_task_is_skipped_when_as_many_are_deleted_as_added_between_two_pages() -> None:
    server = Tasks(10, 4)
    with server_of(server.answer) as url, LabelStudio(url, "token") as client:
        tasks = client.list_tasks(3)
        before = [next(tasks)["id"] for _ in range(4)]
        server.tasks = [*server.tasks[2:], {"id": 11}, {"id": 12}]
        after = [task["id"] for task in tasks]

    assert (before, after) == ([1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12])


@pytest.mark.parametrize(
    "said", [b"<html>a web page</html>", b'{"x": 1}', b'{"access": "opaque"}', b"[]", b'{"access": 3}']
)
def test_an_address_that_gives_no_access_token_is_an_error_with_its_remedy(said: bytes) -> None:
    with (
        server_of(lambda *_: (200, said)) as url,
        LabelStudio(url, WEB_TOKEN) as client,
        pytest.raises(Refused, match="no access token; does MASKFLEET_LABEL_STUDIO_URL") as raised,
    ):
        client.check()
    assert WEB_TOKEN not in str(raised.value)


def test_the_address_of_a_server_at_ipv6_stays_an_address() -> None:
    assert server_key("HTTP://user:secret@[::1]:8080/ls/") == "http://[::1]:8080/ls"
    assert server_key(server_key("http://[2001:DB8::7]")) == "http://[2001:db8::7]"
