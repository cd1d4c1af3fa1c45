"""COCO files as prompts: the boxes of an instances file, with its categories as labels, or of a detections file.

Boxes are COCO's [x, y, width, height] in pixels. An instances file says the size of each image, by which boxes are
scaled where the asset is larger or smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal, NamedTuple

import ijson

from db.states import PromptMatch
from orchestrator.prompts.entries import BadEntry, Entry, PromptFileError, Reader, shown

_OURS = {"key", "prompts"}
_COCO = {"images", "annotations", "categories"}
_BOM = b"\xef\xbb\xbf"


class _Image(NamedTuple):
    file_name: str
    size_wh: list[int] | None


def kind_of(file: IO[bytes]) -> Literal["instances", "detections", ""]:
    """Which COCO file this is, by its first names; "" for anything else. Leaves the file at its start."""
    try:
        for prefix, event, value in ijson.parse(_from_start(file), multiple_values=True):
            if prefix == "" and event == "start_array":
                return "detections"
            if prefix == "" and event == "map_key" and value in _COCO:
                return "instances"
            if prefix == "" and (event in ("end_map", "string", "number") or value in _OURS):
                return ""
    except ijson.JSONError:
        return ""
    finally:
        file.seek(0)
    return ""


def read_instances(file: IO[bytes], name: str) -> Reader:
    """Every annotation's box; image names are compared with whole keys."""
    return Reader(file_format="coco-instances", match=PromptMatch.KEY, entries=_instances(file, name))


def read_detections(file: IO[bytes], name: str) -> Reader:
    """Every detection's box. Its image is said by `file_name`, or by `image_id`: a key, a key without suffix, or the
    number that is the file's name."""
    try:
        first = next(iter(_items(file, name, "item")), {})
    except PromptFileError:
        first = {}
    match = _match_of(first)
    return Reader(file_format="coco-detections", match=match, entries=_detections(file, name, match))


def _instances(file: IO[bytes], name: str) -> Iterator[Entry | BadEntry]:
    images = {image.get("id"): _image_of(image) for image in _items(file, name, "images.item")}
    labels = {category.get("id"): category.get("name") for category in _items(file, name, "categories.item")}
    for number, annotation in enumerate(_items(file, name, "annotations.item"), start=1):
        where = f"{name}, annotation {number}"
        image = images.get(annotation.get("image_id"))
        if image is None or not isinstance(image.file_name, str):
            yield BadEntry(where, f"image_id {shown(annotation.get('image_id'))} has no file_name among the images")
            continue
        category = annotation.get("category_id")
        asked = _prompt_of(annotation, labels.get(category, None if category is None else str(category)))
        yield Entry(where, image.file_name, [{**asked, "size_wh": image.size_wh} if isinstance(asked, dict) else asked])


def _detections(file: IO[bytes], name: str, match: PromptMatch) -> Iterator[Entry | BadEntry]:
    for number, detection in enumerate(_items(file, name, "item"), start=1):
        where = f"{name}, detection {number}"
        named = detection.get("file_name", detection.get("image_id"))
        if not isinstance(named, str | int) or _match_of(detection) is not match:
            yield BadEntry(where, f"image_id {shown(detection.get('image_id'))}, expected one such as the first's")
            continue
        key = str(named)
        category = detection.get("category_id")
        label = detection.get("category_name", None if category is None else str(category))
        yield Entry(where, key.lstrip("0") if match is PromptMatch.NUMBER else key, [_prompt_of(detection, label)])


def _match_of(detection: Mapping[str, Any]) -> PromptMatch:
    named = detection.get("file_name", detection.get("image_id"))
    if isinstance(named, int):
        return PromptMatch.NUMBER
    is_key = "file_name" in detection or "." in str(named).rpartition("/")[2]
    return PromptMatch.KEY if is_key else PromptMatch.STEM


def _image_of(image: Mapping[str, Any]) -> _Image:
    size = [image.get("width"), image.get("height")]
    # Writers that do not know the size put 0 or 1.
    known = all(isinstance(side, int | float) and side > 1 for side in size)
    return _Image(file_name=image.get("file_name", ""), size_wh=size if known else None)  # type: ignore[arg-type]


def _prompt_of(annotation: Mapping[str, Any], label: object) -> object:
    """What `parse_prompt` reads; it says what is wrong with the box, in the order in which the file has it."""
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box):
        x, y, width, height = box
        box = [x, y, x + width, y + height]
    asked = {"label": label, "box_xyxy": box if box is not None else [], "score": annotation.get("score")}
    return {name: value for name, value in asked.items() if value is not None}


def _items(file: IO[bytes], name: str, prefix: str) -> Iterator[Mapping[str, Any]]:
    """The objects of one list of the document, one at a time."""
    try:
        for item in ijson.items(_from_start(file), prefix, use_float=True):
            yield item if isinstance(item, dict) else {}
    except ijson.JSONError as error:
        raise PromptFileError(f"{name}: damaged JSON ({error}); expected a COCO document") from error


def _from_start(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return file
