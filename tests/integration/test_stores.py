"""Stores that are not reached as most are: the bucket in the host's name, paying readers, no account, an own authority.

A small HTTP server stands for the store. It is reached as a proxy, so that names like photos.store.test need no DNS.
"""

import datetime
import itertools
import ssl
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from db.settings import settings
from tests.s3_server import serve_s3
from workers.errors import AssetError, ErrorKind, SourceError
from workers.storage.client import endpoint_error
from workers.storage.source import open_source

pytestmark = pytest.mark.integration

MEGABYTE = 2**20
NUMBERS = itertools.count()
LISTING = b"<ListBucketResult><Contents><Key>a.jpg</Key><Size>1</Size></Contents></ListBucketResult>"


def refusal(code):
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told</Message></Error>".encode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws_config"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def with_settings(monkeypatch):
    def set_to(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"MASKFLEET_{name.upper()}", value)
        settings.cache_clear()

    return set_to


@contextmanager
def serving(answer, certificate=None):
    """Serve answer(host, path, headers) -> (status, body); give the port and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            host, path = self.headers["Host"], "/" + self.path.removeprefix("http://").partition("/")[2]
            requests.append((host, path, dict(self.headers)))
            status, body = answer(host, path, self.headers)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port, requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def store(monkeypatch):
    """A store that refuses all but virtual-hosted requests, as Alibaba Cloud's does; gives its address and requests."""
    name = f"store{next(NUMBERS)}.test"  # a client keeps its proxy, and the process keeps its clients

    def answer(host, path, _):
        if host != f"photos.{name}":
            return 403, refusal("SecondLevelDomainForbidden")
        return (200, LISTING) if "list-type=2" in path else (200, b"x")

    with serving(answer) as (port, requests):
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        yield f"http://{name}", requests


def keys_of(source):
    return [entry.key for page in source.list() for entry in page.objects]


# --- the bucket in the host's name (report 18)


def test_the_profiles_addressing_style_is_honoured(store, tmp_path):
    (tmp_path / "aws_config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    address, requests = store
    source = open_source("s3://photos", s3_endpoint=address)

    source.check()

    assert keys_of(source) == ["a.jpg"]
    assert source.read("a.jpg", MEGABYTE) == b"x"
    assert {host for host, _, _ in requests} == {address.replace("http://", "photos.")}


@pytest.mark.parametrize("profile", ["", "[default]\ns3 =\n    addressing_style = path\n"])
def test_the_setting_of_an_addressing_style_wins_over_the_profile(store, tmp_path, with_settings, profile):
    (tmp_path / "aws_config").write_text(profile)
    with_settings(s3_addressing_style="virtual")

    assert keys_of(open_source("s3://photos", s3_endpoint=store[0])) == ["a.jpg"]


@pytest.mark.parametrize("code", ["SecondLevelDomainForbidden", "PathStyleDomainForbidden", "InvalidPathAccess"])
def test_without_either_the_message_names_the_setting_and_no_permission(code):
    with (
        serving(lambda host, path, headers: (403, refusal(code))) as (port, requests),
        pytest.raises(SourceError, match="MASKFLEET_S3_ADDRESSING_STYLE=virtual") as caught,
    ):
        open_source("s3://photos", s3_endpoint=f"http://127.0.0.1:{port}").check()

    assert "s3:ListBucket" not in str(caught.value)
    assert requests[0][1].startswith("/photos?list-type=2")


# --- who pays, and who asks


def answer_to_payers(host, path, headers):
    if headers.get("x-amz-request-payer") != "requester":
        return 403, refusal("AccessDenied")
    return (200, LISTING) if "list-type=2" in path else (200, b"x")


def test_a_requester_pays_where_it_was_set(with_settings, tmp_path):
    with serving(answer_to_payers) as (port, _):
        address = f"http://127.0.0.1:{port}"
        with pytest.raises(SourceError, match="MASKFLEET_S3_REQUEST_PAYER=requester"):
            open_source("s3://photos", s3_endpoint=address).check()
        with_settings(s3_request_payer="requester")
        source = open_source("s3://photos", s3_endpoint=address)

        source.check()
        assert keys_of(source) == ["a.jpg"]
        assert source.read("a.jpg", MEGABYTE) == b"x"


def test_a_prompt_file_is_downloaded_by_one_who_pays(with_settings, tmp_path):
    paid = []

    def answer(host, path, headers):
        paid.append(headers.get("x-amz-request-payer"))
        return 404, refusal("NoSuchKey")

    with_settings(s3_request_payer="requester")
    with serving(answer) as (port, _), (tmp_path / "copy").open("w+b") as copy, pytest.raises(AssetError):
        open_source("s3://photos", s3_endpoint=f"http://127.0.0.1:{port}").copy("p.jsonl", copy)
    assert set(paid) == {"requester"}


def test_a_public_bucket_is_read_without_any_credentials(monkeypatch, with_settings, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with serving(lambda host, path, headers: (200, LISTING if "list-type" in path else b"x")) as (port, requests):
        address = f"http://127.0.0.1:{port}"
        with pytest.raises(SourceError, match="MASKFLEET_S3_ANONYMOUS=true"):
            open_source("s3://photos", s3_endpoint=address).check()
        with_settings(s3_anonymous="true")
        source = open_source("s3://photos", s3_endpoint=address)

        assert keys_of(source) == ["a.jpg"]
        assert source.read("a.jpg", MEGABYTE) == b"x"

    assert [headers for _, _, headers in requests if "Authorization" in headers] == []


def test_a_bucket_that_is_not_public_says_so_to_one_without_a_name(with_settings):
    with_settings(s3_anonymous="true")
    with (
        serving(lambda host, path, headers: (403, refusal("AccessDenied"))) as (port, _),
        pytest.raises(SourceError, match="not public: unset MASKFLEET_S3_ANONYMOUS"),
    ):
        open_source("s3://photos", s3_endpoint=f"http://127.0.0.1:{port}").check()


# --- an authority of one's own


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "own.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_an_authority_of_ones_own_is_trusted_through_awss_variable(certificate, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost")
    with serving(lambda host, path, headers: (200, LISTING), certificate) as (port, _):
        address = f"https://localhost:{port}"
        with pytest.raises(SourceError, match=r"not trusted.*set AWS_CA_BUNDLE"):
            open_source("s3://photos", s3_endpoint=address).check()
        assert "CERTIFICATE_VERIFY_FAILED" in endpoint_error(address)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))

        # Another address, for another client: boto3 reads the variable when it makes one.
        assert keys_of(open_source("s3://photos", s3_endpoint=address + "/")) == ["a.jpg"]
        assert endpoint_error(address) is None


