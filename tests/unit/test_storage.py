"""Folders as sources: order, resuming, names of any kind, and nothing from outside. Buckets: tests/integration."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.needs import TESTDATA
from workers.errors import AssetError, ErrorKind, SourceError, redact
from workers.storage.asset import PAGE_SIZE, SkipReason
from workers.storage.source import open_source

NASTY = TESTDATA / "nasty"
MEGABYTE = 2**20


def fill(root, *keys):
    """Make files (a key may be bytes that are not UTF-8), each holding its own key, and open the folder."""
    for key in keys:
        path = Path(root, os.fsdecode(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(key))
    return open_source(str(root))


def keys_of(source, after=""):
    return [entry.key for page in source.list(after) for entry in page.objects]


def skipped_by(source):
    counts = {}
    for page in source.list():
        for reason, count in page.skipped.items():
            counts[reason] = counts.get(reason, 0) + count
    return counts


# --- listing


def test_keys_come_in_the_binary_order_of_whole_keys(tmp_path):
    source = fill(
        tmp_path, "a/b.jpg", "a.jpg", "a-1.jpg", "a0.jpg", "a/b/c.jpg", "Z.jpg", "é.jpg", "a/b0", "\U0001f436", "\uffee"
    )

    assert keys_of(source) == sorted(keys_of(source), key=str.encode)
    assert keys_of(source)[:5] == ["Z.jpg", "a-1.jpg", "a.jpg", "a/b.jpg", "a/b/c.jpg"]


names = st.text(st.sampled_from("ab.-0é\U0001f436/"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(wanted=st.sets(names, max_size=12), data=st.data())
def test_a_listing_resumes_behind_any_cursor(tmp_path_factory, wanted, data):
    root = tmp_path_factory.mktemp("tree")
    keys = {os.path.normpath(key).lstrip("/") for key in wanted} - {".", "..", ""}
    keys = {key for key in keys if ".." not in key and not any(other.startswith(key + "/") for other in keys)}
    source = fill(root, *keys)
    after = data.draw(st.one_of(names, st.sampled_from(sorted(keys) or ["x"])))

    assert keys_of(source, after) == [key for key in sorted(keys, key=str.encode) if key.encode() > after.encode()]


def test_pages_hold_a_thousand_and_the_cursor_is_the_last_key(tmp_path):
    source = fill(tmp_path, *(f"{number % 7}/{number:05}.jpg" for number in range(2 * PAGE_SIZE + 1)))

    pages = list(source.list())

    assert [len(page.objects) for page in pages] == [PAGE_SIZE, PAGE_SIZE, 1]
    assert all(page.cursor == page.objects[-1].key for page in pages)
    assert keys_of(source, pages[0].cursor) == [entry.key for page in pages[1:] for entry in page.objects]


def test_a_folder_with_more_names_than_memory_may_hold_is_read_in_parts(tmp_path, monkeypatch):
    keys = [
        *(f"{number:04}-{'n' * (number % 90)}.jpg" for number in range(1500)),
        *(f"{n * 77:04}/a.jpg" for n in range(9)),
    ]
    source = fill(tmp_path, *keys)
    monkeypatch.setattr("workers.storage.folder._MOST_BYTES", 10_000)  # about a hundred names

    assert keys_of(source) == sorted(keys)
    for after in ("0077", "0077/a.jpg", "0400-", "1499", "zzz"):
        assert keys_of(source, after) == [key for key in sorted(keys) if key > after]


def test_an_empty_folder_has_no_pages(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)

    assert list(open_source(str(tmp_path)).list()) == []


def test_the_etag_changes_when_the_file_is_written(tmp_path):
    source = fill(tmp_path, "a.jpg")
    ((before,),) = (page.objects for page in source.list())

    os.utime(tmp_path / "a.jpg", ns=(1, 1))

    ((after,),) = (page.objects for page in source.list())
    assert before.size_bytes == after.size_bytes == len("a.jpg")
    assert before.etag != after.etag
    assert after.etag == "5-1"


def test_what_is_no_file_is_skipped_and_counted(tmp_path):
    source = fill(tmp_path / "source", "a.jpg", "sub/b.jpg")
    fill(tmp_path / "elsewhere", "secret.jpg")
    inside = tmp_path / "source"
    os.mkfifo(inside / "fifo.jpg")
    (inside / "dangling.jpg").symlink_to(inside / "nothing")
    (inside / "circle.jpg").symlink_to(inside / "circle.jpg")
    (inside / "folder-link").symlink_to(inside / "sub")
    (inside / "outside.jpg").symlink_to(tmp_path / "elsewhere" / "secret.jpg")
    (inside / "annexed.jpg").symlink_to(tmp_path / "not fetched yet")
    (inside / "within.jpg").symlink_to(inside / "sub" / "b.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(inside / "s.jpg"))

        assert keys_of(source) == ["a.jpg", "sub/b.jpg", "within.jpg"]
        assert skipped_by(source) == {SkipReason.NOT_A_FILE: 5, SkipReason.LINK_OUT: 2}


def test_links_that_leave_the_folder_are_counted_apart_from_dead_ones(tmp_path):
    fill(tmp_path / "store", "ab/cd1.png", "ab/cd2.png")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").symlink_to("../store/ab/cd1.png")
    (photos / "b.png").symlink_to("../store/ab/cd2.png")
    (photos / "day").symlink_to("../store/ab")
    (photos / "dead.png").symlink_to("gone.png")

    assert keys_of(open_source(str(photos))) == []
    assert skipped_by(open_source(str(photos))) == {SkipReason.LINK_OUT: 3, SkipReason.NOT_A_FILE: 1}


def test_a_path_that_is_too_long_for_an_index_is_counted_and_does_not_stop_the_page(tmp_path):
    source = fill(tmp_path, "a.jpg", "/".join(["f" * 200] * 14), "z.jpg")

    assert keys_of(source) == ["a.jpg", "z.jpg"]
    assert skipped_by(source) == {SkipReason.UNSTORABLE_NAME: 1}


def test_names_that_are_not_utf8_are_counted_and_do_not_stop_the_page(tmp_path):
    source = fill(tmp_path, "a.jpg", b"b\xff.jpg", b"dir\xfe/c.jpg", "z.jpg")

    assert keys_of(source) == ["a.jpg", "z.jpg"]
    assert skipped_by(source) == {SkipReason.UNSTORABLE_NAME: 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_subfolder_is_counted_and_does_not_stop_the_listing(tmp_path):
    source = fill(tmp_path, "a.jpg", "lost+found/b.jpg", "z.jpg")
    (tmp_path / "lost+found").chmod(0)

    assert keys_of(source) == ["a.jpg", "z.jpg"]
    assert skipped_by(source) == {SkipReason.UNREADABLE_FOLDER: 1}


@pytest.fixture
def folder_1100_deep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):
        Path("d").mkdir()
        os.chdir("d")
    Path("deep.jpg").write_bytes(b"")
    yield tmp_path
    Path("deep.jpg").unlink()
    for _ in range(1100):  # pytest's own removal would recurse, and fail at the end of some later session
        os.chdir("..")
        Path("d").rmdir()


def test_a_folder_nested_deeper_than_pythons_stack_is_listed(folder_1100_deep):
    assert keys_of(open_source(str(folder_1100_deep))) == ["d/" * 1100 + "deep.jpg"]


# --- names


@pytest.mark.usefixtures("testdata")
def test_every_hostile_key_is_listed_and_read_with_its_own_bytes(tmp_path):
    wanted = {entry["key"]: (NASTY / "keys" / entry["file"]).read_bytes() for entry in hostile_keys()}
    for key, content in wanted.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(content)
    source = open_source(str(tmp_path))

    assert {key: source.read(key, MEGABYTE) for key in keys_of(source)} == wanted


def hostile_keys():
    return json.loads((NASTY / "keys.json").read_text())["keys"]


def test_composed_and_decomposed_letters_stay_two_files(tmp_path):
    source = fill(tmp_path, "\u00e9.jpg", "e\u0301.jpg", "new\nline.jpg", "pct%20.jpg", "-dash.jpg")

    assert keys_of(source) == ["-dash.jpg", "e\u0301.jpg", "new\nline.jpg", "pct%20.jpg", "\u00e9.jpg"]
    assert all(source.read(key, MEGABYTE) == key.encode() for key in keys_of(source))


def test_a_uri_leads_back_to_the_file(tmp_path):
    source = fill(tmp_path / "my photos", "50% + é#?.jpg")

    folder, name = source.uri("50% + é#?.jpg").rsplit("/", 1)

    assert open_source(folder).read("50% + é#?.jpg", MEGABYTE) == "50% + é#?.jpg".encode()
    assert name == "50%25%20%2B%20%C3%A9%23%3F.jpg"


# --- reading


@pytest.mark.parametrize(
    "key", ["../secret.jpg", "sub/../../secret.jpg", "link/secret.jpg", "outside.jpg", "nul\0.jpg"]
)
def test_nothing_outside_of_the_folder_is_read(tmp_path, key):
    fill(tmp_path, "secret.jpg")
    source = fill(tmp_path / "source", "sub/a.jpg")
    (tmp_path / "source" / "link").symlink_to(tmp_path)
    (tmp_path / "source" / "outside.jpg").symlink_to(tmp_path / "secret.jpg")

    with pytest.raises(AssetError) as caught:
        source.read(key, MEGABYTE)

    assert caught.value.kind == ErrorKind.FORBIDDEN


def test_an_absolute_key_is_not_read(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")

    with pytest.raises(AssetError) as caught:
        fill(tmp_path / "source", "a.jpg").read(str(secret), MEGABYTE)

    assert caught.value.kind == ErrorKind.FORBIDDEN


def test_a_folder_that_is_a_link_itself_is_read(tmp_path):
    fill(tmp_path / "real", "a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")

    assert keys_of(open_source(str(tmp_path / "link"))) == ["a.jpg"]
    assert open_source(str(tmp_path / "link")).read("a.jpg", MEGABYTE) == b"a.jpg"


def test_a_file_of_max_bytes_is_read_and_one_byte_more_is_too_large(tmp_path):
    source = fill(tmp_path, "a.jpg")

    assert source.read("a.jpg", 5) == b"a.jpg"
    with pytest.raises(AssetError, match=r"a\.jpg: 5 bytes; at most 4 are read") as caught:
        source.read("a.jpg", 4)
    assert caught.value.kind == ErrorKind.TOO_LARGE


@pytest.mark.parametrize("key", ["gone.jpg", "a.jpg/below.jpg", "sub", "x" * 300])
def test_a_file_that_is_gone_is_not_found(tmp_path, key):
    with pytest.raises(AssetError) as caught:
        fill(tmp_path, "a.jpg", "sub/b.jpg").read(key, MEGABYTE)

    assert caught.value.kind == ErrorKind.NOT_FOUND


def test_a_fifo_in_a_files_place_does_not_block_the_reader(tmp_path):
    source = fill(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")

    with pytest.raises(AssetError) as caught:
        source.read("fifo.jpg", MEGABYTE)

    assert caught.value.kind == ErrorKind.NOT_FOUND


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_forbidden(tmp_path):
    source = fill(tmp_path, "a.jpg")
    (tmp_path / "a.jpg").chmod(0)

    with pytest.raises(AssetError) as caught:
        source.read("a.jpg", MEGABYTE)

    assert caught.value.kind == ErrorKind.FORBIDDEN


# --- sources


def test_a_folder_can_be_given_as_a_file_url(tmp_path):
    fill(tmp_path / "my photos", "a.jpg")

    assert keys_of(open_source(f"file://{tmp_path}/my%20photos")) == ["a.jpg"]
    assert keys_of(open_source(f"file://localhost{tmp_path}/my%20photos")) == ["a.jpg"]


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("photos", "an absolute path"),
        ("", "an absolute path"),
        ("s3://", "no bucket"),
        ("s3:///photos", "no bucket"),
        ("https://example.org/a.jpg", "expected s3://bucket/prefix"),
        ("file://server/share", "expected s3://bucket/prefix"),
    ],
)
def test_a_source_of_another_kind_is_refused_with_what_is_expected(source, remedy):
    with pytest.raises(SourceError, match=remedy):
        open_source(source)


def test_check_says_what_is_wrong_with_a_folder(tmp_path):
    fill(tmp_path, "a.jpg").check()

    with pytest.raises(SourceError, match="no such folder"):
        open_source(str(tmp_path / "gone")).check()
    with pytest.raises(SourceError, match="is a file; give the folder"):
        open_source(str(tmp_path / "a.jpg")).check()


# --- messages


@pytest.mark.parametrize(
    "secret_text",
    [
        "key AKIAIOSFODNN7SECRET1 is unknown",
        "Authorization: Bearer SECRET1-abc.def",
        "{'Authorization': 'Token SECRET1'}",
        '{"password": "SECRET1 with spaces", "user": "u"}',
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRET1&X-Amz-Signature=SECRET1&X-Amz-Security-Token=SECRET1",
        "postgresql://user:SECRET1@host:5432/db and redis://:SECRET1@host:6379/0",
        "postgresql://user:SECRET1@%2f#@host/db",
        "dbname=x password=SECRET1 host=y",
        "dbname=x password='SECRET1 x' host=y",
        "GET /?token=SECRET1&page=2",
        "aws_secret_access_key = SECRET1/abc+def",
        "AWS_SECRET_ACCESS_KEY=SECRET1",
        "LABEL_STUDIO_API_KEY=SECRET1",
        "jwt eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJSECRET1.abc-SECRET1",
    ],
)
def test_redact_removes_what_opens_doors(secret_text):
    assert "SECRET1" not in redact(secret_text)
    assert redact(redact(secret_text)) == redact(secret_text)


@pytest.mark.parametrize(
    "harmless",
    [
        "photos/2024@2x.jpg: 3 bytes; at most 2 are read",
        "http://127.0.0.1:9000/bucket/a@2x.jpg does not answer",
        "s3://bucket/a:b@c.jpg: not an image (starts b'\\x00')",
        "postgresql://host:5432/db refused the connection",
        "unexpected token at line 3: expected a number",
    ],
)
def test_redact_leaves_ordinary_messages_alone(harmless):
    assert redact(harmless) == harmless
