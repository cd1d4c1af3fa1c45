"""What the fuzzer has found stays fixed."""

from __future__ import annotations

import io

import pytest
import torch

from tests.fuzz.run import read, target_of


class _ShortCall:
    def __reduce__(self) -> tuple[object, tuple[int, ...]]:
        return torch._utils._rebuild_tensor_v2, (1, 2)


def _saved(held: object) -> bytes:
    with io.BytesIO() as file:
        torch.save(held, file)
        return file.getvalue()


UNENDED = b"<ListBucketResult><IsTruncated>true</IsTruncated><Contents><Key>p/a</Key></Contents></ListBucketResult>"
FINDS = {
    "a listing that goes on, but not where": ("S3 listings", UNENDED.replace(b"</Key>", b"</Key><Size>1</Size>")),
    "a listing with an object that has no size": ("S3 listings", UNENDED.replace(b"true", b"false")),
    "a checkpoint that calls a function of torch with too few arguments": (
        "checkpoints of torch",
        _saved({"weight": _ShortCall()}),
    ),
    "the first key of a JSON document that is not UTF-8": ("prompt files", b'["key\xf7\xa0\x8e\x9d": "0.jpg"'),
    "brackets so deep that PyYAML takes minutes": ("label maps", b"[" * 25_000),
    "the same in a data set of YOLO": ("folders of YOLO labels", b"names: " + b"[" * 25_000 + b"\x0c0 .5 .5 .1 .1\n"),
}


@pytest.mark.parametrize("find", FINDS)
def test_what_was_found_is_an_error_with_a_name(find: str) -> None:
    name, data = FINDS[find]
    target = target_of(name)

    with pytest.raises(target.allowed):
        target.read(data)
    read(target, data)
