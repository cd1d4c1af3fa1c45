"""`--keys`: lists of keys of three kinds, read as streams, resumed exactly, and hostile ones refused by name."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from orchestrator.jobs.key_lists import KeyList
from workers.errors import SourceError
from workers.storage.asset import PAGE_SIZE, Listed
from workers.storage.source import open_source

BUCKET = open_source("s3://bucket/photos")
SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag"


def read(address: Path, source: object = BUCKET, after: str = "") -> tuple[list[Listed], dict[str, int]]:
    skipped: Counter[str] = Counter()
    objects: list[Listed] = []
    for page in KeyList(source, str(address)).list(after):  # type: ignore[arg-type]
        objects += page.objects
        skipped.update({str(reason): n for reason, n in page.skipped.items()})
    return objects, dict(skipped)


def keys(address: Path, source: object = BUCKET) -> list[str]:
    return [one.key for one in read(address, source)[0]]


def write_table(path: Path, rows: int = 2, **columns: Sequence[object]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def write_inventory(folder: Path, parts: Sequence[str], **changes: object) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "2026-11-25T00-00Z").mkdir(exist_ok=True)
    files = []
    for n, part in enumerate(parts):
        content = gzip.compress(part.encode())
        (folder / "data" / f"{n}.csv.gz").write_bytes(content)
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        files.append({"key": f"inv/bucket/all/data/{n}.csv.gz", "size": len(content), "MD5checksum": digest})
    document = {"sourceBucket": "bucket", "fileFormat": "CSV", "fileSchema": SCHEMA, "files": files, **changes}
    path = folder / "2026-11-25T00-00Z" / "manifest.json"
    path.write_text(json.dumps(document))
    return path


def row(key: str, *, bucket: str = "bucket", latest: str = "true", deleted: str = "false") -> str:
    return f'"{bucket}","{key}","v","{latest}","{deleted}","7","2026-01-01T00:00:00.000Z","e1"\n'


def test_a_text_file_has_a_key_a_line_and_a_line_that_is_none_stops_no_other(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(
        b"\xef\xbb\xbfb.jpg\r\na.jpg\n\n  spaced .jpg\ns3://bucket/photos/d/e.jpg\n\xff\n"
        b"nul\0.jpg\n" + b"x" * 3_000_000 + b"\n" + b"y" * 1100 + b"\n" + "last é.jpg".encode()
    )

    found, skipped = read(path)

    assert [one.key for one in found] == ["b.jpg", "a.jpg", "  spaced .jpg", "d/e.jpg", "last é.jpg"]
    assert skipped == {"not_a_key": 4}
    assert found[0] == Listed(key="b.jpg", size_bytes=0, etag="")


def test_parquet_has_keys_and_may_have_sizes_and_etags(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "k",
        key=["a", "s3://bucket/photos/b", None, "c"],
        size=[1, None, 3, -4],
        etag=['"e1"', None, "e3", "e4"],
    )

    found, skipped = read(path)

    assert [(one.key, one.size_bytes, one.etag) for one in found] == [("a", 1, "e1"), ("b", 0, ""), ("c", 0, "e4")]
    assert skipped == {"not_a_key": 1}


def test_an_inventory_gives_what_is_below_the_source_and_the_newest_version(tmp_path: Path) -> None:
    first = row("photos/a%20b%2B.jpg") + row("photos2/c.jpg") + row("photos/d.jpg", latest="false")
    second = row("photos/e+f.jpg") + row("photos/g.jpg", deleted="true") + row("photos/h", bucket="other")

    found, skipped = read(write_inventory(tmp_path, [first, second]))

    assert [(one.key, one.size_bytes, one.etag) for one in found] == [("a b+.jpg", 7, "e1"), ("e f.jpg", 7, "e1")]
    assert skipped == {"outside_source": 2, "not_newest_version": 2}


def test_an_inventory_in_parquet_is_read_alike(tmp_path: Path) -> None:
    path = write_inventory(tmp_path, ["x"], fileFormat="Parquet")
    part = write_table(
        tmp_path / "data" / "0.csv.gz",
        bucket=["bucket", "other", "bucket"],
        key=["photos/a.jpg", "photos/b.jpg", "photos/c.jpg"],
        size=[7, 7, 7],
        e_tag=["e1", "e2", "e3"],
        is_latest=[True, True, False],
    )
    document = json.loads(path.read_text())
    document["files"][0]["MD5checksum"] = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    path.write_text(json.dumps(document))

    found, skipped = read(path)

    assert found == [Listed(key="a.jpg", size_bytes=7, etag="e1")]
    assert skipped == {"outside_source": 1, "not_newest_version": 1}


@pytest.mark.parametrize("kind", ["text", "parquet", "inventory"])
def test_a_listing_resumes_behind_each_page_without_a_loss_or_a_repeat(tmp_path: Path, kind: str) -> None:
    names = [f"{n:05}.jpg" for n in range(2 * PAGE_SIZE + 500)]
    if kind == "text":
        path = tmp_path / "keys"
        path.write_text("\n".join(names))
    elif kind == "parquet":
        path = write_table(tmp_path / "keys", rows=700, key=names)
    else:
        lines = [row(f"photos/{name}") for name in names]
        path = write_inventory(tmp_path, ["".join(lines[:1200]), "", "".join(lines[1200:])])

    pages = list(KeyList(BUCKET, str(path)).list())

    assert [one.key for page in pages for one in page.objects] == names
    assert [len(page.objects) for page in pages] == [PAGE_SIZE, PAGE_SIZE, 500]
    for k, page in enumerate(pages):
        assert [one.key for one in read(path, after=page.cursor)[0]] == names[(k + 1) * PAGE_SIZE :]


def test_a_list_that_was_changed_while_it_is_listed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a.jpg\n" * PAGE_SIZE + "b.jpg\n")
    first = next(KeyList(BUCKET, str(path)).list())
    path.write_text("z.jpg\n" + path.read_text())

    with pytest.raises(SourceError, match="was changed while its keys were listed"):
        read(path, after=first.cursor)


def test_keys_of_a_folder_are_looked_at_and_none_leads_out_of_it(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("a.jpg", "sub/b.jpg", "..c.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (root / "out").symlink_to(tmp_path)
    listed = tmp_path / "keys"
    names = [
        "a.jpg",
        "sub/b.jpg",
        "..c.jpg",
        "gone.jpg",
        "sub",
        "../secret.jpg",
        "/a.jpg",
        "sub/../a.jpg",
        "out/secret.jpg",
    ]
    listed.write_text("\n".join(names))

    found, skipped = read(listed, open_source(str(root)))

    assert [one.key for one in found] == ["a.jpg", "sub/b.jpg", "..c.jpg"]
    walked = [one for page in open_source(str(root)).list() for one in page.objects]
    assert sorted(found, key=lambda one: one.key) == walked
    assert skipped == {"not_found": 1, "not_a_file": 1, "not_a_key": 3, "link_out_of_source": 1}


def test_a_folders_addresses_are_taken_as_exports_write_them_and_as_paths(tmp_path: Path) -> None:
    root = tmp_path / "my photos"
    (root / "sub").mkdir(parents=True)
    names = ["a b.jpg", "é.jpg", "sub/50%25.jpg"]
    for name in names:
        (root / name).touch()
    source, text = open_source(str(root)), tmp_path / "keys"
    addresses = [source.uri(name) for name in names]
    assert addresses[0].endswith("/my%20photos/a%20b.jpg")

    text.write_text("\n".join(addresses))
    assert keys(text, source) == names
    assert keys(write_table(tmp_path / "table", key=addresses), source) == names
    text.write_text("\n".join([*(str(root / name) for name in names), f"{root}2/a b.jpg", f"{root}/../secret.jpg"]))
    assert read(text, source)[1] == {"not_a_key": 2}
    assert keys(text, source) == names
    text.write_text(f"file://{tmp_path}/other.jpg\ns3://bucket/other.jpg")
    assert read(text, source)[1] == {"outside_source": 2}
    text.write_text("\n".join(f"./{name}" for name in names))  # of `find .`
    assert keys(text, source) == names
    text.write_text(source.uri("é" * 1200 + ".jpg"))
    assert read(text, source)[1] == {"not_a_file": 1}  # of 7,200 characters, but a key of 2,404 bytes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b"a.jpg\nb.jpg\n", mtime=0), "is compressed with gzip: unpack it"),
        ("a.jpg\n".encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        (b"PK\3\4 and what else a spreadsheet has", "is a zip archive"),
        (b"PAR1 and nothing of Parquet", "cannot be read as Parquet"),
        (b'{"files": 3}', "is no manifest.json of S3 Inventory"),
        (b"{" * 100_000, "is no manifest.json of S3 Inventory"),
        (b'{"sourceBucket": "b", "fileFormat": "ORC", "fileSchema": "", "files": []}', "expected CSV or Parquet"),
        (b'{"sourceBucket": "b", "fileFormat": "CSV", "fileSchema": "Key", "files": []}', "expected Bucket and Key"),
        (
            b'{"sourceBucket": "b", "fileFormat": "CSV", "fileSchema": "Bucket, Key", "files": []}',
            "lists the bucket b, the job's is bucket",
        ),
        (
            b'{"sourceBucket": "bucket", "fileFormat": "Parquet", "files": [{"key": "\\u0000", "MD5checksum": ""}]}',
            "names a file with a NUL",
        ),
    ],
)
def test_what_is_no_list_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(SourceError, match=said) as raised:
        KeyList(BUCKET, str(tmp_path / "list")).check()
    assert str(tmp_path / "list") in str(raised.value)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ('"bucket","photos/a.jpg"\n', "row 1 has 2 fields, expected 8"),
        ("x" * 70_000, "has a line of more than"),
        ('"bucket","photos/a.jp', "cannot be read as gzipped CSV"),
    ],
)
def test_a_part_of_an_inventory_that_is_damaged_is_refused_by_name(tmp_path: Path, part: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        read(write_inventory(tmp_path, [part]))
    path = write_inventory(tmp_path, [row("photos/a.jpg")])
    (tmp_path / "data" / "0.csv.gz").write_bytes(b"other")
    with pytest.raises(SourceError, match="its MD5 is"):
        read(path)


def test_columns_of_other_kinds_and_large_row_groups_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, said in [
        ({"name": ["a"]}, "has no column `key`, only name"),
        ({"key": [1, 2]}, "the column key holds int64, expected strings"),
        ({"key": ["a"], "size": ["1"]}, "the column size holds string, expected whole numbers"),
    ]:
        with pytest.raises(SourceError, match=said):
            read(write_table(tmp_path / "k", **columns))
    monkeypatch.setattr("orchestrator.jobs.key_tables._MOST_GROUP_BYTES", 10)
    with pytest.raises(SourceError, match="write it with smaller row groups"):
        read(write_table(tmp_path / "k", key=["a" * 100]))


@effort(max_examples=100, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_give_keys_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("list") / "keys"
    for head in (b"", b"PAR1", b'{"a":'):
        path.write_bytes(head + content)
        with suppress(SourceError):
            assert all("\0" not in one.key and "\n" not in one.key for one in read(path)[0])


def test_a_table_with_a_column_twice_is_refused_by_name(tmp_path: Path) -> None:
    twice = pa.table([["a.jpg"], ["b.jpg"]], names=["key", "key"])
    pq.write_table(twice, tmp_path / "twice.parquet")

    with pytest.raises(SourceError, match=r"twice\.parquet: has the column key twice"):
        read(tmp_path / "twice.parquet")


def test_an_etag_that_postgres_cannot_store_is_left_out(tmp_path: Path) -> None:
    path = write_inventory(tmp_path, [row("photos/a.jpg").replace("e1", "e\0")])

    assert [(one.key, one.etag) for one in read(path)[0]] == [("a.jpg", "")]


def test_what_is_no_file_here_is_refused_with_the_machine_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the machine that lists the source reads it"):
        KeyList(BUCKET, str(tmp_path / "gone")).check()
    with pytest.raises(SourceError, match="is no regular file"):
        KeyList(BUCKET, str(tmp_path)).check()
    with pytest.raises(SourceError, match="expected s3://bucket/key"):
        KeyList(BUCKET, "s3://bucket").check()
