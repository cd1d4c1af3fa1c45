"""A folder of YOLO labels as prompts: `a/b.txt` holds the boxes of the image `a/b` of any suffix.

A line is a class number and a box, `class x y width height`, fractions of the image, centre first; or a class number
and a polygon, of which the box is taken. Class names come from data.yaml or classes.txt, in the folder or above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from db.states import PromptMatch
from orchestrator.prompts.entries import BadEntry, Entry, PromptFileError, Reader, shown
from workers.errors import AssetError, ErrorKind, TransientError
from workers.prompts import PromptError
from workers.storage.asset import Source
from workers.storage.source import open_source

_FRACTIONS = [1, 1]  # a prompt's size_wh
_NAMES_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt")
_MOST_BYTES = 16 * 2**20

Names = dict[int, str]


def read(address: str, *, source: str, s3_endpoint: str | None) -> Reader:
    """The labels below a folder or s3:// prefix, for images of `source`, in key order.

    Raises PromptFileError where nothing below is a text file, SourceError where it cannot be listed.
    """
    folder = address if "://" in address else _absolute(address)
    names = _class_names(folder, s3_endpoint)
    entries = _entries(open_source(folder, s3_endpoint=s3_endpoint), folder.rstrip("/"), source.rstrip("/"), names)
    return Reader(file_format="yolo", match=PromptMatch.STEM, entries=entries)


def _entries(labels: Source, folder: str, source: str, names: Names | None) -> Iterator[Entry | BadEntry]:
    seen = 0
    for page in labels.list():
        for listed in page.objects:
            if not listed.key.endswith(".txt") or listed.key.rpartition("/")[2] in _NAMES_FILES:
                continue
            seen += 1
            try:
                content = labels.read(listed.key, _MOST_BYTES).decode("utf-8-sig")
            except (AssetError, TransientError, UnicodeDecodeError) as error:
                yield BadEntry(listed.key, f"cannot be read: {error}")
                continue
            yield from _file_entries(listed.key, _stem_of(listed.key, folder, source), content, names)
    if not seen:
        raise PromptFileError(f"{folder}: no .txt file below it, expected YOLO's labels, or the name of a prompt file")


def _file_entries(name: str, stem: str, content: str, names: Names | None) -> Iterator[Entry]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield Entry(f"{name}:{number}", stem, [_prompt_of(line, names)])


def _prompt_of(line: str, names: Names | None) -> dict[str, Any] | PromptError:
    fields = line.split()
    try:
        number, values = int(fields[0]), [float(value) for value in fields[1:]]
    except ValueError:
        values = []
    if not values or (len(values) not in (4, 5) and (len(values) < 6 or len(values) % 2)):
        return PromptError(f"{shown(line)}, expected `class x y width height` or `class x1 y1 x2 y2 x3 y3 …`")
    if names is not None and number not in names:
        return PromptError(f"class {number} has no name; known are {', '.join(map(str, sorted(names))) or 'none'}")
    asked = {"label": names[number] if names else str(number), "size_wh": _FRACTIONS}
    if len(values) > 5:
        return {**asked, "box_xyxy": [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]}
    x, y, width, height = values[:4]
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return {**asked, "box_xyxy": box, **({"score": values[4]} if len(values) == 5 else {})}


def _stem_of(name: str, folder: str, source: str) -> str:
    """The image's key without suffix, for a label file `name` of a folder.

    YOLO's layout has …/labels/a/b.txt beside …/images/a/b.jpg, and the source may be any folder of the latter. Labels
    that lie elsewhere are arranged as the images in the source are.
    """
    path = f"{folder}/{name.removesuffix('.txt')}"
    before, found, after = path.rpartition("/labels/")
    for candidate in ([f"{before}/images/{after}"] if found else []) + [path]:
        if candidate.startswith(source + "/"):
            return candidate.removeprefix(source + "/")
    return name.removesuffix(".txt").removeprefix("labels/")


def _class_names(folder: str, s3_endpoint: str | None) -> Names | None:
    """The names of the nearest file that has some, up to two folders above; None where there is none."""
    place = folder.rstrip("/")
    for _ in range(3):
        if place in ("", "s3:/"):
            break
        opened = open_source(place, s3_endpoint=s3_endpoint)
        for file_name in _NAMES_FILES:
            names = _read_names(opened, place, file_name)
            if names:
                return names
        place = place.rpartition("/")[0]
    return None


def _read_names(source: Source, place: str, file_name: str) -> Names | None:
    try:
        content = source.read(file_name, _MOST_BYTES).decode("utf-8-sig")
        if file_name.endswith(".txt"):
            return {n: line.strip() for n, line in enumerate(content.splitlines()) if line.strip()}
        document = yaml.safe_load(content)
        names = document.get("names") if isinstance(document, dict) else None
        pairs = names.items() if isinstance(names, dict) else enumerate(names or [])
        return {int(number): str(name) for number, name in pairs}
    except AssetError as error:
        if error.kind in (ErrorKind.NOT_FOUND, ErrorKind.FORBIDDEN):
            return None
        raise PromptFileError(f"{place}/{file_name}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise PromptFileError(f"{place}/{file_name}: expected `names:` with the classes ({error})") from error


def _absolute(address: str) -> str:
    from pathlib import Path

    return str(Path(address).expanduser().absolute())
