"""The only access to Label Studio: a small HTTP client. It repeats failed reads, and never a write.

    LabelStudioError
    ├── Unavailable   no answer, a time-out, 429 or 5xx: it may pass; whether a write happened is unknown
    ├── TooLarge      the body is larger than the server, or a proxy before it, accepts
    ├── NotFound      there is no such project, task or page
    ├── Refused       it will be refused again until a person fixes it as the message says
    └── ConfigError, PublishError, SetupError   in the modules that raise them: the project does not fit

label_studio_sdk is not used: its client sends a failed import up to three times, and checks every number of a brush
with pydantic. An import is not idempotent in Label Studio. So our sender looks on the server before it sends again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx

from orchestrator.label_studio.addresses import server_key
from orchestrator.label_studio.answers import FoundTask, Imported, Project
from orchestrator.label_studio.errors import NotFound, Refused, Unavailable
from orchestrator.label_studio.refusals import STORAGE_REMEDY, error_of
from orchestrator.label_studio.tokens import LegacyToken, PersonalAccessToken, is_web_token

# A lookup is a GET, so its ids are in the URL. 100 ids of 16 characters make 3 KB; servers take at least 4 KB.
LOOKUP_SIZE = 100
# An import of 8 MB took Label Studio on Postgres 20 s, measured on a busy machine of two cores.
WRITE_SECONDS = 300.0
READ_SECONDS = 120.0
CONNECT_SECONDS = 10.0

_READ_ATTEMPTS = 7  # over half a minute in all; a server restarts in that time
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_PAGE_SIZE = 100
_ASSET_ID = "filter:tasks:data.asset_id"

# httpx logs each request's full address. Our own log has them shorter.
logging.getLogger("httpx").setLevel(logging.WARNING)


class LabelStudio:
    """One server, one token. Use it in a `with` block, in one thread at a time."""

    def __init__(self, url: str, api_key: str, *, transport: httpx.BaseTransport | None = None) -> None:
        """url: with a path where the server lives below one. api_key: legacy or personal access token."""
        self.url = server_key(url)
        self._http = _Http(url, api_key, transport)

    def __enter__(self) -> LabelStudio:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.client.close()

    def check(self) -> str:
        """The server's version. Raises LabelStudioError, with the remedy, if the server or the token does not work."""
        self._http.read("GET", "/api/current-user/whoami", attempts=1)
        return str(self._http.read("GET", "/api/version").get("release", "unknown"))

    def get_project(self, project_id: int) -> Project:
        try:
            return Project.from_json(self._http.read("GET", f"/api/projects/{project_id}/"))
        except NotFound as error:
            remedy = "`maskfleet label-studio setup` makes one, its number is in the address of its page"
            raise NotFound(f"{self.url} has no project {project_id} that this token may see: {remedy}") from error

    def find_projects(self, title: str) -> list[Project]:
        """The projects with exactly this title."""
        found = self._http.pages("/api/projects/", {"title": title})
        return [Project.from_json(project) for project in found if project["title"] == title]

    def create_project(self, *, title: str, label_config: str, sampling: str = "Sequential sampling") -> Project:
        body = {"title": title, "label_config": label_config, "sampling": sampling}
        return Project.from_json(self._http.write("/api/projects/", body))

    def update_project(self, project_id: int, **changes: Any) -> Project:
        """Set fields of a project: label_config, model_version, sampling, …; the server checks the config."""
        return Project.from_json(self._http.read("PATCH", f"/api/projects/{project_id}/", json=changes))

    def show_version(self, project_id: int, model_version: str) -> None:
        """Show this version to annotators. The server refuses while no prediction of it exists."""
        self.update_project(project_id, model_version=model_version)

    def count_versions(self, project_id: int) -> dict[str, int]:
        """How many predictions the project has of each model version."""
        found = self._http.read("GET", f"/api/projects/{project_id}/model-versions/", params={"extended": "true"})
        versions = found["static"] if isinstance(found, dict) else found
        return {version["model_version"]: version["count"] for version in versions}

    def list_storages(self, kind: str, project_id: int) -> list[dict[str, Any]]:
        """The project's import storages of a kind, `s3` or `localfiles`, as the server describes them."""
        found: list[dict[str, Any]] = self._http.read("GET", f"/api/storages/{kind}/", params={"project": project_id})
        return found

    def create_storage(self, kind: str, project_id: int, **fields: Any) -> dict[str, Any]:
        """Add an import storage that only resolves addresses. It cannot be synchronized: that would add a second task
        for each image that we import."""
        body = {"project": project_id, "use_blob_urls": True, "synchronizable": False, **fields}
        try:
            made: dict[str, Any] = self._http.write(f"/api/storages/{kind}", body)
        except (Unavailable, Refused) as error:
            # The server tries the storage at once. An error of its own S3 client comes back as 400 or 500.
            if error.status not in (httpx.codes.BAD_REQUEST, httpx.codes.INTERNAL_SERVER_ERROR):
                raise
            raise Refused(f"{error}; {STORAGE_REMEDY[kind]}", status=error.status) from error
        return made

    def list_backends(self, project_id: int) -> list[dict[str, Any]]:
        """The project's ML backends, as the server describes them. It asks each of them whether it is up."""
        found: list[dict[str, Any]] = self._http.read("GET", "/api/ml", params={"project": project_id})
        return found

    def write_backend(self, backend_id: int | None, fields: Mapping[str, Any]) -> None:
        """Add an ML backend (None), or change one. The server calls it before it answers. Never repeated."""
        path = "/api/ml" if backend_id is None else f"/api/ml/{backend_id}"
        self._http.send("POST" if backend_id is None else "PATCH", path, seconds=READ_SECONDS, json=dict(fields))

    def list_views(self, project_id: int) -> list[dict[str, Any]]:
        """The project's saved Data Manager tabs."""
        found: list[dict[str, Any]] = self._http.read("GET", "/api/dm/views/", params={"project": project_id})
        return found

    def create_view(self, project_id: int, data: Mapping[str, Any]) -> None:
        """Save a Data Manager tab. data: title, filters, ordering, … as the Data Manager stores them."""
        self._http.write("/api/dm/views/", {"project": project_id, "data": dict(data)})

    def serves(self, address: str) -> bool:
        """Whether the server serves what a task's address names, such as /data/local-files/?d=…. The body is not
        read."""
        try:
            with self._http.client.stream("GET", address, headers={"Range": "bytes=0-0"}) as response:
                return response.is_success
        except httpx.TransportError as error:
            raise Unavailable(f"{self.url}{address}: no answer ({str(error) or type(error).__name__})") from error

    def find_tasks(
        self, project_id: int, asset_ids: Sequence[str], *, model_version: str | None = None
    ) -> dict[str, list[FoundTask]]:
        """Look up tasks by their data.asset_id, lowest task id first. With model_version: only tasks that have a
        prediction of it. A second task of an asset is a duplicate that somebody made."""
        found: dict[str, list[FoundTask]] = {}
        for start in range(0, len(asset_ids), LOOKUP_SIZE):
            ids = list(asset_ids[start : start + LOOKUP_SIZE])
            filters = [has_asset_id(ids)]
            if model_version is not None:
                filters.append(_has_version(model_version))
            for task in self.list_tasks(project_id, filters, include=("id", "data", "total_predictions")):
                asset_id = str(task["data"].get("asset_id"))
                count = int(task["total_predictions"])
                found.setdefault(asset_id, []).append(
                    FoundTask(id=task["id"], asset_id=asset_id, prediction_count=count)
                )
        return {asset_id: sorted(tasks, key=lambda task: task.id) for asset_id, tasks in found.items()}

    def list_tasks(
        self,
        project_id: int,
        filters: Sequence[Mapping[str, Any]] = (),
        *,
        include: Sequence[str] = ("id", "data"),
        whole: bool = False,
        ordering: Sequence[str] = (),
        page_size: int = _PAGE_SIZE,
    ) -> Iterator[dict[str, Any]]:
        """Stream the tasks that pass all of the Data Manager's filters, with addresses as stored.

        They come in the order of their ids, and each page begins behind the last id. So no task is skipped when others
        are deleted, or stop passing the filters, while pages are fetched. With another `ordering` a task may be.
        include: fields, `id` among them. whole: with annotations, drafts and predictions. This is slow and large: a
        hundred tasks of 50 brushes are 12 MB.
        """
        params: dict[str, Any] = {
            "project": project_id,
            "fields": "all" if whole else "task_only",
            "resolve_uri": "false",
            "page_size": page_size,
        }
        if include and not whole:
            params["include"] = ",".join(include)
        if ordering:
            return self._http.pages("/api/tasks/", params | {"query": _query(filters, ordering)}, key="tasks")
        return self._tasks_by_id(params, filters)

    def _tasks_by_id(self, params: dict[str, Any], filters: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        behind: list[Mapping[str, Any]] = []
        while True:
            query = _query([*filters, *behind], ["tasks:id"])
            found = self._http.read("GET", "/api/tasks/", params=params | {"query": query, "page": 1})
            yield from found["tasks"]
            if not found["tasks"] or len(found["tasks"]) >= found["total"]:
                return
            last = found["tasks"][-1]["id"]
            behind = [{"filter": "filter:tasks:id", "operator": "greater", "type": "Number", "value": last}]

    def get_task(self, task_id: int) -> dict[str, Any]:
        """One task, whole, addresses as stored."""
        found: dict[str, Any] = self._http.read("GET", f"/api/tasks/{task_id}/", params={"resolve_uri": "false"})
        return found

    def has_draft(self, project_id: int, task_id: int) -> bool:
        """Whether anybody left a draft on a task. `get_task` shows only drafts of the token's user."""
        filters = [
            {"filter": "filter:tasks:id", "operator": "equal", "type": "Number", "value": task_id},
            {"filter": "filter:tasks:draft_exists", "operator": "equal", "type": "Boolean", "value": True},
        ]
        return any(True for _ in self.list_tasks(project_id, filters, include=("id",)))

    def delete_task(self, task_id: int) -> None:
        self._http.send("DELETE", f"/api/tasks/{task_id}/", seconds=WRITE_SECONDS)

    def import_tasks(self, project_id: int, body: bytes) -> Imported:
        """Import a JSON list of tasks with their predictions, once. Raises Unavailable if it may have happened."""
        params = {"return_task_ids": "true"}
        answer = self._http.write(f"/api/projects/{project_id}/import", body, params=params)
        return Imported(task_ids=tuple(answer["task_ids"]), prediction_count=answer["prediction_count"])

    def import_predictions(self, project_id: int, body: bytes) -> int:
        """Import a JSON list of predictions, each with its `task`, once. Returns how many the server created."""
        return int(self._http.write(f"/api/projects/{project_id}/import/predictions", body)["created"])

    def delete_prediction(self, prediction_id: int) -> None:
        """Delete a prediction. Keep one that an annotation began from, or the annotation loses its link to it."""
        self._http.send("DELETE", f"/api/predictions/{prediction_id}/", seconds=WRITE_SECONDS)


class _Http:
    """Requests to one server with one token. Requests that may be repeated are; others are sent once."""

    def __init__(self, url: str, api_key: str, transport: httpx.BaseTransport | None) -> None:
        self._url = server_key(url)
        self.client = httpx.Client(
            base_url=url.rstrip("/"),
            auth=PersonalAccessToken(url.rstrip("/"), api_key) if is_web_token(api_key) else LegacyToken(api_key),
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            headers={"User-Agent": "maskfleet"},
            transport=transport,
        )

    def read(self, method: str, path: str, *, attempts: int = _READ_ATTEMPTS, **arguments: Any) -> Any:
        """Send a request that is safe to repeat, several times with growing pauses."""
        for attempt in range(attempts):
            try:
                return _json(self.send(method, path, seconds=READ_SECONDS, **arguments))
            except Unavailable as error:
                if attempt + 1 == attempts:
                    raise
                time.sleep(pause_seconds(attempt, error))
        raise AssertionError("unreachable")

    def write(self, path: str, body: bytes | Mapping[str, Any], **arguments: Any) -> Any:
        """POST once."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        return _json(self.send("POST", path, seconds=WRITE_SECONDS, content=content, headers=headers, **arguments))

    def send(self, method: str, path: str, *, seconds: float, **arguments: Any) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            response = self.client.request(method, path, timeout=timeout, **arguments)
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self._url}{path}: no answer within {seconds:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            remedy = "start it, or fix MASKFLEET_LABEL_STUDIO_URL"
            raise Unavailable(f"{self._url} does not answer: {str(error) or type(error).__name__}; {remedy}") from error
        if not response.is_success:
            raise error_of(response, self._url, path)
        return response

    def pages(self, path: str, params: Mapping[str, Any], key: str = "results") -> Iterator[dict[str, Any]]:
        page, size, count = 1, int(params.get("page_size", _PAGE_SIZE)), 0
        while True:
            try:
                found = self.read("GET", path, params={**params, "page": page, "page_size": size})
            except NotFound:
                if page == 1:
                    raise
                return  # the last page was full
            yield from found[key]
            count += len(found[key])
            # A server may give smaller pages than asked for (TASK_API_PAGE_SIZE_MAX). Its total tells them from the
            # last page.
            if not found[key] or (len(found[key]) < size and count >= found.get("total", found.get("count", 0))):
                return
            page += 1


def pause_seconds(attempt: int, error: Unavailable) -> float:
    """How long to wait after an attempt (counted from 0): as the server asks, or 0.5 s, 1 s, 2 s …"""
    asked = error.retry_after_seconds
    return min(_LONGEST_PAUSE_SECONDS, asked if asked is not None else _FIRST_PAUSE_SECONDS * 2.0**attempt)


def has_asset_id(asset_ids: Sequence[str]) -> dict[str, Any]:
    """The Data Manager's filter for tasks of these data.asset_id."""
    return {"filter": _ASSET_ID, "operator": "in_list", "type": "List", "value": list(asset_ids)}


def _query(filters: Sequence[Mapping[str, Any]], ordering: Sequence[str]) -> str:
    items = [dict(item) for item in filters]
    query = {"filters": {"conjunction": "and", "items": items}, "ordering": list(ordering)}
    return json.dumps(query, separators=(",", ":"), ensure_ascii=False)


def _has_version(model_version: str) -> dict[str, Any]:
    return {
        "filter": "filter:tasks:predictions_model_versions",
        "operator": "contains",
        "type": "List",
        "value": [model_version],  # with a bare string, the server would look for each letter
    }


def _json(response: httpx.Response) -> Any:
    if response.status_code == httpx.codes.NO_CONTENT or not response.content:
        return {}
    try:
        return response.json()
    except ValueError as error:
        remedy = "does MASKFLEET_LABEL_STUDIO_URL name Label Studio itself?"
        raise Refused(
            f"{response.url.path}: the answer is no JSON, it starts {response.text[:60]!r}; {remedy}"
        ) from error


def health_error(url: str) -> str | None:
    """Why Label Studio is not healthy at this address; None if it is. Needs no token."""
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=5).raise_for_status()
    except httpx.HTTPError as error:
        return str(error)
    return None
