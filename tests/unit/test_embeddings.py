"""Kept embeddings: their addresses, the bytes of their files, and the folder that holds them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from db.embeddings import EmbeddableAsset
from db.settings import Settings
from workers.embeddings.address import EmbeddingError, EmbeddingFault, EmbeddingFormat, EmbeddingOf, embedding_of
from workers.embeddings.codec import decode, encode
from workers.embeddings.store import EmbeddingStore, open_store
from workers.models.files import model_version, weights_sha256
from workers.models.registry import find_model
from workers.models.spec import WeightsError
from workers.storage.objects import open_objects

FP16, INT8 = EmbeddingFormat.FP16, EmbeddingFormat.INT8
OF = EmbeddingOf(
    model="sam_nano", weights_sha256="ab" * 32, fast=False, format=FP16, source="s3://b/p", key="a.jpg", etag="e"
)
ADDRESS = OF.address


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fault_of(content: bytes, of: EmbeddingOf = OF) -> EmbeddingFault:
    with pytest.raises(EmbeddingError) as caught:
        decode(content, of.stamp)
    return caught.value.fault


def make_asset(**changes: object) -> EmbeddableAsset:
    spec = find_model("sam_nano")
    known = {"asset_id": 1, "source": "s3://b/p", "key": "a.jpg", "etag": "e", "model": "sam_nano", "fast": False}
    return EmbeddableAsset(**{**known, "model_version": model_version(spec, {}), **changes})  # type: ignore[arg-type]


# Addresses


@pytest.mark.parametrize(
    "other",
    [
        {"weights_sha256": "cd" * 32},
        {"fast": True},
        {"format": INT8},
        {"source": "s3://b/q"},
        {"key": "b.jpg"},
        {"etag": "f"},
        {"source": "s3://b/pa", "key": ".jpg"},
    ],
)
def test_whatever_changes_the_embedding_changes_its_address(other: dict[str, object]) -> None:
    assert ADDRESS.startswith("abababab/fp16/")
    assert replace(OF, **other).address != ADDRESS  # type: ignore[arg-type]
    assert replace(OF).address == ADDRESS


def test_an_assets_embedding_is_of_the_weights_that_labeled_it_and_of_no_others() -> None:
    sha256 = weights_sha256(find_model("sam_nano"))

    of = embedding_of(make_asset(fast=True), INT8)

    assert (of.weights_sha256, of.source, of.key, of.etag) == (sha256, "s3://b/p", "a.jpg", "e")
    assert of.address.startswith(f"{sha256[:8]}-fast/int8/")
    with pytest.raises(WeightsError, match=r"d10efaca, but the job was made with 00000000"):
        embedding_of(make_asset(model_version="sam_nano@00000000+11111111"), FP16)
    with pytest.raises(WeightsError, match="sam3 takes no points"):
        embedding_of(make_asset(model="sam3", model_version="sam3@00000000+11111111"), FP16)


# Bytes


@pytest.mark.parametrize(("embedding_format", "bytes_a_value", "error"), [(FP16, 2, 1e-3), (INT8, 1, 2e-2)])
def test_an_embedding_of_one_or_several_levels_comes_back_nearly_the_same(
    embedding_format: EmbeddingFormat, bytes_a_value: int, error: float
) -> None:
    of = replace(OF, format=embedding_format)
    one, levels = noise(1, 8, 16, 16), [noise(1, 4, 32, 32), noise(1, 8, 16, 16), torch.zeros(1, 8, 8, 8)]

    content = encode(one, of)
    back, several = decode(content, of.stamp), decode(encode(levels, of), of.stamp)

    assert len(content) < bytes_a_value * one.numel() + 1024
    assert back.dtype == torch.float32
    assert (back - one).abs().max() < error * one.abs().max()
    assert [level.shape for level in several] == [level.shape for level in levels]
    assert all((a - b).abs().max() <= error * b.abs().max() for a, b in zip(several, levels, strict=True))


@pytest.mark.parametrize(
    "other", [{"etag": "f"}, {"key": "b.jpg"}, {"model": "sam_vit_b"}, {"weights_sha256": "ab" * 31 + "00"}]
)
def test_an_embedding_of_another_image_or_of_other_weights_is_foreign(other: dict[str, str]) -> None:
    assert fault_of(encode(noise(1, 2, 4, 4), replace(OF, **other))) is EmbeddingFault.FOREIGN  # type: ignore[arg-type]


def test_a_truncated_or_changed_file_is_damaged_wherever_it_was_cut() -> None:
    content = encode(noise(1, 2, 4, 4), OF)

    for length in range(0, len(content), 7):
        assert fault_of(content[:length]) is EmbeddingFault.DAMAGED, length
    changed = bytearray(content)
    changed[-5] ^= 1
    assert fault_of(bytes(changed)) is EmbeddingFault.DAMAGED
    assert fault_of(b"\xff" * 100) is EmbeddingFault.DAMAGED


def test_a_safetensors_file_of_other_tensors_is_refused() -> None:
    content = encode(noise(1, 2, 4, 4), OF)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    assert b'"crc32"' in header
    metadata = {"version": "1", "address": ADDRESS, "model": "sam_nano", "weights_sha256": "ab" * 32, "etag": "e"}

    assert fault_of(save({"level0": noise(1, 2, 4, 4)}, metadata)) is EmbeddingFault.DAMAGED
    assert fault_of(save({"level0": noise(1, 2, 4, 4)})) is EmbeddingFault.DAMAGED


@pytest.mark.parametrize("embedding_format", [FP16, INT8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_not_written(embedding_format: EmbeddingFormat, value: float) -> None:
    embedding = noise(1, 2, 4, 4)
    embedding[0, 1, 2, 3] = value
    with pytest.raises(EmbeddingError, match="does not fit"):
        encode(embedding, replace(OF, format=embedding_format))
    with pytest.raises(EmbeddingError, match="does not fit"):
        encode(torch.full((1, 1, 2, 2), 1e5), OF)


# The folder


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(open_objects(str(tmp_path / "made" / "later")))


def test_a_folder_keeps_reads_lists_and_deletes(store: EmbeddingStore, tmp_path: Path) -> None:
    store.write(ADDRESS, b"first")
    store.write(ADDRESS, b"second")

    assert store.read(ADDRESS) == b"second"
    [stored] = store.stored()
    assert (stored.name, stored.size_bytes) == (ADDRESS, 6)
    assert abs(stored.changed_at - (tmp_path / "made" / "later" / ADDRESS).stat().st_mtime) < 1
    store.delete(ADDRESS)
    store.delete(ADDRESS)
    assert list(store.stored()) == []
    with pytest.raises(EmbeddingError) as caught:
        store.read(ADDRESS)
    assert caught.value.fault is EmbeddingFault.ABSENT


@pytest.mark.parametrize("address", ["../../etc/passwd", "/etc/passwd", "abababab/fp16/../x", "", "a" * 500])
def test_what_is_no_address_is_never_looked_up(store: EmbeddingStore, address: str) -> None:
    for call in (lambda: store.read(address), lambda: store.write(address, b"")):
        with pytest.raises(EmbeddingError, match="is no address"):
            call()


def test_a_full_disk_is_an_error_and_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    """The limit on the size of a file stands in for the end of the disk's space: a write fails half-way."""
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
from workers.embeddings.store import EmbeddingStore
from workers.embeddings.address import EmbeddingError
from workers.storage.objects import open_objects
try:
    EmbeddingStore(open_objects({str(tmp_path)!r})).write({ADDRESS!r}, bytes(5000))
except EmbeddingError as error:
    print(error.fault, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)

    assert done.stdout.startswith("away ")
    assert "cannot be written (File too large)" in done.stdout
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []


def test_no_setting_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKFLEET_EMBEDDINGS", raising=False)
    assert open_store(Settings()) is None
