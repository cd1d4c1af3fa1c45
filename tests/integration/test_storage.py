"""Buckets against a real S3 API (moto's server). A scripted socket gives faults that no S3 server gives on demand."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID

from db.leases import LeaseLost
from orchestrator.prompts.entries import PromptFileError
from orchestrator.prompts.files import read_prompts
from tests.needs import TESTDATA
from tests.s3_server import serve_s3
from workers.errors import AssetError, ErrorKind, SourceError, TransientError
from workers.models.registry import find_model
from workers.storage.asset import PAGE_SIZE, Listed, SkipReason
from workers.storage.source import open_source

pytestmark = pytest.mark.integration

NASTY = TESTDATA / "nasty"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def s3_server():
    with serve_s3() as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


_numbers = itertools.count()


@pytest.fixture
def make_bucket(s3_server):
    """Put {key: bytes} into a new bucket through the API, and return its name."""

    def make(objects):
        name = f"bucket-{next(_numbers)}"
        client = boto3.session.Session().client("s3", endpoint_url=s3_server, region_name="us-east-1")
        client.create_bucket(Bucket=name)
        for key, body in objects.items():
            client.put_object(Bucket=name, Key=key, Body=body)
        return name

    return make


def keys_of(source, after=""):
    return [entry.key for page in source.list(after) for entry in page.objects]


# --- listing


def test_pages_past_a_thousand_resume_behind_each_cursor(s3_server, make_bucket):
    wanted = [f"photos/{number % 3}/{number:05}.jpg" for number in range(2 * PAGE_SIZE + 1)]
    bucket = make_bucket({})
    for key in wanted:  # directly into the server's memory, because two thousand requests take a minute
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, b"x")
    source = open_source(f"s3://{bucket}/photos", s3_endpoint=s3_server)

    pages = list(source.list())

    keys = [entry.key for page in pages for entry in page.objects]
    assert [len(page.objects) for page in pages] == [PAGE_SIZE, PAGE_SIZE, 1]
    assert keys == sorted(key.removeprefix("photos/") for key in wanted)
    for page in pages:
        assert page.cursor == page.objects[-1].key
        assert keys_of(source, page.cursor) == keys[keys.index(page.cursor) + 1 :]


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(s3_server, make_bucket):
    bucket = make_bucket({"photos/a.jpg": b"1", "photos2/b.jpg": b"2", "photos.jpg": b"3", "photos/sub/c.jpg": b"4"})

    for prefix in ("photos", "photos/"):
        source = open_source(f"s3://{bucket}/{prefix}", s3_endpoint=s3_server)
        assert keys_of(source) == ["a.jpg", "sub/c.jpg"]
        assert source.read("a.jpg", MEGABYTE) == b"1"
        assert source.uri("sub/c.jpg") == f"s3://{bucket}/photos/sub/c.jpg"
    assert len(keys_of(open_source(f"s3://{bucket}", s3_endpoint=s3_server))) == 4


def test_folder_markers_are_skipped_and_counted(s3_server, make_bucket):
    bucket = make_bucket({"photos/": b"", "photos/sub/": b"", "photos/a.jpg": b"1", "photos/full/": b"2"})

    (page,) = open_source(f"s3://{bucket}/photos", s3_endpoint=s3_server).list()

    assert [entry.key for entry in page.objects] == ["a.jpg", "full/"]
    assert page.skipped == {SkipReason.FOLDER_MARKER: 2}


def test_a_listed_object_has_its_size_and_its_etag_without_quotes(s3_server, make_bucket):
    bucket = make_bucket({"a.jpg": b"12345"})

    (page,) = open_source(f"s3://{bucket}", s3_endpoint=s3_server).list()

    assert page.objects == [Listed(key="a.jpg", size_bytes=5, etag="827ccb0eea8a706c4c34a16891f84e7b")]


def test_an_empty_prefix_has_no_pages(s3_server, make_bucket):
    source = open_source(f"s3://{make_bucket({'a.jpg': b'1'})}/nothing/here", s3_endpoint=s3_server)

    source.check()
    assert list(source.list()) == []


# --- names


@pytest.mark.usefixtures("testdata")
def test_every_hostile_key_is_listed_and_read_with_its_own_bytes(s3_server, make_bucket):
    entries = json.loads((NASTY / "keys.json").read_text())["keys"]
    wanted = {entry["key"]: (NASTY / "keys" / entry["file"]).read_bytes() for entry in entries}
    source = open_source(f"s3://{make_bucket(wanted)}", s3_endpoint=s3_server)

    assert {key: source.read(key, MEGABYTE) for key in keys_of(source)} == wanted


ODD_KEYS = [
    *("/leading.jpg", "a//b.jpg", "x/../up.jpg", "../up.jpg", "./dot.jpg", "end/..", "back\\slash.jpg", "~.jpg"),
    *("percent%20.jpg", "%2F.jpg", "%.jpg", "plus+.jpg", "space .jpg", " ", "?q=1&r#f", "tab\t.jpg", "\x01.jpg"),
    *("\u00e9.jpg", "e\u0301.jpg", "\U0001f436.jpg", "é" * 512, "x" * 1024),
]


@pytest.mark.parametrize("prefix", ["", "my photos+%20é/"], ids=["bucket", "prefix"])
def test_a_key_is_a_name_and_never_a_path(s3_server, make_bucket, prefix):
    keys = [key for key in ODD_KEYS if len((prefix + key).encode()) <= 1024]
    bucket = make_bucket({prefix + key: key.encode() for key in keys})
    source = open_source(f"s3://{bucket}/{prefix}", s3_endpoint=s3_server)

    assert keys_of(source) == sorted(keys, key=str.encode)
    assert all(source.read(key, MEGABYTE) == key.encode() for key in keys)
    for after in set(keys) - {"\x01.jpg"}:  # moto, unlike S3, sends StartAfter back unencoded: that is not valid XML
        assert keys_of(source, after) == [key for key in sorted(keys, key=str.encode) if key.encode() > after.encode()]


# --- reading


def test_a_missing_key_is_not_found(s3_server, make_bucket):
    with pytest.raises(AssetError, match=r"gone\.jpg: no longer in s3://") as caught:
        open_source(f"s3://{make_bucket({})}", s3_endpoint=s3_server).read("gone.jpg", MEGABYTE)

    assert caught.value.kind == ErrorKind.NOT_FOUND


def test_an_object_of_max_bytes_is_read_and_one_byte_more_is_too_large(s3_server, make_bucket):
    source = open_source(f"s3://{make_bucket({'a.jpg': b'12345', 'empty.jpg': b''})}", s3_endpoint=s3_server)

    assert source.read("a.jpg", 5) == b"12345"
    assert source.read("empty.jpg", 5) == b""
    with pytest.raises(AssetError, match=r"a\.jpg: 5 bytes; at most 4 are read") as caught:
        source.read("a.jpg", 4)
    assert caught.value.kind == ErrorKind.TOO_LARGE


def test_many_threads_read_at_once(s3_server, make_bucket):
    wanted = {f"{number}.jpg": b"%d" % number for number in range(40)}
    source = open_source(f"s3://{make_bucket(wanted)}", s3_endpoint=s3_server)

    with ThreadPoolExecutor(16) as pool:
        assert dict(zip(wanted, pool.map(lambda key: source.read(key, 10), wanted), strict=True)) == wanted


# --- a store that misbehaves


@pytest.fixture
def wire():
    """Serve scripted answers (status, headers, body), then repeat the last. Yields endpoint, script, requests."""
    script, requests = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, headers, body = script.pop(0) if len(script) > 1 else script[0]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", script, requests
    server.shutdown()
    thread.join()
    server.server_close()


def answer(status, code="", body=None, **headers):
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told</Message></Error>".encode()
    return status, headers, text if body is None else body


@pytest.fixture
def no_pauses(monkeypatch):
    """Back-off without waiting. botocore's pauses and ours take no time, but their number stays."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (502, ""), (504, "")])
