"""Postgres and Redis over TLS, for workers on other machines: a server that cannot prove its name is refused."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import redis as redis_client
import trustme
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import text

from db.session import OperationalError, open_engine
from tests.tls import tls_in_front_of
from workers.running.app import QUEUE, make_app, publish_chunks

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tls") / "ca.crt"
    authority.cert_pem.write_to_path(str(file))
    return file


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA) -> ssl.SSLContext:
    """Of the server `localhost`, and not of 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["postgresql"])
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture
def rediss(redis_url: str, certificate: ssl.SSLContext) -> Iterator[str]:
    """The suite's Redis over TLS, as rediss://:password@{host}:port/database."""
    url = urlsplit(redis_url)
    with tls_in_front_of((str(url.hostname), int(url.port or 6379)), certificate) as port:
        yield f"rediss://:{url.password}@{{host}}:{port}{url.path}"


@pytest.mark.parametrize("checks", ["ssl_cert_reqs=required&", ""], ids=["said", "by default"])
def test_messages_go_over_tls_to_the_redis_that_the_authority_knows(
    rediss: str, redis: redis_client.Redis, ca_file: Path, checks: str
) -> None:
    publish_chunks([7], broker=make_app(f"{rediss.format(host='localhost')}?{checks}ssl_ca_certs={ca_file}"))

    assert redis.llen(QUEUE) == 1


@pytest.mark.parametrize(
    ("host", "query"),
    [
        ("127.0.0.1", "?ssl_cert_reqs=required&ssl_ca_certs={ca}"),
        ("localhost", "?ssl_cert_reqs=required"),
        ("localhost", ""),
    ],
    ids=["another name", "an unknown authority", "an unknown authority by default"],
)
def test_no_message_goes_to_a_redis_that_cannot_prove_its_name(
    rediss: str, redis: redis_client.Redis, ca_file: Path, host: str, query: str
) -> None:
    app = make_app(rediss.format(host=host) + query.format(ca=ca_file))

    with pytest.raises(BrokerError, match="certificate verify failed"):
        publish_chunks([7], broker=app)
    assert redis.llen(QUEUE) == 0


def test_postgres_is_asked_over_tls_and_only_when_its_certificate_has_its_name(
    database_url: str, certificate: ssl.SSLContext, ca_file: Path, tmp_path: Path
) -> None:
    url = urlsplit(database_url)
    server = f"{parse_qs(url.query)['host'][0]}/.s.PGSQL.5432"
    # `direct` spares the test's server Postgres' own greeting; what is checked is the same.
    tls = "sslmode=verify-full&sslnegotiation=direct&sslrootcert="
    with tls_in_front_of(server, certificate) as port:
        good = open_engine(f"postgresql://postgres@localhost:{port}{url.path}?{tls}{ca_file}")
        with good.begin() as db:
            assert db.execute(text("SELECT count(*) FROM job")).scalar_one() == 0
        good.dispose()

        for host, authority in (("127.0.0.1", ca_file), ("localhost", _another_authority(tmp_path))):
            bad = open_engine(f"postgresql://postgres@{host}:{port}{url.path}?{tls}{authority}")
            with pytest.raises(OperationalError, match=r"certificate verify failed|does not match host name"):
                bad.connect()


def _another_authority(folder: Path) -> Path:
    file = folder / "another.crt"
    trustme.CA().cert_pem.write_to_path(str(file))
    return file
