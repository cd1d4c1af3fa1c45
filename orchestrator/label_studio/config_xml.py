"""Reads a labeling config to change it, and writes it again with the comments that people and templates put into it.

Label Studio's templates have their sample task in a comment behind the config.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

_BEFORE = re.compile(r"(?:\s|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)


def read_config(label_config: str) -> ElementTree.Element:
    """The config's root. Its comments are elements whose tag is no string."""
    builder = ElementTree.TreeBuilder(insert_comments=True)
    parser = ElementTree.XMLParser(target=builder)  # noqa: S314  no entities: expat here is 2.4.1 or newer
    return ElementTree.fromstring(label_config, parser)  # noqa: S314  as above


def write_config(root: ElementTree.Element, label_config: str) -> str:
    """The root as text, between what stands before and behind the root in the config that it was read from."""
    before = _BEFORE.match(label_config)
    assert before is not None  # it matches nothing, too
    end = label_config.rstrip()
    while end.endswith("-->"):
        end = end[: end.rindex("<!--")].rstrip()
    ElementTree.indent(root)
    return before[0] + ElementTree.tostring(root, encoding="unicode") + label_config[len(end) :]
