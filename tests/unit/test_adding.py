"""Checkpoints of one's own are checked and stored as models, from files as training scripts leave them."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from db.settings import settings
from workers.models.adding import add
from workers.models.decoders import load_decoder
from workers.models.files import weights_path
from workers.models.loading import load_model
from workers.models.nano import load_sam_nano
from workers.models.part_file import exclusive_part
from workers.models.registry import find_model
from workers.models.sam import SamModel
from workers.models.spec import WeightsError
from workers.models.weights import verify


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_sam_nano("cpu").state_dict().items()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    settings.cache_clear()
    yield tmp_path / "weights"
    settings.cache_clear()


def bring(file: Path, name: str = "mine", architecture: str = "sam_nano") -> None:
    add(name, file, architecture, origin=str(file), licence="MIT")


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def test_a_checkpoint_of_a_training_script_becomes_a_model_that_loads(
    tmp_path: Path, folder: Path, state: dict[str, torch.Tensor]
) -> None:
    changed = state | {"mask_decoder.iou_token.weight": state["mask_decoder.iou_token.weight"] + 1}
    checkpoint = {"model": {"state_dict": prefixed("module.sam.", changed)}, "epoch": 3, "optimizer": {"lr": 1e-3}}
    torch.save(checkpoint, tmp_path / "last.pth")

    bring(tmp_path / "last.pth")

    spec = find_model("mine")
    model = load_model(spec, "cpu")
    assert isinstance(model, SamModel)
    loaded = model.sam.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in changed.items())
    assert load_decoder(spec, "cpu").device.type == "cpu"
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "mine.toml"]
    assert verify(spec).found == "the file that was added"
    assert weights_path(spec).stat().st_mode & 0o777 == (tmp_path / "last.pth").stat().st_mode & 0o777


def test_the_same_tensors_give_the_same_model_from_every_kind_of_file(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    torch.save(state, tmp_path / "plain.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model_state": prefixed("sam.", state)}, tmp_path / "micro.pt")
    torch.save({"state_dict": prefixed("sam.module.", state)}, tmp_path / "both.ckpt")
    save_file(prefixed("module.", state), tmp_path / "kept.safetensors")
    save_file(state, tmp_path / "misnamed.pth")
    save_file(state, tmp_path / "bare")

    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 7
    for path in files:
        bring(path, path.stem)

    assert len({find_model(path.stem).sha256 for path in files}) == 1


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


@pytest.mark.slow  # builds every architecture to see which one fits
def test_a_file_that_is_no_checkpoint_of_the_architecture_is_a_named_error_and_stores_nothing(
    tmp_path: Path, folder: Path, state: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    weight, other = "mask_decoder.iou_token.weight", "mask_decoder.mask_tokens.weight"
    ten = ", ".join(f"extra{n}" for n in range(10))
    checkpoints: dict[str, tuple[object, str]] = {
        "code": (Harm(), "could run code; save its state dict alone"),
        "number": (7, "holds a int, expected tensors by name"),
        "empty": ({}, "holds entries , expected tensors by name"),
        "other": ({"epoch": 3, "loss": 0.1}, "holds other things than plain tensors: epoch, loss"),
        "mixed": (state | {"note": "x"}, "holds other things than plain tensors: note"),
        "shapes": (
            {name: tensor for name, tensor in state.items() if name != other}
            | {f"extra{n}": torch.zeros(1) for n in range(12)}
            | {weight: torch.zeros(2, 3)},
            f"1 missing ({other}), 12 unexpected ({ten}, …), 1 of another shape ({weight} (2, 3), not (1, 128)); no a",
        ),
        "whole": (state | {weight: state[weight].int()}, f"1 of another kind of number ({weight})"),
        "nan": (state | {weight: state[weight] * float("nan")}, f"1 tensors hold NaN or infinity ({weight})"),
        "large": (state | {weight: state[weight].double() + 1e300}, f"1 tensors hold NaN or infinity ({weight})"),
        "meta": (state | {weight: state[weight].to("meta")}, f"holds other things than plain tensors: {weight}"),
        "complex": (state | {weight: state[weight].cfloat()}, f"holds other things than plain tensors: {weight}"),
    }
    for name, (content, said) in checkpoints.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError) as raised:
            bring(tmp_path / f"{name}.pth")
        assert said in str(raised.value), name
        assert str(tmp_path / f"{name}.pth") in str(raised.value)

    whole = (tmp_path / "nan.pth").read_bytes()
    damaged: dict[str, tuple[bytes, str]] = {
        "cut.pth": (whole[: len(whole) // 2], "cut off or damaged"),
        "none.pth": (b"", "it is a file of unknown format"),
        "page.pth": (b"<html>", "it is an HTML page, expected what torch.save or safetensors writes"),
        "swapped.safetensors": (whole, "it is a torch archive, expected what safetensors writes"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
    }
    for name, (content, said) in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name}: cannot be read as a checkpoint.*{said}"):
            bring(tmp_path / name)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
    with pytest.raises(WeightsError):
        bring(tmp_path / "bare.pth")

    assert not folder.exists()
    assert "code ran" not in capfd.readouterr().out


def test_no_terminal_obeys_the_names_in_a_foreign_file(tmp_path: Path) -> None:
    save_file({"\x1b]0;owned\x07x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    words = ["workers.models.adding", "mine", str(tmp_path / "foreign.safetensors"), "sam_nano", "", ""]

    done = subprocess.run([sys.executable, "-P", "-m", *words], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert r"1 unexpected (\x1b]0;owned\x07x)" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_the_architecture_that_would_fit_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "nano.pth")

    with pytest.raises(WeightsError, match=r"not mobile_sam: .* missing .*; it fits --architecture sam_nano"):
        bring(tmp_path / "nano.pth", architecture="mobile_sam")


def test_a_full_disk_is_a_named_error(tmp_path: Path, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The limit on the size of a file stands in for the end of the disk's space: a write fails half-way."""
    save_file(state, tmp_path / "mine.safetensors")
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
from pathlib import Path
from workers.models.adding import add
from workers.models.spec import WeightsError
try:
    add("mine", Path({str(tmp_path / "mine.safetensors")!r}), "sam_nano", origin="", licence="")
except WeightsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert f"mine: cannot write {folder / 'mine.safetensors'}" in done.stdout
    assert "File too large" in done.stdout


def test_a_name_that_is_taken_keeps_its_weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "first.pth")
    bring(tmp_path / "first.pth")
    before = find_model("mine")

    with pytest.raises(WeightsError, match="mine is here already"):
        bring(tmp_path / "first.pth")
    with pytest.raises(WeightsError, match="sam_vit_b is a model of the registry"):
        bring(tmp_path / "first.pth", "sam_vit_b")

    assert find_model("mine") == before
    assert verify(before).ok


def test_what_a_killed_add_left_is_in_nobodys_way(tmp_path: Path, folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "first.pth")
    folder.mkdir()
    for left in ("mine.safetensors", "mine.safetensors.part", "mine.safetensors.part.whole"):
        (folder / left).write_bytes(b"half")

    bring(tmp_path / "first.pth")

    assert verify(find_model("mine")).ok
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "mine.toml"]
    with exclusive_part(folder / "mine.safetensors"):  # its lock is free
        pass
