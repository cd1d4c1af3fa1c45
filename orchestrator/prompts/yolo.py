"""A folder of YOLO labels as prompts: `a/b.txt` holds the boxes of the image `a/b` of any suffix, one a line.

Lines are read twice. First they are copied to a temporary file and their forms are counted. The counts decide the form
of lines that allow several (see yolo_lines). Lists of images, class names and texts for people lie beside labels. They
are not used, and reported by name.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO, Any

from orchestrator.prompts.entries import BadEntry, Entry, PassedOver, PromptFileError, Reader, shown
from orchestrator.prompts.yolo_lines import Forms, alone, decide, parse_line, readings
from orchestrator.prompts.yolo_names import (
    NAMES_FILES,
    DataSet,
    data_set_of,
    is_label_file,
    place_of,
    read_data_sets,
)
from workers.class_names import decode_text
from workers.errors import AssetError, TransientError
from workers.paths import own_path
from workers.prompts import PromptError
from workers.storage.asset import Source
from workers.storage.source import open_source

_FRACTIONS = [1, 1]  # a prompt's size_wh
_MOST_BYTES = 64 * 2**20
_LINE, _EMPTY = "line", "empty"  # kinds of lines in the temporary file


def read(address: str, *, source: str, s3_endpoint: str | None) -> Reader:
    """The labels below a folder or s3:// prefix, for images of `source`, in key order.

    Raises PromptFileError if there is no label file below, SourceError if the folder cannot be listed.
    """
    folder = address if "://" in address else str(own_path(address).absolute())
    labels = open_source(folder, s3_endpoint=s3_endpoint)
    data_sets = read_data_sets(folder.rstrip("/"), labels, s3_endpoint)
    entries = _entries(labels, folder.rstrip("/"), source.rstrip("/"), data_sets)
    return Reader(file_format="yolo", entries=entries)


def _entries(
    labels: Source, folder: str, source: str, data_sets: Mapping[str, DataSet]
) -> Iterator[Entry | BadEntry | PassedOver]:
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as lines:
        forms: dict[str, Forms] = {place: Counter() for place in data_sets}
        seen = 0
        for name in _text_files(labels):
            found = _read_file(labels, name)
            if isinstance(found, BadEntry | PassedOver):
                yield found
                seen += isinstance(found, BadEntry)
                continue
            seen += 1
            forms[place_of(name, data_sets)] += _copy_lines(name, found, lines, data_set_of(name, data_sets))
        if not seen:
            raise PromptFileError(
                f"{folder}: no label file below it, expected YOLO's .txt files of lines such as `0 0.5 0.5 0.2 0.4`, "
                "or the name of a prompt file"
            )
        lines.seek(0)
        for line in lines:
            kind, name, number, text = line.rstrip("\n").split("\t", 3)
            key = _key_of(name, folder, source)
            if kind == _EMPTY:
                yield Entry(name, key, [])
                continue
            place = place_of(name, data_sets)
            yield Entry(f"{name}:{number}", key, [_prompt_of(text, forms[place], data_sets[place])])


def _text_files(labels: Source) -> Iterator[str]:
    for page in labels.list():
        for listed in page.objects:
            file_name = listed.key.rpartition("/")[2]
            # `._a.txt` is what macOS keeps beside a.txt on other systems' disks.
            if file_name.lower().endswith(".txt") and not file_name.startswith("._"):
                yield listed.key


def _read_file(labels: Source, name: str) -> list[str] | BadEntry | PassedOver:
    """The lines of a label file, or why they cannot be read."""
    if "\t" in name or "\n" in name:
        return BadEntry(shown(name), "a file name with a tab or a line break, expected none")
    try:
        text = decode_text(labels.read(name, _MOST_BYTES))
    except (AssetError, TransientError, UnicodeDecodeError) as error:
        return BadEntry(name, f"cannot be read: {error}")
    lines = text.split("\n")
    # Class names may be 0, 1, 2.
    is_names_file = name.rpartition("/")[2] in NAMES_FILES and not is_label_file(text)
    return PassedOver(name) if is_names_file or _is_no_label_file(lines) else lines


def _is_no_label_file(lines: list[str]) -> bool:
    """Whether a file is a list, class names or a text: no line begins with a number or has a box's four numbers."""
    words = [line.split() for line in lines if line.strip()]
    return bool(words) and not any(_is_number(line[0]) or sum(map(_is_number, line)) >= 4 for line in words)


def _copy_lines(name: str, lines: list[str], into: IO[str], data_set: DataSet) -> Forms:
    """Copy a file's lines, and count the forms of the lines that allow only one."""
    forms: Forms = Counter()
    written = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in written:
        into.write(f"{_LINE}\t{name}\t{number}\t{' '.join(line.split())}\n")
        try:
            form = alone(readings(parse_line(line), data_set.key_points))
        except PromptError:
            continue
        if form is not None:
            forms[form] += 1
    if not written:
        into.write(f"{_EMPTY}\t{name}\t0\t\n")
    return forms


def _prompt_of(text: str, forms: Forms, data_set: DataSet) -> dict[str, Any] | PromptError:
    try:
        line = parse_line(text)
        found = decide(line, readings(line, data_set.key_points), forms, data_set.key_points)
        label = _label(line.class_number, data_set)
    except PromptError as error:
        return error
    asked = {"label": label, "size_wh": _FRACTIONS, "box_xyxy": list(found.box_xyxy)}
    return asked if found.score is None else {**asked, "score": found.score}


def _label(number: int, data_set: DataSet) -> str:
    names = data_set.names
    if names is None:
        return str(number)
    if number not in names:
        known = ", ".join(map(str, sorted(names)[:20])) + (", …" if len(names) > 20 else "")
        raise PromptError(f"class {number} has no name; known are {known}")
    return names[number]


def _key_of(name: str, folder: str, source: str) -> str:
    """The image's key without suffix, for a label file `name` of a folder.

    In YOLO's layout, …/labels/a/b.txt lies beside …/images/a/b.jpg. The source may be any folder of that images path.
    Labels in other places have the same folders below them as the images in the source.
    """
    stem = name[: -len(".txt")]
    path = f"{folder}/{stem}"
    before, found, after = path.rpartition("/labels/")
    for candidate in ([f"{before}/images/{after}"] if found else []) + [path]:
        if candidate.startswith(source + "/"):
            return candidate.removeprefix(source + "/")
    return stem.removeprefix("labels/")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