def test_a_passing_failure_of_the_store_is_tried_again(wire, status, code):
    endpoint, script, requests = wire
    script += [answer(status, code), answer(status, code), answer(200, body=b"pixels")]

    assert open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE) == b"pixels"
    assert len(requests) == 3


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"), (408, "")]
)
def test_a_lasting_failure_of_the_store_condemns_no_asset(wire, status, code):
    endpoint, script, requests = wire
    script.append(answer(status, code))
    source = open_source("s3://bucket", s3_endpoint=endpoint)

    with pytest.raises(TransientError, match=r"a\.jpg"):
        source.read("a.jpg", MEGABYTE)
    with pytest.raises(TransientError):
        list(source.list())

    assert 2 <= len(requests) <= 10


@pytest.mark.usefixtures("no_pauses")
def test_a_body_that_breaks_off_is_read_again(wire):
    endpoint, script, _ = wire
    script += [answer(200, body=b"pix", **{"Content-Length": "6"}), answer(200, body=b"pixels")]

    assert open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE) == b"pixels"


@pytest.mark.usefixtures("no_pauses")
def test_a_body_that_always_breaks_off_condemns_no_asset(wire):
    endpoint, script, requests = wire
    script.append(answer(200, body=b"pix", **{"Content-Length": "6"}))

    with pytest.raises(TransientError, match=r"a\.jpg: the body broke off 5 times"):
        open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE)

    assert len(requests) == 5


