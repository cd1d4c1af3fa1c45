"""Draws docs/rooms.svg from the code: the folders ("rooms"), their files, and their imports (`make picture`).

The layers come from import-linter's contracts in pyproject.toml. grimp finds the imports. A test compares a new drawing
with docs/rooms.svg, so the drawing is always up to date.
"""

from __future__ import annotations

import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "rooms.svg"
PACKAGES = ("orchestrator", "workers", "db")
COLOURS = {"orchestrator": "#2563eb", "workers": "#b45309", "db": "#15803d"}
WIDTH, MARGIN, GAP, LINE, HEAD = 1180, 24, 18, 15, 26
CHARACTER = 6.3  # of the files' type, in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """A package of a layer, or a file beside the packages. x, y, w, h: its box in pixels of the drawing."""

    name: str
    package: str
    files: tuple[str, ...]
    uses: tuple[str, ...]
    x: float
    y: float
    w: float
    h: float


def main() -> None:
    OUT.write_text(draw())
    sys.stdout.write(f"{OUT.relative_to(ROOT)} is drawn\n")


def draw() -> str:
    """The drawing as SVG."""
    used = uses()
    parts, y = [], float(MARGIN)
    for package in PACKAGES:
        top, boxes = y, []
        y += HEAD
        for layer in layers_of(package):
            placed = place(package, layer, used, y)
            boxes += [box(room) for room in placed]
            y += max(room.h for room in placed) + GAP
        parts.append(
            f'<rect x="{MARGIN / 2}" y="{top:.0f}" width="{WIDTH - MARGIN}" height="{y - top:.0f}" rx="8" '
            f'fill="{COLOURS[package]}" opacity="0.07"/>'
            f'<text x="{MARGIN}" y="{top + 18:.0f}" class="band" fill="{COLOURS[package]}">{package}/</text>'
        )
        parts += boxes
        y += GAP
    style = (
        ".band{font:bold 15px sans-serif}.room{font:bold 13px sans-serif}.file{font:11px sans-serif;fill:#333}"
        ".uses{font:italic 11px sans-serif;fill:#64748b}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}">'
        f"<title>Rooms of the code; each uses rooms below it alone</title><style>{style}</style>"
        '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def layers_of(package: str) -> list[list[str]]:
    """The package's layers, top first, each with the names of its rooms. db has one layer with all its files."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for contract in config["tool"]["importlinter"]["contracts"]:
        if contract.get("containers") == [package]:
            return [[f"{package}.{name.strip()}" for name in layer.split(":")] for layer in contract["layers"]]
    return [[package]]


def place(package: str, layer: list[str], used: dict[str, tuple[str, ...]], y: float) -> list[Room]:
    """The boxes of one layer side by side. A room with more files gets a wider box."""
    files = {name: files_of(name) for name in layer}
    weights = {name: 3 + len(files[name]) for name in layer}
    room_width = WIDTH - 2 * MARGIN - GAP * (len(layer) - 1)
    x, placed = float(MARGIN), []
    for name in layer:
        w = room_width * weights[name] / sum(weights.values())
        h = HEAD + LINE * (len(wrapped(files[name], w)) + len(wrapped(used[name], w))) + 4
        placed.append(Room(name=name, package=package, files=files[name], uses=used[name], x=x, y=y, w=w, h=h))
        x += w + GAP
    height = max(room.h for room in placed)
    return [replace(room, h=height) for room in placed]


def files_of(name: str) -> tuple[str, ...]:
    folder = ROOT / name.replace(".", "/")
    return tuple(sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")))


def wrapped(names: tuple[str, ...], width: float) -> list[str]:
    """The names, in lines that fit into the width."""
    rows = [""]
    for name in names:
        joined = f"{rows[-1]}, {name}" if rows[-1] else name
        if len(joined) * CHARACTER > width - 16 and rows[-1]:
            rows[-1] += ","
            rows.append(name)
        else:
            rows[-1] = joined
    return [row for row in rows if row]


def uses() -> dict[str, tuple[str, ...]]:
    """The rooms from which each room imports. Rooms of its own package come first, by their short name."""
    rooms = {name for package in PACKAGES for layer in layers_of(package) for name in layer}
    graph = grimp.build_graph(*PACKAGES)
    found = defaultdict[str, set[str]](set)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            start, end = room_of(module, rooms), room_of(imported, rooms)
            if start and end and start != end:
                found[start].add(end)
    return {name: in_words(name, found[name]) for name in rooms}


def in_words(room: str, used: set[str]) -> tuple[str, ...]:
    package = room.partition(".")[0]
    own = sorted(name.partition(".")[2] for name in used if name.startswith(f"{package}."))
    others = sorted(name for name in used if not name.startswith(f"{package}."))
    names = (*own, *others)
    return (f"uses {names[0]}", *names[1:]) if names else ()


def room_of(module: str, rooms: set[str]) -> str | None:
    parts = module.split(".")
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in rooms), None)


def box(room: Room) -> str:
    colour = COLOURS[room.package]
    lines = [("file", line) for line in wrapped(room.files, room.w)]
    lines += [("uses", line) for line in wrapped(room.uses, room.w)]
    texts = [
        f'<text x="{room.x + 8:.0f}" y="{room.y + HEAD + 11 + LINE * n:.0f}" class="{kind}">{escape(line)}</text>'
        for n, (kind, line) in enumerate(lines)
    ]
    return (
        f'<rect x="{room.x:.0f}" y="{room.y:.0f}" width="{room.w:.0f}" height="{room.h:.0f}" rx="5" fill="#fff" '
        f'stroke="{colour}"/><text x="{room.x + 8:.0f}" y="{room.y + 18:.0f}" class="room" fill="{colour}">'
        f"{room.name.rpartition('.')[2]}</text>" + "".join(texts)
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
