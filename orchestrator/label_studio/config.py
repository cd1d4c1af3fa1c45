"""What a project's labeling config can hold: the controls our regions need, what is missing, whether a region fits.

Label Studio's import stores anything, and then its editor shows nothing or breaks. So we check before we send. A test
compares this with label_studio_sdk's LabelInterface, which takes 30 times as long for a brush.
"""

from __future__ import annotations

import math
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.label_studio.config_xml import read_config, write_config
from orchestrator.label_studio.errors import LabelStudioError
from orchestrator.label_studio.names import (
    BRUSH_CONTROL,
    DEFAULT_LABEL,
    IMAGE_CONTROL,
    POLYGON_CONTROL,
    RECTANGLE_CONTROL,
    RegionKind,
)
from orchestrator.label_studio.prompt_controls import is_prompt_control
from orchestrator.shapes.colours import label_colour

_TAGS = {POLYGON_CONTROL: "PolygonLabels", BRUSH_CONTROL: "BrushLabels", RECTANGLE_CONTROL: "RectangleLabels"}
ALL_KINDS = tuple(_TAGS)
NEEDED_KINDS: Mapping[RegionKind, tuple[str, ...]] = {
    "auto": (POLYGON_CONTROL, BRUSH_CONTROL),
    "polygon": (POLYGON_CONTROL,),
    "brush": (BRUSH_CONTROL,),
    "rectangle": (RECTANGLE_CONTROL,),
}
TASK_FIELDS = ("asset_id", "width", "height")  # fields of a task's data, beside the image's address
_IMAGE_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
# How Label Studio reads variables. Its page takes a value as a variable only if the whole value is one. Its import
# requires the variables of every tag with a name, also those in the middle of a value.
_VARIABLE = re.compile(r"\$([\w.\[\]{}]+)")
_VARIABLE_ATTRIBUTES = ("value", "valueList", "on")
_LITERAL_TAGS = ("Label", "Choice", "Relation")  # their value is a name; a `$word` in it is only shown blank


class ConfigError(LabelStudioError):
    """A project's labeling config cannot hold the job's regions. The message has the lines to add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A tag that holds regions of one kind: its name, its image's name, and the labels it offers."""

    name: str
    to_name: str
    labels: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """The controls of a config that we use, by kind; their image's name; and the field of a task's data that holds the
    image's address."""

    by_kind: Mapping[str, Control]
    image_name: str
    image_field: str


def find_controls(label_config: str) -> Controls:
    """Read a labeling config: the first control of each kind on its first image.

    Raises ConfigError if there is no image, or a variable that our tasks do not have.
    """
    try:
        root = ElementTree.fromstring(label_config)  # noqa: S314  no entities: expat here is 2.4.1 or newer
    except ElementTree.ParseError as error:
        raise ConfigError(f"the project's labeling config is no XML: {error}") from error
    image = root.find(".//Image")
    variable = _IMAGE_VARIABLE.fullmatch(image.get("value", "")) if image is not None else None
    if image is None or variable is None:
        raise ConfigError(f'the labeling config has no image: add <Image name="{IMAGE_CONTROL}" value="$image"/>')
    carried = {variable[1], *TASK_FIELDS}
    wanted = {name for tag in root.iter() for name in _variables(tag)}
    if wanted - carried:
        names = ", ".join(f"${name}" for name in sorted(wanted - carried))
        raise ConfigError(f"the labeling config wants {names}, which published tasks do not have: take the tags out")
    by_kind = {}
    for kind, tag in _TAGS.items():
        for element in root.iter(tag):
            if is_prompt_control(element) or kind in by_kind:
                continue
            if image.get("name") in element.get("toName", "").split(","):
                by_kind[kind] = Control(
                    name=element.get("name", ""), to_name=image.get("name", ""), labels=frozenset(_labels(element))
                )
    return Controls(by_kind=by_kind, image_name=image.get("name", ""), image_field=variable[1])


def _variables(tag: ElementTree.Element) -> Iterable[str]:
    """The fields of a task's data from which a tag takes its content."""
    named = tag.get("name") is not None
    if tag.tag in _LITERAL_TAGS and not named:
        return
    for attribute in _VARIABLE_ATTRIBUTES:
        value = tag.get(attribute, "")
        found = _VARIABLE.fullmatch(value) or (_VARIABLE.search(value) if named and attribute == "value" else None)
        if found:
            yield re.split(r"[.\[{]", found[1])[0]


def missing_lines(controls: Controls, *, kinds: Iterable[str], labels: Iterable[str]) -> list[str]:
    """The lines of XML to add to a config so that it holds regions of these kinds and labels; none if it does.

    A missing control is given whole. A missing label is given below the name of its control.
    """
    lines: list[str] = []
    for kind in kinds:
        control = controls.by_kind.get(kind)
        new = [label for label in labels if control is None or label not in control.labels]
        tags = [f"  {_label_tag(label)}" for label in new]
        if control is None:
            lines += [f'<{_TAGS[kind]} name="{kind}" toName="{controls.image_name}">', *tags, f"</{_TAGS[kind]}>"]
        elif new:
            lines += [f'in <{_TAGS[kind]} name="{control.name}">:', *tags]
    return lines