def test_what_ends_a_copy_from_outside_is_not_taken_for_the_stores_fault(wire, tmp_path):
    endpoint, script, _ = wire
    script.append(answer(200, body=b"pixels"))

    def lost(_: int) -> None:
        raise LeaseLost("chunk 1 is no longer held")

    with (tmp_path / "copy").open("w+b") as copy, pytest.raises(LeaseLost, match="chunk 1"):
        open_source("s3://bucket", s3_endpoint=endpoint).copy("w.pth", copy, progress=lost)


@pytest.mark.usefixtures("no_pauses")
def test_a_file_whose_body_always_breaks_off_while_it_is_copied_is_the_networks_fault(wire, tmp_path):
    endpoint, script, requests = wire
    script.append(answer(200, body=b"pix", **{"Content-Length": "6"}))

    with (tmp_path / "copy").open("w+b") as copy, pytest.raises(TransientError, match=r"w\.pth: the body broke off"):
        open_source("s3://bucket", s3_endpoint=endpoint).copy("w.pth", copy)

    assert len(requests) == 5


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_is_gone_condemns_no_asset():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    source = open_source("s3://bucket", s3_endpoint=f"http://127.0.0.1:{port}")

    with pytest.raises(TransientError, match=r"a\.jpg"):
        source.read("a.jpg", MEGABYTE)
    with pytest.raises(TransientError):
        list(source.list())
    with pytest.raises(SourceError, match="is MASKFLEET_S3_ENDPOINT right"):
        source.check()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDenied", "need s3:ListBucket and s3:GetObject"),
        ("InvalidAccessKeyId", "does not know this access key"),
        ("SignatureDoesNotMatch", "the secret key does not fit"),
    ],
)
def test_a_403_is_forbidden_for_an_asset_and_has_a_remedy_for_the_source(wire, code, remedy):
    endpoint, script, requests = wire
    script.append(answer(403, code))
    source = open_source("s3://bucket", s3_endpoint=endpoint)

    with pytest.raises(AssetError, match=rf"a\.jpg: .*403.*{code}") as caught:
        source.read("a.jpg", MEGABYTE)
    with pytest.raises(SourceError, match=remedy):
        source.check()
    with pytest.raises(SourceError, match=remedy):
        list(source.list())

    assert caught.value.kind == ErrorKind.FORBIDDEN
    assert len(requests) == 3, "a verdict is not tried again"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed"])
def test_a_workers_own_expired_session_or_clock_condemns_no_asset(wire, code):
    endpoint, script, _ = wire
    script.append(answer(403, code))

    with pytest.raises(TransientError, match=code):
        open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE)


def test_a_key_of_too_many_bytes_is_refused_before_its_body_is_read(wire):
    endpoint, script, requests = wire
    script.append(answer(200, body=b"", **{"Content-Length": str(10**12)}))

    with pytest.raises(AssetError) as caught:
        open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE)

    assert caught.value.kind == ErrorKind.TOO_LARGE
    assert len(requests) == 1


def test_a_key_that_postgres_cannot_store_is_counted_and_never_the_cursor(wire):
    endpoint, script, requests = wire
    entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in ("a%0Ab.jpg", "nul%00.jpg"))
    listing = "<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{}</IsTruncated>{}</ListBucketResult>"
    token = "<NextContinuationToken>next+page</NextContinuationToken>"
    script.append(answer(200, body=listing.format("true", entries + token).encode()))
    script.append(answer(200, body=listing.format("false", "<Contents><Key>z</Key><Size>1</Size></Contents>").encode()))

    first, second = open_source("s3://bucket", s3_endpoint=endpoint).list()

    assert [entry.key for entry in first.objects] == ["a\nb.jpg"]
    assert first.cursor == "a\nb.jpg"
    assert first.skipped == {SkipReason.UNSTORABLE_NAME: 1}
    assert second.cursor == "z"
    assert "continuation-token=next%2Bpage" in requests[1]


def test_an_object_that_is_named_like_the_prefix_is_counted_and_no_asset(wire):
    endpoint, script, _ = wire
    entries = "".join(f"<Contents><Key>photos/{key}</Key><Size>5</Size></Contents>" for key in ("", "a.jpg"))
    listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    script.append(answer(200, body=listing.encode()))

    [page] = open_source("s3://bucket/photos", s3_endpoint=endpoint).list()

    assert [entry.key for entry in page.objects] == ["a.jpg"]
    assert page.skipped == {SkipReason.FOLDER_MARKER: 1}


# --- sources that cannot be used