# --- archived objects


def test_an_archived_object_is_not_found_until_it_is_restored_and_its_neighbour_is_read():
    with serve_s3() as address:
        client = boto3.session.Session().client("s3", endpoint_url=address, region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        client.put_object(Bucket="photos", Key="cold.jpg", Body=b"x", StorageClass="GLACIER")
        client.put_object(Bucket="photos", Key="warm.jpg", Body=b"x")
        source = open_source("s3://photos", s3_endpoint=address)

        assert keys_of(source) == ["cold.jpg", "warm.jpg"]
        assert source.read("warm.jpg", MEGABYTE) == b"x"
        with pytest.raises(AssetError, match=r"cold\.jpg: archived in s3://photos .*until it is restored") as caught:
            source.read("cold.jpg", MEGABYTE)
        assert caught.value.kind == ErrorKind.NOT_FOUND
        assert "credentials" not in str(caught.value)


def test_a_server_of_a_test_has_nothing_that_an_earlier_one_in_the_same_process_had():
    for _ in range(2):
        with serve_s3() as address:
            client = boto3.session.Session().client("s3", endpoint_url=address, region_name="us-east-1")
            assert client.list_buckets()["Buckets"] == []
            client.create_bucket(Bucket="photos")
            client.put_object(Bucket="photos", Key="left.jpg", Body=b"x")


# --- a remedy fits its cause


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "AccessDenied", "need s3:ListBucket and s3:GetObject"),
        (404, "NoSuchBucket", "check the bucket's name"),
        (400, "AuthorizationHeaderMalformed", "another region: set AWS_DEFAULT_REGION"),
        (400, "IllegalLocationConstraintException", "another region: set AWS_DEFAULT_REGION"),
        (403, "ExpiredToken", "the session has run out"),
        (400, "InvalidToken", "the session has run out"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (503, "SlowDown", "busy or broken: try again"),
        (403, "SomethingElse", "need s3:ListBucket and s3:GetObject"),
        (409, "SomethingElse", "see what the store says"),
    ],
)
def test_the_remedy_of_a_refusal_fits_its_cause(monkeypatch, status, code, remedy):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with (
        serving(lambda host, path, headers: (status, refusal(code))) as (port, _),
        pytest.raises(SourceError, match=remedy) as caught,
    ):
        open_source("s3://photos", s3_endpoint=f"http://127.0.0.1:{port}").check()

    assert "MASKFLEET_S3_ENDPOINT right" not in str(caught.value)
