"""Lists and reads the assets of a source, a folder or an S3 prefix.

A source has folder semantics (`s3://bucket/photos` is `photos/…`, never `photos2/…`) and keys are relative to it.
Keys are listed in the binary order of their UTF-8, so a killed listing goes on after its last cursor.
"""

from __future__ import annotations

import logging
import urllib.parse

from workers.errors import SourceError, redact
from workers.storage.asset import Source
from workers.storage.folder import Folder

# With the root logger at DEBUG these log whole requests, with their Authorization headers.
for _name in ("boto3", "botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def open_source(source: str, *, s3_endpoint: str | None = None) -> Source:
    """Make a source of `s3://bucket/prefix`, of an absolute path, or of a `file://` URL. Does not connect or read yet.

    s3_endpoint: of an S3-compatible store; None is AWS. Raises SourceError, with what is expected, for anything else.
    """
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Folder(source)
    if scheme == "s3":
        from workers.storage.bucket import Bucket  # here, because it loads boto3

        return Bucket(rest, endpoint=s3_endpoint)
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host in ("", "localhost") and slash:
            return Folder("/" + urllib.parse.unquote(path))
    raise SourceError(f"{redact(source)}: expected s3://bucket/prefix, an absolute folder, or file:///folder")
