"""How this process reaches S3: makes boto3's clients, one for each store, from the settings and the AWS profile."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import boto3
import botocore
import botocore.client
import botocore.exceptions
import urllib3
import urllib3.exceptions

from db.settings import settings

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 30  # without any byte
MAX_POOL_CONNECTIONS = 32  # at least as many as fetching threads in one process


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An S3 API. endpoint: None is AWS. addressing_style: None leaves it to the AWS profile. anonymous: unsigned."""

    endpoint: str | None
    addressing_style: str | None
    anonymous: bool


def store_of_settings(endpoint: str | None) -> Store:
    known = settings()
    return Store(endpoint=endpoint or None, addressing_style=known.s3_addressing_style, anonymous=known.s3_anonymous)


_clients: dict[tuple[int, Store, int], Any] = {}
_clients_lock = threading.Lock()


def s3_client(store: Store, attempts: int) -> Any:
    """The process's client of a store. attempts: tries of one request, with the first.

    boto3's clients are thread-safe, but creating one is not: so there is a lock. A forked child must not use its
    parent's connections: so the pid is in the key.
    """
    with _clients_lock:
        known = (os.getpid(), store, attempts)
        if known not in _clients:
            # Our own session: boto3's default session is shared, and creating clients from it is not thread-safe.
            session = boto3.session.Session()
            _clients[known] = session.client(
                "s3",
                endpoint_url=store.endpoint,
                region_name=session.region_name or "us-east-1",
                config=_config(store, attempts),
            )
        return _clients[known]


def _config(store: Store, attempts: int) -> Any:
    # Without a style boto3 takes the profile's. Without that, if an endpoint is given, the bucket goes into the path:
    # other makers' stores have no DNS name for each bucket. Some of them do not know the newer checksums.
    config = botocore.client.Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        max_pool_connections=MAX_POOL_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": attempts},
        s3={"addressing_style": store.addressing_style} if store.addressing_style else {},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return config.merge(botocore.client.Config(signature_version=botocore.UNSIGNED)) if store.anonymous else config


def has_credentials() -> bool:
    """Whether the environment or a profile has keys for S3, or no keys are needed (anonymous)."""
    return settings().s3_anonymous or _find_keys() is not None


def keys_in_use() -> dict[str, str]:
    """aws_access_key_id, aws_secret_access_key and, where there is one, aws_session_token, as boto3 finds them in the
    environment or in a credentials file. Empty where it finds none."""
    found = _find_keys()
    if found is None:
        return {}
    keys = found.get_frozen_credentials()
    named = {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key}
    return named | ({"aws_session_token": keys.token} if keys.token else {})


def _find_keys() -> Any:
    try:
        return boto3.Session().get_credentials()
    except botocore.exceptions.ProfileNotFound:  # AWS_PROFILE names none
        return None


def endpoint_error(endpoint: str) -> str | None:
    """Why nothing answers at the address of an S3-compatible store. None if there is any answer."""
    # The certificate authority that boto3 trusts instead of the usual ones.
    with urllib3.PoolManager(ca_certs=os.environ.get("AWS_CA_BUNDLE") or None) as pool:
        try:
            pool.request("GET", endpoint, timeout=5, retries=False)
        except urllib3.exceptions.HTTPError as error:
            return str(error)
    return None
