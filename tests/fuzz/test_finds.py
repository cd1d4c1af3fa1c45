"""What the fuzzer has found stays fixed."""

from __future__ import annotations

import pytest

from tests.fuzz.run import read, target_of

UNENDED = b"<ListBucketResult><IsTruncated>true</IsTruncated><Contents><Key>p/a</Key></Contents></ListBucketResult>"
FINDS = {
    "a listing that goes on, but not where": ("S3 listings", UNENDED.replace(b"</Key>", b"</Key><Size>1</Size>")),
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
