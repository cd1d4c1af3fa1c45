"""Secrets from files: MASKFLEET_X_FILE names a file that holds MASKFLEET_X, for each setting that is a secret.

A file is not shown where a process's environment is (`docker inspect`, `kubectl describe`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource, SettingsError

_MOST_BYTES = 64 * 1024


class SecretFiles(PydanticBaseSettingsSource):
    """A source of settings. Raises SettingsError for a file that cannot be read, or a secret that is given twice."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{self.config.get('env_prefix', '')}{field_name}".upper()
        path = os.environ.get(f"{variable}_FILE")
        if not path or not _is_secret(field.annotation):
            return None, field_name, False
        if os.environ.get(variable):
            raise SettingsError(f"{variable} and {variable}_FILE are both set: keep one of them")
        return _read(f"{variable}_FILE", Path(path)), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(f, name)[0] for name, f in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def _is_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(_is_secret(part) for part in get_args(annotation))


def _read(variable: str, path: Path) -> str:
    """The file's text without the line break at its end."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SettingsError(f"{variable}: {path} has more than {_MOST_BYTES:,} bytes, expected a secret")
        return content.decode().rstrip("\r\n")
    except OSError as error:
        raise SettingsError(f"{variable}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{variable}: {path} is not UTF-8 text") from error
