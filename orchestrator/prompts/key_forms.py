"""Forms of a key. A prompt and an asset whose keys are written differently can have the same form."""

from __future__ import annotations

import re
import unicodedata
import urllib.parse

# Folders where data sets of YOLO, CVAT, Pascal VOC and COCO tools keep pictures and labels, beside each other.
_LAYOUT_FOLDERS = re.compile(r"images?|labels?|jpegimages|annotations|obj_\w+_data|data", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|tiff?|bmp|gif|avif|hei[cf]|jp2|dng|ppm|pgm)$", re.IGNORECASE)
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
# COCO's own file names of 2014 begin with their split. Results name an image only by its number.
_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)")


def without_suffix(key: str) -> str:
    """A key up to the last dot of its file name."""
    before, dot, suffix = key.rpartition(".")
    return before if dot and "/" not in suffix else key


def without_image_suffix(key: str) -> str:
    """A prompt's key without an image suffix such as `.jpg`. Other dots belong to the name."""
    return _IMAGE_SUFFIX.sub("", key)


def spelling(key: str) -> str:
    r"""One way of writing a key: composed Unicode, `/` for `\`, no `./`, no percent-encoding, the suffix in small
    letters."""
    if key.isascii() and "%" not in key and "\\" not in key and "./" not in key and "//" not in key and key[:1] != "/":
        written = key
    else:
        written = _decoded(key).replace("\\", "/")
        written = unicodedata.normalize("NFC", written)
        written = "/".join(part for part in written.split("/") if part not in ("", "."))
    stem = without_suffix(written)
    return stem + written[len(stem) :].lower()


def without_layout(key: str) -> str:
    """A spelling without the usual folders of data sets (_LAYOUT_FOLDERS), at any depth."""
    *folders, name = key.split("/")
    return "/".join([*(folder for folder in folders if not _LAYOUT_FOLDERS.fullmatch(folder)), name])


def below_source(key: str, source: str) -> str | None:
    """A spelling without its first folders, if those are the last folders of the job's source; else None."""
    folders = source.rstrip("/").split("/")
    parts = key.split("/")
    for count in range(min(len(folders), len(parts) - 1), 0, -1):
        if parts[:count] == folders[-count:]:
            return "/".join(parts[count:])
    return None


def ending(key: str, parts: int) -> str:
    """The last parts of a key. The file name is one of them."""
    return "/".join(key.split("/")[-parts:])


def number(key: str) -> str | None:
    """The number that is a key's file name, without leading zeros; None if it is no number. The key has no suffix."""
    found = _NUMBERED.fullmatch(key.rpartition("/")[2])
    return found.group(1) if found else None


def group(key: str) -> str:
    """The file name up to its first dot, or its number. Two keys that any rule can find equal share it."""
    name = spelling(key).rpartition("/")[2].lower().partition(".")[0]
    found = _NUMBERED.fullmatch(name.replace("coco_", "COCO_", 1))
    return found.group(1) if found else name


def _decoded(key: str) -> str:
    if not _ENCODED.search(key):
        return key
    try:
        return urllib.parse.unquote(key, errors="strict")
    except UnicodeDecodeError:
        return key
