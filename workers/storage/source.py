"""Lists and reads the assets of a source, a folder or an S3 prefix: the one door to boto3 and to people's folders.

A source has folder semantics (`s3://bucket/photos` is `photos/…`, never `photos2/…`) and keys are relative to it.
Listing goes in the binary order of the keys' UTF-8, so a listing that was killed goes on after its last cursor.
"""

from __future__ import annotations

import logging
import urllib.parse

from workers.errors import SourceError, redact
from workers.storage.asset import Source
from workers.storage.bucket import Bucket
from workers.storage.folder import Folder

# These log whole requests, Authorization and all, for anyone who sets the root logger to DEBUG.
for _name in ("boto3", "botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def open_source(source: str, *, s3_endpoint: str | None = None) -> Source:
    """Make a source of `s3://bucket/prefix`, of an absolute path, or of a `file://` URL. Reaches for nothing yet.

    s3_endpoint: of an S3-compatible store; None is AWS. Raises SourceError for anything else, saying what is expected.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Folder(source)
    if scheme == "s3":
        return Bucket(rest, endpoint=s3_endpoint)
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host in ("", "localhost") and slash:
            return Folder("/" + urllib.parse.unquote(path))
    raise SourceError(f"{redact(source)}: expected s3://bucket/prefix, an absolute folder, or file:///folder")
