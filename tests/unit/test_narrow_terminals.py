"""In a terminal of 80 columns, what people copy from a table is there as a whole."""

from __future__ import annotations

import os

from db.settings import Settings
from tests.narrow_terminal import shown_in_a_terminal
from workers.models.registry import MODELS

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
LONG = "very-long-" * 12


def test_config_shows_whole_names_beside_a_long_value() -> None:
    shown = shown_in_a_terminal("config", environment={**ENVIRONMENT, "MASKFLEET_WEIGHTS_MIRROR": f"/{LONG}"})

    assert [name for name in Settings.model_fields if f"MASKFLEET_{name.upper()}" not in shown] == []


def test_models_list_shows_whole_names() -> None:
    shown = shown_in_a_terminal("models", "list", environment=ENVIRONMENT)

    assert [name for name in MODELS if name not in shown] == []


def test_doctor_shows_a_whole_path_and_what_is_wrong_with_it() -> None:
    shown = shown_in_a_terminal("doctor", f"/{LONG}", environment=ENVIRONMENT)

    assert f"/{LONG}:nosuchfolder" in shown
