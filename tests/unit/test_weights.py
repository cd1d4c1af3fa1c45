"""Weights files are looked at and brought over real HTTP; only loopback is spoken to."""

import hashlib
import io
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from db.settings import settings
from workers.models.download import ATTEMPTS, Manner
from workers.models.files import weights_path
from workers.models.pulling import Bringing, pull
from workers.models.registry import MODELS
from workers.models.spec import ModelSpec, WeightsError
from workers.models.weights import WeightsState, verify

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 1200
HALF = len(CONTENT) // 2


class FileServer(ThreadingHTTPServer):
    """Serves `content` whatever the path. Each request takes the next of `statuses` and of `cuts` (bytes sent)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pth"
        self.content = CONTENT
        self.etag = '"v1"'
        self.ranges = True
        self.range_error = 0
        self.declares_length = True
        self.redirect_to = None
        self.statuses = []
        self.cuts = []
        self.requests = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers)
        status = server.statuses.pop(0) if server.statuses else 200
        if status != 200:
            self.send_error(status)
            return
        if server.redirect_to:
            self.send_response(302)
            self.send_header("Location", server.redirect_to)
            self.end_headers()
            return
        start = self.first_byte()
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.declares_length:
            self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def first_byte(self):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", self.server.etag) == self.server.etag
        return int(asked[1]) + self.server.range_error if asked and unchanged and self.server.ranges else 0

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    settings.cache_clear()
    yield tmp_path / "weights"
    settings.cache_clear()


def make_spec(url="https://example.invalid/weights.pth", content=CONTENT, name="tiny", **changes):
    values = {
        "name": name,
        "family": "test",
        "loader": "nowhere:load",
        "weights_file": f"{name}.pth",
        "url": url,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "parameter_count": 1,
        "prompts": (),
        "licence": "Apache-2.0",
    }
    return ModelSpec(**{**values, **changes})


LOOPBACK = Manner(plain_http_on_loopback=True, backoff_seconds=0)


def bring(spec, progress=lambda done, total: None):
    return pull(spec, Bringing(progress=progress, manner=LOOPBACK))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def put(spec, content):
    path = weights_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_pull_brings_the_file_and_leaves_nothing_else(server, folder):
    seen = []

    path = bring(make_spec(server.url), lambda done, total: seen.append((done, total)))

    assert path == folder / "tiny.pth"
    assert path.read_bytes() == CONTENT
    assert names_in(folder) == ["tiny.pth"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_pull_does_not_ask_again_for_a_file_that_is_right(server):
    put(make_spec(), CONTENT)

    bring(make_spec(server.url))

    assert server.requests == []


def test_pull_replaces_a_wrong_file(server):
    spec = make_spec(server.url)
    put(spec, b"<html>not found</html>")

    assert bring(spec).read_bytes() == CONTENT


def test_connection_that_dies_half_way_is_continued_where_it_stopped(server):
    server.cuts = [HALF]

    path = bring(make_spec(server.url))

    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert 0 < int(re.findall(r"\d+", server.requests[1]["Range"])[0]) <= HALF
    assert server.requests[1]["If-Range"] == '"v1"'


def test_pull_continues_what_an_earlier_pull_left(server, folder):
    spec = make_spec(server.url)
    server.cuts = [1000] * ATTEMPTS
    with pytest.raises(WeightsError, match=rf"{ATTEMPTS} attempts failed.*maskfleet models pull tiny"):
        bring(spec)
    assert names_in(folder) == ["tiny.pth.part", "tiny.pth.part.etag"]
    server.requests.clear()

    path = bring(spec)

    assert path.read_bytes() == CONTENT
    assert [request["Range"] for request in server.requests] == [f"bytes={ATTEMPTS * 1000}-"]
    assert names_in(folder) == ["tiny.pth"]


def test_pull_finishes_a_part_that_lacks_nothing_without_a_request(server, folder):
    folder.mkdir()
    (folder / "tiny.pth.part").write_bytes(CONTENT)

    assert bring(make_spec(server.url)).read_bytes() == CONTENT
    assert server.requests == []


def test_server_that_ignores_ranges_sends_the_whole_file_again(server):
    server.ranges = False
    server.cuts = [HALF]

    assert bring(make_spec(server.url)).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_file_that_changes_on_the_server_between_attempts_is_never_mixed(server):
    spec = make_spec(server.url)
    server.content, server.etag = CONTENT[::-1], '"old"'
    server.cuts = [HALF] * ATTEMPTS
    with pytest.raises(WeightsError):
        bring(spec)
    server.content, server.etag = CONTENT, '"new"'
    server.cuts, server.requests = [], []

    assert bring(spec).read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("left", [b"x" * HALF, b"x" * (len(CONTENT) + 1), b"x" * len(CONTENT)])
def test_part_of_another_file_is_thrown_away_and_the_download_starts_over(server, folder, left):
    folder.mkdir()
    (folder / "tiny.pth.part").write_bytes(left)
    server.etag = None

    assert bring(make_spec(server.url)).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"\xe9"'])
def test_etag_that_cannot_name_the_bytes_is_not_sent_back(server, etag):
    server.etag = etag
    server.cuts = [HALF]

    assert bring(make_spec(server.url)).read_bytes() == CONTENT
    assert "If-Range" not in server.requests[1]
    assert "Range" in server.requests[1]


def test_wrong_file_of_the_right_size_is_refused_and_not_kept(server, folder):
    server.content = CONTENT[::-1]

    with pytest.raises(WeightsError, match=f"another file, with sha256 {hashlib.sha256(CONTENT[::-1]).hexdigest()}"):
        bring(make_spec(server.url))

    assert not (folder / "tiny.pth").exists()
    assert (folder / "tiny.pth.part").stat().st_size == 0


def test_another_models_file_is_named(server, monkeypatch):
    other = make_spec(content=CONTENT[::-1], name="other")
    monkeypatch.setitem(MODELS, "other", other)
    server.content = CONTENT[::-1]

    with pytest.raises(WeightsError, match="the published file of other"):
        bring(make_spec(server.url))


def test_page_of_a_captive_portal_is_named(server):
    server.content = b"<!DOCTYPE html><html>please log in</html>"

    with pytest.raises(WeightsError, match=r"an HTML page of 41 bytes, expected [\d,]+ bytes"):
        bring(make_spec(server.url))

    assert len(server.requests) == 1


def test_server_that_sends_more_than_the_file_is_stopped(server, folder):
    server.declares_length = False
    server.content = CONTENT * 2

    with pytest.raises(WeightsError, match="sent more than"):
        bring(make_spec(server.url))

    assert (folder / "tiny.pth.part").stat().st_size == 0


def test_answer_without_a_length_that_ends_early_is_continued(server):
    server.declares_length = False
    server.cuts = [HALF]

    assert bring(make_spec(server.url)).read_bytes() == CONTENT


def test_overloaded_server_is_asked_again(server):
    server.statuses = [503, 429, 500]

    assert bring(make_spec(server.url)).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_is_final(server, status):
    server.statuses = [status]

    with pytest.raises(WeightsError, match=f"HTTP {status}"):
        bring(make_spec(server.url))

    assert len(server.requests) == 1


def test_range_that_the_server_cannot_serve_starts_the_download_over(server, folder):
    folder.mkdir()
    (folder / "tiny.pth.part").write_bytes(CONTENT[:HALF])
    server.statuses = [416]

    assert bring(make_spec(server.url)).read_bytes() == CONTENT


def test_answer_with_another_range_than_asked_starts_the_download_over(server, folder):
    folder.mkdir()
    (folder / "tiny.pth.part").write_bytes(CONTENT[:HALF])
    server.range_error = 1

    assert bring(make_spec(server.url)).read_bytes() == CONTENT
    assert ["Range" in request for request in server.requests] == [True, False]


def test_nobody_listening_is_said_after_the_last_attempt(server):
    with FileServer() as gone:
        url = gone.url

    with pytest.raises(WeightsError, match=rf"refused.*{ATTEMPTS} attempts failed.*copy the file to"):
        bring(make_spec(url))


def test_plain_http_is_refused(server):
    with pytest.raises(WeightsError, match="https only"):
        pull(make_spec(server.url), Bringing(manner=Manner(backoff_seconds=0)))

    assert server.requests == []


def test_redirect_to_plain_http_elsewhere_is_refused(server):
    server.redirect_to = "http://weights.example.invalid/file"

    with pytest.raises(WeightsError, match=r"refusing http://weights\.example\.invalid/file"):
        bring(make_spec(server.url))


def test_redirects_without_end_are_an_error(server):
    server.redirect_to = server.url

    with pytest.raises(WeightsError, match=r"[Rr]edirects"):
        bring(make_spec(server.url))


def test_disk_without_room_is_said_before_anything_is_asked(server, folder):
    huge = 1000 * shutil.disk_usage(folder.parent).total

    with pytest.raises(WeightsError, match=r"GB must be free in .*weights.*MASKFLEET_WEIGHTS_DIR"):
        bring(make_spec(server.url, size_bytes=huge))

    assert server.requests == []


def test_file_in_the_folders_place_is_an_error_with_its_path(server, folder):
    folder.write_bytes(b"not a folder")

    with pytest.raises(WeightsError, match=r"tiny: cannot read .*/weights/tiny\.pth"):
        bring(make_spec(server.url))


def test_part_that_cannot_be_written_is_an_error_with_its_path(server, folder):
    (folder / "tiny.pth.part").mkdir(parents=True)

    with pytest.raises(WeightsError, match=r"tiny: cannot write .*/weights/tiny\.pth: .*Is a directory"):
        bring(make_spec(server.url))


def test_pulls_at_the_same_time_share_one_download(server, folder):
    spec = make_spec(server.url)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: bring(spec), range(8)))

    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(server.requests) == 1
    assert names_in(folder) == ["tiny.pth"]


def test_weights_of_the_package_are_not_pulled():
    spec = make_spec(url=None, weights_file="no_such_file.safetensors")

    with pytest.raises(WeightsError, match=r"no_such_file.safetensors: no file; .*reinstall maskfleet"):
        pull(spec)


def test_verify_names_the_right_file():
    spec = make_spec()
    put(spec, CONTENT)

    verified = verify(spec)

    assert verified.ok
    assert (verified.state, verified.size_bytes) == (WeightsState.OK, len(CONTENT))
    assert verified.path == weights_path(spec)


def test_verify_of_nothing_is_absent():
    assert verify(make_spec()).state is WeightsState.ABSENT
    assert verify(make_spec()).size_bytes is None


def archive():
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as file:
        file.writestr("weights/data.pkl", b"short")
    return memory.getvalue()


@pytest.mark.parametrize(
    ("content", "state", "found"),
    [
        (CONTENT[:HALF], WeightsState.TRUNCATED, f"truncated: {HALF:,} of {len(CONTENT):,} bytes"),
        (b"", WeightsState.TRUNCATED, "truncated: 0 of"),
        (CONTENT + b"x", WeightsState.WRONG, f"another file: {len(CONTENT) + 1:,} bytes"),
        (CONTENT[:-1] + b"x", WeightsState.WRONG, "another or damaged file, with sha256"),
        (archive(), WeightsState.WRONG, "another file"),
        (b"  <!doctype HTML><p>", WeightsState.WRONG, "an HTML page"),
        (b"<?xml version='1.0'?><Error>", WeightsState.WRONG, "an XML document"),
        (b"version https://git-lfs.github.com/spec/v1\n", WeightsState.WRONG, "a Git LFS pointer"),
        (b"\x80\x04\x95\x0e\x00", WeightsState.WRONG, "a bare pickle"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", WeightsState.WRONG, "a safetensors file"),
        (b"nonsense", WeightsState.WRONG, "unknown format"),
    ],
)
def test_verify_says_what_a_wrong_file_is(content, state, found):
    spec = make_spec()
    put(spec, content)

    verified = verify(spec)

    assert (verified.state, verified.size_bytes) == (state, len(content))
    assert found in verified.found


def test_verify_names_another_models_file(monkeypatch):
    other = make_spec(content=CONTENT[:HALF], name="other")
    monkeypatch.setitem(MODELS, "other", other)
    put(make_spec(), CONTENT[:HALF])

    verified = verify(make_spec())

    assert (verified.state, verified.found) == (WeightsState.OTHER_MODEL, "the published file of other")


def test_verify_of_a_folder_in_the_files_place_is_an_error_with_its_path():
    weights_path(make_spec()).mkdir(parents=True)

    with pytest.raises(WeightsError, match=r"tiny\.pth"):
        verify(make_spec())


def test_official_addresses_are_the_authors_own_over_https_and_end_in_the_file_name():
    authors = {
        "segment-anything": "https://dl.fbaipublicfiles.com/segment_anything/",
        "sam-hq": "https://huggingface.co/lkeab/hq-sam/resolve/main/",
        "sam2.1": "https://dl.fbaipublicfiles.com/segment_anything_2/092824/",
        "mobile-sam": "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/c12dd83cbe26dffdcc6a0f9e7be2f6fb024df0ed/weights/",
    }
    for spec in MODELS.values():
        if spec.family in authors:
            assert spec.url in (None, authors[spec.family] + spec.weights_file)
