"""What an S3 store answers to a listing: keys and XML, over a real connection."""

from __future__ import annotations

import os
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.fuzz.target import Target
from workers.errors import SourceError, TransientError
from workers.storage.bucket import Bucket

_LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>p/</Prefix><KeyCount>2</KeyCount>
<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>
<Contents><Key>p/a.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;e1&quot;</ETag><Size>12</Size>
<StorageClass>STANDARD</StorageClass></Contents>
<Contents><Key>p/\u00fc%20b&amp;c.jpg</Key><ETag>e2</ETag><Size>0</Size></Contents></ListBucketResult>"""
_MOST_PAGES = 3


class _Store(BaseHTTPRequestHandler):
    body = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@cache
def _endpoint() -> str:
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def _list(body: bytes) -> None:
    endpoint = _endpoint()
    _Store.body = body
    bucket = Bucket("b/p", endpoint=endpoint)
    for _, page in zip(range(_MOST_PAGES), bucket.list(), strict=False):
        for listed in page.objects:
            listed.key.encode()
            assert "\0" not in listed.key
            assert listed.size_bytes >= 0


TARGETS = [
    Target(
        name="S3 listings",
        read=_list,
        allowed=(SourceError, TransientError),
        seeds=lambda: [_LISTING.encode(), _LISTING.replace("false", "true").encode()],
    )
]
