"""Names of assets and servers: an asset's id and address in Label Studio, and a server's address in our database."""

from __future__ import annotations

import hashlib
import posixpath
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlparse, urlsplit

from orchestrator.label_studio.errors import LabelStudioError


class PublishError(LabelStudioError):
    """The job cannot be published like this. The message says what to do instead."""


def image_address(uri: str, local_files: str | None) -> str:
    """The address under which Label Studio shows an asset: s3:// unchanged, a file by its path below the document root.

    Raises PublishError for a file that Label Studio cannot see with these options.
    """
    if not uri.startswith("file://"):
        return uri
    if local_files is None:
        raise PublishError(
            "the job's images are files, which Label Studio cannot see by themselves: start it with "
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true and LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT set to a folder "
            "above them, run `maskfleet label-studio setup --project ID --job JOB --local-files`, then "
            "`maskfleet publish JOB --project ID --local-files FOLDER` with that folder; or put the images into a "
            "bucket"
        )
    path, root = (PurePosixPath(posixpath.normpath(p)) for p in (unquote(uri.removeprefix("file://")), local_files))
    if not path.is_relative_to(root):
        raise PublishError(f"{path} is not below --local-files {root}: name a folder above the job's images")
    return f"/data/local-files/?d={quote(str(path.relative_to(root)))}"


def address_faults(address: str) -> list[str]:
    """Why Label Studio would fetch another object than the one an address names; empty if it would not.

    It parses an s3:// address as below. That cuts the address at a `?` and drops tabs, line ends, and spaces at the
    end.
    """
    if not address.startswith("s3://"):
        return []
    read = urlparse(address.strip(), allow_fragments=False)
    bucket, key = read.netloc, read.path.lstrip("/")
    if address == f"s3://{bucket}/{key}":
        return []
    fault = f"Label Studio would look for the key {key!r} instead, for it cuts addresses at ?, tabs, line ends, and"
    return [f"{fault} spaces or slashes at an end: give the object another key"]


def asset_uid(uri: str) -> str:
    """The id of an asset in Label Studio, data.asset_id. It is the same for every job and model.

    uri: source and key as one address. The id has 64 bits: among ten million assets, two share an id with a chance of
    1 in 370,000.
    """
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def server_key(url: str) -> str:
    """The address of a server as we store it: scheme and host in small letters, no slash at the end, no secrets."""
    parts = urlsplit(url.strip())
    name = parts.hostname or ""
    host = (f"[{name}]" if ":" in name else name) + (f":{parts.port}" if parts.port else "")
    return f"{parts.scheme.lower()}://{host}{parts.path.rstrip('/')}"