def require_controls(controls: Controls, *, as_: RegionKind, labels: Sequence[str]) -> None:
    """Raise ConfigError, with the lines to add, if a control is missing that this kind of region needs."""
    if all(kind in controls.by_kind for kind in NEEDED_KINDS[as_]):
        return
    lines = "\n".join(missing_lines(controls, kinds=NEEDED_KINDS[as_], labels=labels))
    raise ConfigError(
        f"the labeling config cannot hold --as {as_}. Add to it (Settings, Labeling Interface, Code):\n{lines}\n"
        "or let `maskfleet label-studio setup --project ID --update-config` do so"
    )


def address_regions(controls: Controls, result: Iterable[dict[str, Any]]) -> None:
    """Set the names of controls and image in regions of `regions_for` to those of the project's config."""
    for region in result:
        control = controls.by_kind.get(region["type"].removesuffix("labels"))
        if control is not None:
            region["from_name"], region["to_name"] = control.name, control.to_name


def faults(controls: Controls, prediction: Mapping[str, Any]) -> list[str]:
    """What in our prediction does not fit the config: each problem once, in the order found."""
    found = dict.fromkeys(fault for region in prediction["result"] for fault in _region_faults(controls, region))
    if not 0 <= prediction["score"] <= 1:
        found[f"score {prediction['score']!r} is outside 0..1"] = None
    return list(found)


def merge_config(label_config: str, *, kinds: Iterable[str], labels: Sequence[str]) -> str:
    """Add the lines of `missing_lines` to a config, and change nothing else."""
    root = read_config(label_config)
    controls = find_controls(label_config)
    for kind in kinds:
        control = controls.by_kind.get(kind)
        element = next((e for e in root.iter(_TAGS[kind]) if control and e.get("name") == control.name), None)
        if element is None:
            element = ElementTree.SubElement(
                root, _TAGS[kind], {"name": _free_name(root, kind), "toName": controls.image_name}
            )
        for label in labels:
            if control is None or label not in control.labels:
                ElementTree.SubElement(element, "Label", {"value": label, "background": label_colour(label)})
    return write_config(root, label_config)


def _region_faults(controls: Controls, region: Mapping[str, Any]) -> Iterable[str]:
    kind = region["type"].removesuffix("labels")
    control = controls.by_kind.get(kind)
    if control is None or (control.name, control.to_name) != (region["from_name"], region["to_name"]):
        yield f"the labeling config has no {_TAGS.get(kind, region['type'])}"
        return
    value = region["value"]
    for label in value[region["type"]]:
        if label not in control.labels:
            yield f'label {label!r} is not in <{_TAGS[kind]} name="{control.name}"> of the labeling config'
    if not _is_drawable(kind, value):
        yield f"region {region['id']}: its {kind} has numbers that are none, or outside 0..100 %"


def _is_drawable(kind: str, value: Mapping[str, Any]) -> bool:
    if kind == BRUSH_CONTROL:
        return value["format"] == "rle" and len(value["rle"]) > 0
    if kind == RECTANGLE_CONTROL:
        return all(math.isfinite(value[name]) and 0 <= value[name] <= 100 for name in ("x", "y", "width", "height"))
    # NaN fails both comparisons, so it counts as outside.
    return len(value["points"]) >= 3 and all(0 <= x <= 100 and 0 <= y <= 100 for x, y in value["points"])


def _labels(control: ElementTree.Element) -> Iterable[str]:
    for label in control.iter("Label"):
        yield label.get("alias") or label.get("value") or ""


def _label_tag(label: str) -> str:
    element = ElementTree.Element("Label", {"value": label, "background": label_colour(label)})
    return ElementTree.tostring(element, encoding="unicode")


def _free_name(root: ElementTree.Element, name: str) -> str:
    taken = {element.get("name") for element in root.iter()}
    return next(free for free in (name, *(f"{name}{n}" for n in range(2, 1000))) if free not in taken)


def label_config(labels: Sequence[str]) -> str:
    """Write the labeling config: polygons, brush and rectangles with the same labels and colours, as XML.

    Without labels, it has the one label of masks that have none. Raises ValueError for a label that XML cannot hold.
    """
    view = ElementTree.Element("View")
    image = {"name": IMAGE_CONTROL, "value": "$image", "zoom": "true", "zoomControl": "true", "rotateControl": "false"}
    ElementTree.SubElement(view, "Image", image)
    for tag, name in (
        ("PolygonLabels", POLYGON_CONTROL),
        ("BrushLabels", BRUSH_CONTROL),
        ("RectangleLabels", RECTANGLE_CONTROL),
    ):
        control = ElementTree.SubElement(view, tag, {"name": name, "toName": IMAGE_CONTROL})
        for label in dict.fromkeys(labels or [DEFAULT_LABEL]):
            _check_label(label)
            ElementTree.SubElement(control, "Label", {"value": label, "background": label_colour(label)})
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode")


def _check_label(label: str) -> None:
    # "Unassigned" characters stay: XML allows emoji that are newer than Python's tables.
    if not label.strip() or any(unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff" for c in label):
        raise ValueError(f"label {label!r}: empty, or with control characters that Label Studio's config cannot carry")
