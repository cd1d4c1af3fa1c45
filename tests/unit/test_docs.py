"""The pages of docs/ are held to the code: rooms, doors, tables, make's targets, links, the picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from db.tables import Base
from infra.draw_rooms import OUT, draw

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    assert OUT.read_text() == draw(), "files or imports have moved: run `make picture`"


def test_every_table_is_on_the_architecture_page_and_no_other() -> None:
    section = ARCHITECTURE.split("## Tables")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(named) == sorted(Base.metadata.tables)


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if c["type"] == "protected"], ids=lambda c: c["name"])
def test_every_vendors_door_on_the_architecture_page_is_the_one_that_is_held(contract: dict[str, list[str]]) -> None:
    vendor = str(contract["name"]).removeprefix("One door to ").replace(" and ", ", ")
    [row] = [line for line in ARCHITECTURE.splitlines() if line.startswith(f"| {vendor} |")]
    for door in contract["allowed_importers"]:
        room = ".".join(door.split(".")[:2])
        assert f"`{room}`" in row or f"`{door}`" in row, row


def test_every_layer_of_the_contracts_is_a_room_of_the_code() -> None:
    for contract in CONTRACTS:
        for container in contract.get("containers", ()):
            for room in (name.strip() for layer in contract["layers"] for name in layer.split(":")):
                place = ROOT / container / room
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{container}.{room}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_every_make_target_of_a_page_exists(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_every_file_and_setting_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`([a-z_/]+(?:\.py|\.md|/))`", text):
        assert (ROOT / name).exists(), name


def test_the_site_builds_with_every_link_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text())
        assert loaded == [], page
