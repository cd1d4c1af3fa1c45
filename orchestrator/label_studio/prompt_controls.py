"""The smart controls of a labeling config: what a reviewer clicks and draws to ask `maskfleet assist` for a mask.

They are apart from the controls that hold results. A prompt may stay in a submitted annotation, and then only its
control's name tells it from a region that a person drew. All three share one row of labels: the editor shows one row
for each control that has labels of its own.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence

from orchestrator.label_studio.config_xml import read_config, write_config
from orchestrator.label_studio.names import BOX_CONTROL, CLICK_CONTROL, PICK_CONTROL, PROMPT_LABELS
from orchestrator.shapes.colours import label_colour

# In the order of the editor's menu of smart tools.
_TAGS = {CLICK_CONTROL: "KeyPoint", BOX_CONTROL: "Rectangle", PICK_CONTROL: "KeyPoint"}
PROMPT_CONTROLS = tuple(_TAGS)
_RESULT_TAGS = ("PolygonLabels", "BrushLabels", "RectangleLabels")


def is_prompt_control(element: ElementTree.Element) -> bool:
    """Whether the tag is one of the smart controls that `add_prompt_controls` adds."""
    name = element.get("name", "")
    return _TAGS.get(name) in (element.tag, element.tag.removesuffix("Labels")) and element.get("smart") == "true"


def prompt_controls(label_config: str) -> frozenset[str]:
    """The names of a config's prompt controls, and of their row of labels. Empty for a config that is no XML."""
    try:
        root = ElementTree.fromstring(label_config)  # noqa: S314  no entities: expat here is 2.4.1 or newer
    except ElementTree.ParseError:
        return frozenset()
    names = {element.get("name", "") for element in root.iter() if is_prompt_control(element)}
    return frozenset(names | {PROMPT_LABELS}) if names else frozenset()


def add_prompt_controls(label_config: str, labels: Sequence[str], *, image_name: str) -> str:
    """Add the smart controls, and every label to their row. What is there already stays.

    Other controls are no longer smart: in Label Studio each is, unless its tag says otherwise. Raises ValueError if
    another tag has one of the names.
    """
    root = read_config(label_config)
    before = ElementTree.tostring(root)
    for element in root.iter():
        if element.tag in _RESULT_TAGS:
            element.set("smart", "false")
    row = _named(root, PROMPT_LABELS, "Labels")
    if row is None:
        row = ElementTree.Element("Labels", {"name": PROMPT_LABELS, "toName": image_name})
        _insert_before_results(root, row)
    present = {label.get("value") for label in row.iter("Label")}
    for label in dict.fromkeys([*_labels(root), *labels]):
        if label not in present:
            ElementTree.SubElement(row, "Label", {"value": label, "background": label_colour(label)})
    for name, tag in _TAGS.items():
        if _named(root, name, tag) is None:
            # smartonly: without it, the toolbar has an ordinary tool besides, whose regions would be lost as prompts.
            attributes = {"name": name, "toName": image_name, "smart": "true", "smartonly": "true"}
            ElementTree.SubElement(root, tag, attributes)
    if ElementTree.tostring(root) == before:
        return label_config
    return write_config(root, label_config)


def _insert_before_results(root: ElementTree.Element, row: ElementTree.Element) -> None:
    """Put the row of labels before the first control that holds results: it is then in sight, with the first keys."""
    for parent in root.iter():
        for place, element in enumerate(parent):
            if element.tag in _RESULT_TAGS:
                parent.insert(place, row)
                return
    root.append(row)


def _named(root: ElementTree.Element, name: str, tag: str) -> ElementTree.Element | None:
    found = next((element for element in root.iter() if element.get("name") == name), None)
    if found is not None and (found.tag != tag or (tag != "Labels" and found.get("smart") != "true")):
        raise ValueError(
            f'the labeling config has <{found.tag} name="{name}">, which is the name of a smart control: rename it'
        )
    return found


def _labels(root: ElementTree.Element) -> Iterable[str]:
    """The labels of the controls that hold results, in the order of the config."""
    for control in root.iter():
        if control.tag in _RESULT_TAGS:
            for label in control.iter("Label"):
                yield label.get("alias") or label.get("value") or ""
