"""A newcomer types the tutorial into a shell, in its order, and does in Label Studio what it says in between.

MASKFLEET_SCREENSHOTS names a folder that keeps the tutorial's pictures as PNG.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.label_studio.client import LabelStudio
from tests.label_studio.browser import Browser
from tests.label_studio.conftest import installed_label_studio
from tests.label_studio.editor import Editor
from tests.label_studio.server import Server, serve
from tests.label_studio.test_browser import browser, keep, log_in, open_task, submit
from tests.redis_server import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.label_studio, pytest.mark.slow]
__all__ = ["browser", "installed_label_studio"]

ROOT = Path(__file__).parents[2]
# What installs things, or stays: the test's own Label Studio and environment are there instead.
NOT_TYPED = ("make setup", "export PATH", "python3 -m venv", "~/label-studio/", "export LABEL_", "export ML_BLOCK")


@dataclass
class Shell:
    """Types a page's commands. They see each other's variables and folder, as in one terminal."""

    page: str
    environment: dict[str, str]
    instead: dict[str, str]
    folder: Path = ROOT
    typed: list[str] = field(default_factory=list)

    def commands(self) -> list[str]:
        blocks = re.findall(r"^```console\n(.*?)^```", self.page, re.MULTILINE | re.DOTALL)
        lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
        return [line for line in lines if not line.startswith(NOT_TYPED)]

    def type_until(self, last: str) -> str:
        """Type what comes next, up to the command that begins with `last`, and return what that one printed."""
        for command in self.commands()[len(self.typed) :]:
            self.typed.append(command)
            said = self.type(command)
            if command.startswith(last):
                return said
        raise AssertionError(f"the page has no {last!r} after {self.typed[-1]!r}")

    def type(self, command: str) -> str:
        script = f'cd "$1"\n{self.fitted(command)}\nenv -0 >"$2"; pwd >>"$2"'
        after = self.folder_of_state / "state"
        done = subprocess.run(
            ["bash", "-ec", script, "bash", self.folder, after],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        *variables, folder = after.read_text().split("\0")
        self.environment = dict(line.split("=", 1) for line in variables)
        self.folder = Path(folder.rstrip("\n"))
        return done.stdout

    @property
    def folder_of_state(self) -> Path:
        return Path(self.environment["HOME"]).parent

    def fitted(self, command: str) -> str:
        for ours, theirs in self.instead.items():
            command = command.replace(ours, theirs)
        return command

    @contextmanager
    def stays(self, begins: str, log: Path, words: str) -> Iterator[None]:
        """Type the next command, which begins so, and leave it running until the end."""
        command = self.commands()[len(self.typed)]
        assert command.startswith(begins)
        self.typed.append(command)
        with (
            log.open("wb") as said,
            subprocess.Popen(
                ["bash", "-c", f"exec {command} {words}"],
                env=self.environment,
                cwd=self.folder,
                stdout=said,
                stderr=said,
            ) as process,
        ):
            try:
                wait_for(lambda: "answers at" in log.read_text(), f"{command}: {log.read_text()}", seconds=300)
                yield
            finally:
                process.terminate()


@pytest.fixture(scope="module")
def server(installed_label_studio: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Label Studio that shows files of the newcomer's home folder, and calls addresses of this machine."""
    with serve(tmp_path_factory.mktemp("newcomer"), ML_BLOCK_LOCAL_IP="false") as started:
        yield started


def test_the_tutorials_commands_lead_from_photos_to_a_reviewed_export(
    server: Server, browser: Browser, tmp_path: Path
) -> None:
    home, port = server.files, free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    shell = Shell(
        page=(ROOT / "docs" / "tutorial.md").read_text(),
        environment={**kept, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        instead={"http://127.0.0.1:8080": server.url, "API_KEY=...": f"API_KEY={server.token}", ":9090": f":{port}"},
    )
    shell.type_until("maskfleet run")
    browser.open((home / "out" / "index.html").as_uri())
    keep(browser, "tutorial-gallery")

    shell.type_until("export MASKFLEET_LABEL_STUDIO_API_KEY")
    assert shell.type_until("maskfleet label-studio setup").strip() == "1"
    shell.type_until("maskfleet publish")
    shell.type_until("export MASKFLEET_ASSIST_PASSWORD")
    with (
        LabelStudio(server.url, server.token) as client,
        shell.stays("maskfleet assist", tmp_path / "assist.log", f"--port {port}"),
    ):
        shell.type_until("maskfleet label-studio setup")
        log_in(browser, server)
        click_and_submit(client, browser, server)
    shell.type_until("maskfleet export")
    browser.open((home / "review.html").as_uri())
    keep(browser, "tutorial-review")

    assert shell.typed == shell.commands()
    (image,) = json.loads((home / "reviewed.json").read_text())["images"]
    reviewed, before = (masks_of(home / name, image["file_name"]) for name in ("reviewed.json", "out/coco.json"))
    assert [mask for mask in reviewed if mask in before] == before
    assert len(reviewed) == len(before) + 1  # the clicked one


def masks_of(coco: Path, file_name: str) -> list[str]:
    document = json.loads(coco.read_text())
    (number,) = [image["id"] for image in document["images"] if image["file_name"] == file_name]
    return [one["segmentation"]["counts"] for one in document["annotations"] if one["image_id"] == number]


def click_and_submit(client: LabelStudio, browser: Browser, server: Server) -> None:
    """Open the project's first task, click in the middle of its picture, accept, submit."""
    task = min(task["id"] for task in client.list_tasks(1))
    (prediction,) = client.get_task(task)["predictions"]
    place = open_task(browser, server, 1, task, len(prediction["result"]))
    keep(browser, "tutorial-task")
    editor = Editor(browser=browser)
    editor.use_auto_annotation()
    editor.choose_tool("click")
    editor.choose_label("1", "object")
    assert editor.prompt(place.window((50, 50)))
    keep(browser, "tutorial-click")
    editor.accept()
    submit(browser, client, task)
