"""Deployment settings, read from `MASKFLEET_*` environment variables. The settings of one job are on its row."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from db.secret_files import SecretFiles


def _require_broker_address(value: SecretStr) -> SecretStr:
    _require_address(value.get_secret_value(), "redis://host:6379/0")
    return value


def _require_http_address(value: str) -> str:
    _require_address(value, "http(s)://host[:port]")
    if urlsplit(value).scheme not in ("http", "https"):
        raise ValueError("not an address, expected http(s)://host[:port]")
    return value


def _require_address(value: str, expected: str) -> None:
    """Raise ValueError without the value, which may hold a password."""
    try:
        parts = urlsplit(value)
        is_address = bool(parts.scheme and "://" in value) and (parts.port or 0) >= 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError(f"not an address, expected {expected}")


def _require_header_text(value: SecretStr) -> SecretStr:
    secret = value.get_secret_value()
    if not (secret.isascii() and secret.isprintable() and secret.strip() == secret):
        raise ValueError("it goes into an HTTP header, expected letters, digits and signs without line breaks")
    return value


# Postgres knows no times before 4713 BC, and threads wait for at most three centuries.
_MOST_DAYS = 36_500
_MOST_SECONDS = 86_400 * _MOST_DAYS

HttpAddress = Annotated[str, AfterValidator(_require_http_address)]
HeaderSecret = Annotated[SecretStr, AfterValidator(_require_header_text)]


class Settings(BaseSettings):
    """One field a setting. docs/settings.md and `maskfleet config` show its description."""

    model_config = SettingsConfigDict(
        env_prefix="MASKFLEET_",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = Field(None, description="PostgreSQL, postgresql://user:password@host:5432/name")
    broker_url: Annotated[SecretStr, AfterValidator(_require_broker_address)] | None = Field(
        None, description="Celery broker, redis://:password@host:6379/0"
    )
    s3_endpoint: HttpAddress | None = Field(None, description="Endpoint of an S3-compatible store; unset means AWS")
    s3_addressing_style: Literal["auto", "path", "virtual"] | None = Field(
        None, description="Where S3 requests carry the bucket; unset means as the AWS profile says, else `auto`"
    )
    s3_request_payer: Literal["requester"] | None = Field(
        None, description="`requester` pays for reading buckets whose owner does not"
    )
    s3_anonymous: bool = Field(False, description="Unsigned S3 requests, for public buckets")
    label_studio_url: HttpAddress | None = Field(None, description="Label Studio, http://host:8080")
    label_studio_public_url: HttpAddress | None = Field(
        None, description="Label Studio's address for people, where it is another one; `label-studio setup` prints it"
    )
    label_studio_api_key: HeaderSecret | None = Field(None, description="Label Studio legacy or personal access token")
    label_studio_project: int | None = Field(
        None, description="Project that `publish` takes when --project is not given"
    )
    webhook_secret: HeaderSecret | None = Field(
        None, description="Secret of Label Studio's webhooks (X-Maskfleet-Secret) that wake up `review --follow`"
    )
    assist_user: str = Field("maskfleet", description="User with which Label Studio calls `maskfleet assist`")
    assist_password: SecretStr | None = Field(None, description="Its password, at least 16 characters")
    board_password: SecretStr | None = Field(
        None, description="Password of `maskfleet board`, at least 12 characters; unset: it makes and prints one"
    )
    weights_dir: Path | None = Field(None, description="Where checkpoints are kept; default ~/.cache/maskfleet/weights")
    weights_mirror: str | None = Field(
        None,
        description="Folder, s3://bucket/prefix or https:// prefix from which weights are taken first",
    )
    state_dir: Path | None = Field(None, description="Where `run` keeps its own Postgres; default OUT/.maskfleet")
    model: str | None = Field(None, description="Model that `submit` takes when --model is not given")
    log_format: Literal["text", "json"] = Field("text", description="`json`: one JSON object a log line")
    chunk_size: int = Field(64, ge=1, le=10_000, description="Assets one Celery message stands for")
    batch_size: int = Field(4, ge=1, le=256, description="Assets in flight together inside a chunk")
    window_chunks: int = Field(64, ge=1, description="Chunks kept in the queue at most")
    lease_seconds: float = Field(60, gt=0, le=_MOST_SECONDS, description="How long a silent worker keeps its chunk")
    resend_seconds: float = Field(
        300, gt=0, le=_MOST_SECONDS, description="A queued chunk not claimed for this long is sent again"
    )
    hang_seconds: float = Field(900, gt=0, description="A worker that finishes no asset for this long is given up")
    drain_seconds: float = Field(50, gt=0, description="Time a worker has to finish its batch after SIGTERM")
    decode_seconds: float = Field(60, gt=0, description="Computing time that decoding one image may take")
    embeddings: str | None = Field(
        None, description="Folder or s3://bucket/prefix of kept embeddings; default of `run`: OUT/.maskfleet/embeddings"
    )
    embeddings_format: Literal["fp16", "int8"] = Field("fp16", description="How kept embeddings are stored")
    embeddings_bytes: int = Field(10_000_000_000, ge=0, description="Bytes of all kept embeddings at most")
    embeddings_days: float = Field(
        14, gt=0, le=_MOST_DAYS, description="An embedding not used for this long is deleted"
    )
    max_pixels: int = Field(100_000_000, ge=1, description="Larger images are refused from their header")
    max_object_bytes: int = Field(200 * 1024 * 1024, ge=1, description="Larger objects are refused unread")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls)


@cache
def settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