def test_check_says_what_is_wrong_with_a_bucket(s3_server, make_bucket):
    open_source(f"s3://{make_bucket({})}", s3_endpoint=s3_server).check()

    with pytest.raises(SourceError, match=r"NoSuchBucket.*check the bucket's name"):
        open_source("s3://no-such-bucket", s3_endpoint=s3_server).check()
    with pytest.raises(SourceError, match="check the bucket's name"):
        open_source("s3://no such bucket", s3_endpoint=s3_server).check()
    with pytest.raises(SourceError, match="check MASKFLEET_S3_ENDPOINT"):
        open_source("s3://bucket", s3_endpoint="localhost").check()


def test_check_names_the_variables_when_there_are_no_credentials(wire, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    endpoint, script, _ = wire
    script.append(answer(200))
    source = open_source("s3://bucket", s3_endpoint=endpoint)

    with pytest.raises(SourceError, match="AWS_ACCESS_KEY_ID"):
        source.check()
    with pytest.raises(AssetError, match="AWS_ACCESS_KEY_ID") as caught:
        source.read("a.jpg", MEGABYTE)
    assert caught.value.kind == ErrorKind.FORBIDDEN


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("false", "retrieving credentials from custom-process"),
        (
            """echo '{"Version": 1, "AccessKeyId": "x", "SecretAccessKey": "y", "SessionToken": "z",
                      "Expiration": "2020-01-01T00:00:00Z"}'""",
            "still expired",
        ),
    ],
)
def test_credentials_that_cannot_be_renewed_condemn_no_asset_and_no_listing(wire, monkeypatch, tmp_path, program, said):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "renew").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "renew").chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {tmp_path / 'renew'}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    endpoint, script, _ = wire
    script.append(answer(200, body=b"pixels"))
    source = open_source("s3://bucket", s3_endpoint=endpoint)

    with pytest.raises(TransientError, match=said):
        source.read("a.jpg", MEGABYTE)
    with pytest.raises(TransientError, match=said):
        next(source.list())
    with (tmp_path / "copy").open("w+b") as copy, pytest.raises(TransientError, match=said):
        source.copy("a.jpg", copy)
    with pytest.raises(SourceError, match=said) as caught:
        source.check()
    assert "MASKFLEET_S3_ENDPOINT" not in str(caught.value)


@pytest.mark.usefixtures("no_pauses")
def test_a_web_page_in_the_stores_place_is_a_wrong_endpoint(wire):
    endpoint, script, _ = wire
    script.append(answer(200, body=b"<!DOCTYPE html><title>Welcome</title><p>It works!"))

    with pytest.raises(SourceError, match="does not answer as an S3 API"):
        open_source("s3://bucket", s3_endpoint=endpoint).check()


def test_secrets_are_in_no_message(wire, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-of-the-test")
    endpoint, script, _ = wire
    script.append(answer(403, "AccessDenied"))
    caplog.set_level("DEBUG")

    with pytest.raises(AssetError) as caught:
        open_source("s3://bucket", s3_endpoint=endpoint).read("a.jpg", MEGABYTE)

    for secret in ("AKIATESTTESTTESTTEST", "secret-of-the-test", "session-of-the-test"):
        assert secret not in str(caught.value)
        assert secret not in caplog.text


# --- prompts


def test_prompts_are_read_from_an_object_or_below_a_prefix(s3_server, make_bucket):
    line = b'{"key": "a.jpg", "prompts": [{"box_xyxy": [1, 2, 3, 4]}]}\n'
    bucket = make_bucket(
        {"asked/p": line, "ds/labels/train/a.txt": b"0 0.5 0.5 0.2 0.4\n", "ds/data.yaml": b"names: [cat]\n"}
    )
    spec = find_model("sam_nano")

    def rows(address):
        found = read_prompts(address, source=f"s3://{bucket}/ds/images", spec=spec, s3_endpoint=s3_server)
        with found.stored:
            return [(key, json.loads(prompts)[0].get("label")) for key, prompts in found.rows()]

    assert rows(f"s3://{bucket}/asked/p") == [("a.jpg", None)]
    assert rows(f"s3://{bucket}/ds/labels") == [("train/a", "cat")]
    with pytest.raises(PromptFileError, match="no label file below it"):
        rows(f"s3://{bucket}/absent")


def test_a_body_whose_length_is_not_said_is_read_up_to_the_limit(wire):
    endpoint, script, _ = wire
    script.append((200, {"Content-Length": None}, b"12345"))
    source = open_source("s3://bucket", s3_endpoint=endpoint)

    assert source.read("a.jpg", 5) == b"12345"
    with pytest.raises(AssetError, match="5 bytes") as raised:
        source.read("a.jpg", 4)
    assert raised.value.kind is ErrorKind.TOO_LARGE
