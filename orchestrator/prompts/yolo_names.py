"""What a YOLO data set says about its labels: class names and key points, from data.yaml, obj.names or classes.txt.

YAML's scalars are read as the text in the file. So no, null, 1.10 and 2024-01-01 can be class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from orchestrator.prompts.entries import PromptFileError, shown
from workers.class_names import ClassNamesError, Names, decode_text, names_of_lines, names_of_pairs, shallow
from workers.errors import AssetError, ErrorKind
from workers.storage.asset import Source
from workers.storage.source import open_source

YAML_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAMES_FILES = ("obj.names", "classes.txt", "classes.names", "_darknet.labels", "labels.txt")
_MOST_BYTES = 16 * 2**20
_FOLDERS_ABOVE = 2


class KeyPoints(NamedTuple):
    """kpt_shape of data.yaml. points: key points in a line. values: numbers of each (2: x y, 3: x y v)."""

    points: int
    values: int


class DataSet(NamedTuple):
    """names: None if no file has names. key_points: None if no data.yaml has kpt_shape."""

    names: Names | None
    key_points: KeyPoints | None


def read_data_sets(folder: str, labels: Source, s3_endpoint: str | None) -> dict[str, DataSet]:
    """The data set of each folder of `labels` that has such files. "" is `folder` itself; files in the two folders
    above it count too. A folder without names or key points takes those of the nearest folder above it.

    Raises PromptFileError for a file whose names cannot keep their numbers.
    """
    found = {"": _read_above(folder, s3_endpoint)}
    told = {*YAML_FILES, *NAMES_FILES}
    keys = (listed.key.rpartition("/") for page in labels.list() for listed in page.objects)
    for place in sorted({below for below, _, file_name in keys if below and file_name in told}):
        own = _read_place(labels, folder, f"{place}/")
        above = data_set_of(f"{place}/", found)
        found[place] = DataSet(names=own.names or above.names, key_points=own.key_points or above.key_points)
    return found


def data_set_of(name: str, data_sets: Mapping[str, DataSet]) -> DataSet:
    """The data set of a label file, by its name below the folder of `read_data_sets`."""
    return data_sets[place_of(name, data_sets)]


def place_of(name: str, data_sets: Mapping[str, DataSet]) -> str:
    """The nearest folder above a label file that has a data set."""
    place = name
    while place:
        place = place.rpartition("/")[0]
        if place in data_sets:
            return place
    return ""


def _read_above(folder: str, s3_endpoint: str | None) -> DataSet:
    names: Names | None = None
    key_points: KeyPoints | None = None
    for place in _places(folder.rstrip("/")):
        own = _read_place(open_source(place, s3_endpoint=s3_endpoint), place, "")
        names, key_points = names or own.names, key_points or own.key_points
        if names:
            break
    return DataSet(names=names, key_points=key_points or _key_points_above(folder, s3_endpoint))


def _key_points_above(folder: str, s3_endpoint: str | None) -> KeyPoints | None:
    """kpt_shape of the nearest folder with a data.yaml. A nearer classes.txt, which gave the names, cannot say it."""
    for place in _places(folder.rstrip("/")):
        source = open_source(place, s3_endpoint=s3_endpoint)
        documents = {f"{place}/{name}": _read_yaml(source, place, name) for name in YAML_FILES}
        if any(documents.values()):
            return next(filter(None, (_yaml_key_points(told, where) for where, told in documents.items())), None)
    return None


def _read_place(source: Source, place: str, prefix: str) -> DataSet:
    """The data set of one folder of a source. prefix: the folder, with its slash."""
    names: Names | None = None
    key_points: KeyPoints | None = None
    for file_name in YAML_FILES:
        document = _read_yaml(source, place, prefix + file_name)
        where = f"{place}/{prefix}{file_name}"
        names = names or _yaml_names(document, where)
        key_points = key_points or _yaml_key_points(document, where)
    for file_name in NAMES_FILES:
        names = names or _read_names(source, place, prefix + file_name)
    return DataSet(names=names, key_points=key_points)


def _places(folder: str) -> Iterator[str]:
    for _ in range(1 + _FOLDERS_ABOVE):
        if folder in ("", "s3:/"):
            return
        yield folder
        folder = folder.rpartition("/")[0]


def _read_text(source: Source, place: str, file_name: str) -> str | None:
    """The file's text. None if there is no such file, or if we may not read it."""
    try:
        return decode_text(source.read(file_name, _MOST_BYTES))
    except AssetError as error:
        if error.kind in (ErrorKind.NOT_FOUND, ErrorKind.FORBIDDEN):
            return None
        raise PromptFileError(f"{place}/{file_name}: {error}") from error
    except UnicodeDecodeError as error:
        raise PromptFileError(
            f"{place}/{file_name}: byte {error.start} is no UTF-8; save the file as UTF-8, so that names are read right"
        ) from error


def _read_names(source: Source, place: str, file_name: str) -> Names | None:
    text = _read_text(source, place, file_name)
    # An image may be called `labels` or `classes`. Then this is its label file, and begins with a number.
    if text is None or is_label_file(text):
        return None
    try:
        return names_of_lines(text) or None
    except ClassNamesError as error:
        raise PromptFileError(f"{place}/{file_name}: {error}") from error


def is_label_file(text: str) -> bool:
    """Whether a text begins with the numbers of a box. No list of names does."""
    words = text.split(maxsplit=5)
    try:
        return len([float(word) for word in words[:5]]) == 5
    except ValueError:
        return False


class _WrittenText(yaml.BaseLoader):  # type: ignore[misc]  # PyYAML has no types of its own
    """Reads every scalar as text. Refuses a class number that comes twice, or the last name would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        numbers = [key.value for key, _ in node.value if str(key.value).isdecimal()]
        if len(set(numbers)) < len(numbers):
            raise yaml.constructor.ConstructorError(None, None, "a class number comes twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _read_yaml(source: Source, place: str, file_name: str) -> dict[str, Any]:
    text = _read_text(source, place, file_name)
    try:
        document = yaml.load(shallow(text or ""), Loader=_WrittenText)  # noqa: S506  it makes text of every scalar
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PromptFileError(f"{place}/{file_name}: expected YAML with `names:` ({error})") from error
    return document if isinstance(document, dict) else {}


def _yaml_names(document: dict[str, Any], where: str) -> Names | None:
    told = document.get("names")
    if told in (None, "", [], {}):
        return None
    try:
        if isinstance(told, list):
            return names_of_pairs(list(enumerate(told)))
        if isinstance(told, dict):
            return names_of_pairs(list(told.items()))
        if document.get("nc") == "1":
            return names_of_pairs([(0, told)])
        raise ClassNamesError(f"{shown(told)} is one text, expected a list such as [car, dog], or 0: car")
    except ClassNamesError as error:
        raise PromptFileError(f"{where}: names: {error}") from error


def _yaml_key_points(document: dict[str, Any], where: str) -> KeyPoints | None:
    told = document.get("kpt_shape")
    if told is None:
        return None
    if isinstance(told, list) and len(told) == 2 and all(isinstance(n, str) and n.strip().isdecimal() for n in told):
        count, values = (int(n) for n in told)
        if 1 <= count <= 10_000 and values in (2, 3):
            return KeyPoints(points=count, values=values)
    raise PromptFileError(f"{where}: kpt_shape: {shown(told)}, expected [number of key points, 2 or 3]")
