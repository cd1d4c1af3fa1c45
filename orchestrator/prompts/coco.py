"""COCO files as prompts: the boxes of an instances file, with its categories as labels, or of a detections file.

Boxes are COCO's [x, y, width, height] in pixels. An instances file gives the size of each image. If the asset is larger
or smaller, its boxes are scaled. An entry that cannot be read is reported, and the others are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal, NamedTuple

import ijson

from orchestrator.prompts.coco_boxes import box_of
from orchestrator.prompts.entries import BadEntry, Entry, Reader, shown
from orchestrator.prompts.json_items import from_start, items
from workers.prompts import PromptError

_OURS = {"key", "prompts"}
_COCO = {"images", "annotations", "categories"}

Labels = dict[str, str | PromptError]
"""Category number -> name, or why there is no valid name."""

Kind = Literal["instances", "detections", "our-array", ""]


class _Image(NamedTuple):
    """file_name: None if several images have this id."""

    file_name: str | None
    size_wh: list[float] | None


_SEVERAL = _Image(file_name=None, size_wh=None)


def kind_of(file: IO[bytes]) -> Kind:
    """Which JSON document this is, by its first keys; "" for anything else. Leaves the file at its start."""
    is_array = False
    try:
        for prefix, event, value in ijson.parse(from_start(file), multiple_values=True):
            if prefix == "" and event == "start_array":
                is_array = True
            elif is_array and event == "map_key" and prefix == "item":
                return "our-array" if value in _OURS else "detections"
            elif is_array and prefix == "" and event == "end_array":
                return "detections"
            elif prefix == "" and event == "map_key" and value in _COCO:
                return "instances"
            elif prefix == "" and (event in ("end_map", "string", "number") or value in _OURS):
                return ""
    except (ijson.JSONError, UnicodeDecodeError):
        return "detections" if is_array else ""
    finally:
        file.seek(0)
    return ""


def read_instances(file: IO[bytes], name: str) -> Reader:
    """The box of every annotation, for the image of its image_id."""
    return Reader(file_format="coco-instances", entries=_instances(file, name))


def read_detections(file: IO[bytes], name: str) -> Reader:
    """The box of every detection. `file_name` names its image, or `image_id` does: a name, a name without suffix, or a
    number."""
    return Reader(file_format="coco-detections", entries=_detections(file, name))


def _instances(file: IO[bytes], name: str) -> Iterator[Entry | BadEntry]:
    images: dict[str, _Image] = {}
    for number, image in enumerate(items(file, name, "images.item"), start=1):
        found = _image_of(image)
        if isinstance(found, str):
            yield BadEntry(f"{name}, image {number}", found)
            continue
        image_id = _id_of(image["id"]) or ""
        images[image_id] = found if images.get(image_id, found) == found else _SEVERAL
    labels: Labels = {}
    for number, category in enumerate(items(file, name, "categories.item"), start=1):
        category_id = _id_of(category.get("id")) if isinstance(category, dict) else None
        if category_id is None:
            yield BadEntry(f"{name}, category {number}", f"{shown(category)}, expected an object with id and name")
            continue
        label = _name_of(category_id, category.get("name"))
        if str(labels.get(category_id, label)) != str(label):
            label = PromptError(f"category_id {category_id} has two names among the categories, expected one")
        labels[category_id] = label
    for number, annotation in enumerate(items(file, name, "annotations.item"), start=1):
        yield _annotation(f"{name}, annotation {number}", annotation, images, labels)


def _annotation(where: str, annotation: object, images: Mapping[str, _Image], labels: Labels) -> Entry | BadEntry:
    if not isinstance(annotation, dict):
        return BadEntry(where, f"{shown(annotation)}, expected an object with image_id and bbox")
    image = images.get(_id_of(annotation.get("image_id")) or "")
    if image is None:
        return BadEntry(where, f"image_id {shown(annotation.get('image_id'))} has no file_name among the images")
    if image.file_name is None:
        return BadEntry(where, f"image_id {shown(annotation.get('image_id'))} has two file names among the images")
    try:
        asked = _prompt_of(annotation, _label_of(annotation.get("category_id"), labels))
    except PromptError as error:
        return Entry(where, image.file_name, [error])
    return Entry(where, image.file_name, [{"size_wh": image.size_wh, **asked}])


def _detections(file: IO[bytes], name: str) -> Iterator[Entry | BadEntry]:
    for number, detection in enumerate(items(file, name, "item"), start=1):
        where = f"{name}, detection {number}"
        if not isinstance(detection, dict):
            yield BadEntry(where, f"{shown(detection)}, expected an object with image_id and bbox")
            continue
        file_name = detection.get("file_name")
        key = file_name if isinstance(file_name, str) and file_name else _id_of(detection.get("image_id"))
        if key is None:
            found = shown(detection.get("image_id"))
            yield BadEntry(where, f"image_id {found}, expected the image's number, its name, or file_name")
            continue
        try:
            asked: object = _prompt_of(detection, _detected_label(detection))
        except PromptError as error:
            asked = error
        yield Entry(where, key, [asked])


def _detected_label(detection: Mapping[str, Any]) -> str | None:
    name = detection.get("category_name")
    return name if isinstance(name, str) and name.strip() else _label_of(detection.get("category_id"), {})


def _label_of(category: object, labels: Labels) -> str | None:
    """A category's name, or its number if it has no name. Raises PromptError if `category` is not the number of a
    category."""
    if category is None:
        return None
    category_id = _id_of(category)
    if category_id is None:
        raise PromptError(f"category_id {shown(category)}, expected one number")
    label = labels.get(category_id, category_id)
    if isinstance(label, PromptError):
        raise label
    return label


def _image_of(image: object) -> _Image | str:
    """An image's name and size, or what is wrong with them."""
    if not isinstance(image, dict):
        return f"{shown(image)}, expected an object with id and file_name"
    if _id_of(image.get("id")) is None:
        return f"id {shown(image.get('id'))}, expected one number"
    file_name = image.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        return f"file_name {shown(file_name)}, expected the image's name"
    sides = [image.get("width"), image.get("height")]
    # Programs that do not know the size write 0 or 1.
    known = [float(side) for side in sides if isinstance(side, int | float) and 1 < side < 1e9]
    return _Image(file_name=file_name, size_wh=known if len(known) == 2 else None)


def _name_of(category_id: str, name: object) -> str | PromptError:
    """A category's name, or its number if it has no name; else why neither is valid."""
    if name is None or (isinstance(name, str) and not name.strip()):
        return category_id
    if isinstance(name, int) and not isinstance(name, bool):
        return _id_of(name) or category_id
    if isinstance(name, str):
        return name
    return PromptError(f"category_id {category_id} is named {shown(name)}, expected text; write it in quotes")


def _prompt_of(annotation: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    """The form that `parse_prompt` reads. Raises PromptError if there is no box."""
    found = box_of(annotation)
    asked = {
        "label": label,
        "box_xyxy": list(found.box_xyxy),
        "score": annotation.get("score"),
        "size_wh": found.size_wh,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _id_of(value: object) -> str | None:
    """An id as text: a number of any length, a whole float, or text. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float):
        return str(int(value)) if value == value // 1 and abs(value) < 2**53 else None
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python refuses to print numbers that long
        return None
    return str(value) or None
