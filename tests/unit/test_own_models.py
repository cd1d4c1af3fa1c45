"""Models of one's own: their TOML, their names, and how they are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.settings import settings
from orchestrator.jobs.version import what_is_computed
from workers.models.files import is_present, model_version, require_same_weights, weights_path, weights_sha256
from workers.models.own import (
    MAX_TOML_BYTES,
    OwnModel,
    identity_of,
    parse_own,
    require_own_name,
    require_same_model,
    toml_of,
    write_own,
)
from workers.models.registry import MODELS, find_model, known_models
from workers.models.spec import UnknownModelError, WeightsError
from workers.models.weights import verify


def own(name: str = "cells-7", **changes: object) -> OwnModel:
    values: dict[str, object] = {
        "name": name,
        "architecture": "sam_vit_b",
        "sha256": "a1" * 32,
        "size_bytes": 1000,
        "parameter_count": 250,
        "origin": "/data/medsam.pth",
        "licence": "CC-BY 4.0, “as is”",
        "added": date(2026, 11, 26),
    }
    return OwnModel.model_validate(values | changes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    settings.cache_clear()
    (tmp_path / "weights").mkdir()
    yield tmp_path / "weights"
    settings.cache_clear()


def test_a_model_that_was_written_is_found_by_name_with_its_architectures_prompts(folder: Path) -> None:
    path = write_own(own())

    spec = find_model("cells-7")

    assert path == folder / "cells-7.toml"
    assert [file.name for file in folder.iterdir()] == ["cells-7.toml"]
    assert (spec.name, spec.architecture, spec.sha256) == ("cells-7", "sam_vit_b", "a1" * 32)
    assert (spec.prompts, spec.loader) == (MODELS["sam_vit_b"].prompts, MODELS["sam_vit_b"].loader)
    assert spec.licence == "CC-BY 4.0, “as is”"
    assert weights_path(spec) == folder / "cells-7.safetensors"
    assert not is_present(spec)
    assert verify(spec).found == "no file"
    assert model_version(spec, {}).startswith("cells-7@a1a1a1a1+")


@given(st.text(st.characters(exclude_categories=("C", "Z")), max_size=60))
def test_the_toml_says_what_was_written(text: str) -> None:
    defaults = {"points_per_side": 24, "pred_iou_thresh": 0.35}
    written = own(origin=text, base="sam_vit_h", base_sha256="b2" * 32, defaults=defaults)
    assert parse_own(toml_of(written), name="cells-7", where="x") == written


def test_a_registry_entry_is_built_as_itself() -> None:
    assert [spec.name for spec in MODELS.values() if spec.architecture != spec.name or spec.is_own] == []


def test_the_version_of_a_decoder_follows_from_both_files() -> None:
    write_own(own())
    write_own(own("tuned", base="sam_vit_b", base_sha256="b2" * 32))
    write_own(own("tuned-2", base="sam_vit_b", base_sha256="c3" * 32))

    assert len({weights_sha256(find_model(name)) for name in ("cells-7", "tuned", "tuned-2")}) == 3


def test_a_job_of_another_file_of_the_same_name_is_refused() -> None:
    write_own(own())
    version = model_version(find_model("cells-7"), {})
    require_same_weights(find_model("cells-7"), version)
    write_own(own(sha256="d4" * 32))

    with pytest.raises(WeightsError, match=r"cells-7.safetensors is d4d4d4d4, but the job was submitted with a1a1a1a1"):
        require_same_weights(find_model("cells-7"), version)


def test_the_defaults_of_a_toml_take_the_place_of_its_architectures_and_are_part_of_what_a_job_means() -> None:
    write_own(own(architecture="sam_nano"))
    usual = find_model("cells-7")
    assert usual.defaults == MODELS["sam_nano"].defaults
    write_own(own(architecture="sam_nano", defaults={"pred_iou_thresh": 0.3}))
    lower = find_model("cells-7")

    assert lower.defaults == {**MODELS["sam_nano"].defaults, "pred_iou_thresh": 0.3}
    versions = [model_version(spec, what_is_computed(spec, {}, None)) for spec in (usual, lower)]
    assert versions[0] != versions[1]
    require_same_model(lower, json.loads(json.dumps(identity_of(lower))))
    with pytest.raises(WeightsError, match=r"defaults .'pred_iou_thresh': 0.3., sha256 [a1]+, but the job was"):
        require_same_model(lower, identity_of(usual))


def test_an_unknown_name_is_an_error_that_lists_the_models_of_ones_own_too() -> None:
    write_own(own())
    with pytest.raises(
        UnknownModelError, match=r"unknown model 'cells-8' \(did you mean cells-7\?\); known: sam_vit_h, .*, cells-7"
    ):
        find_model("cells-8")
    with pytest.raises(UnknownModelError):
        find_model("../cells-7")


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "..", "a b", "ä", "x" * 101, "a\n", "a@b", "a+b"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(WeightsError, match="cannot be a model's name"):
        require_own_name(name)


GOOD = toml_of(own()).decode()
WRONG = {
    "": "architecture: Field required; sha256: Field required",
    "\x00\x01": "cannot be read as TOML",
    "a = " + "[" * 10_000: "cannot be read as TOML",
    "a = " + "9" * 9_000: "cannot be read as TOML",
    "#" * (MAX_TOML_BYTES + 1): "more than 16,384 bytes",
    GOOD.replace("sam_vit_b", "sam_vit_x"): "architecture 'sam_vit_x' is not one of sam_vit_h, ",
    GOOD.replace("sam_vit_b", "sam3"): "architecture 'sam3' is not one of",
    GOOD.replace("sam_vit_b", "../../etc/passwd"): "architecture: String should match pattern",
    GOOD.replace("size_bytes = 1000", "size_bytes = '1000'"): "size_bytes: Input should be a valid integer",
    GOOD.replace("size_bytes = 1000", "size_bytes = -1"): "size_bytes: Input should be greater than",
    GOOD.replace("a1" * 32, "A1" * 32): "sha256: String should match pattern",
    GOOD.replace("2026-11-26", "'soon'"): "added: Input should be a valid date",
    GOOD.replace("/data/medsam.pth", "a\\u001b[2Jb"): "origin and licence are one line each",
    GOOD + "[defaults]\npoints_per_sid = 12": "unknown parameter 'points_per_sid' (did you mean points_per_side?)",
    GOOD + "[defaults]\npred_iou_thresh = 7": "pred_iou_thresh=7: expected 0..1",
    GOOD + "[defaults]\nbox_nms_thresh = nan": "box_nms_thresh=nan: expected 0..1",
    GOOD + "[defaults]\nprecision = 'fast'": "defaults.precision.int: Input should be a valid integer",
    GOOD + "base = 'sam_vit_b'": "base and base_sha256 go together",
    GOOD + f"base = 'cells-7'\nbase_sha256 = '{'b2' * 32}'": "cannot be its own base",
}


@pytest.mark.parametrize(("content", "said"), WRONG.items(), ids=range(len(WRONG)))
def test_a_toml_that_is_wrong_is_a_named_error_and_hides_no_neighbour(content: str, said: str, folder: Path) -> None:
    (folder / "cells-7.toml").write_text(content)
    write_own(own("fine"))

    with pytest.raises(WeightsError, match=r"cells-7") as raised:
        find_model("cells-7")
    specs, faults = known_models()

    assert said in str(raised.value)
    assert specs[-1].name == "fine"
    assert faults == [str(raised.value)]


def test_a_toml_cannot_take_a_name_of_the_registry(folder: Path) -> None:
    (folder / "sam_vit_b.toml").write_text(GOOD)
    assert find_model("sam_vit_b") is MODELS["sam_vit_b"]
    specs, faults = known_models()
    assert specs == list(MODELS.values())
    assert faults == [
        f"{folder}/sam_vit_b.toml: sam_vit_b is a name of the registry, so this file is ignored; rename it"
    ]
