"""Weights travel through a mirror: a folder, or a web server that may be hostile. Buckets: tests/integration."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from db.settings import settings
from workers.models.download import Manner
from workers.models.mirror import open_mirror
from workers.models.own import OwnModel, toml_of, write_own
from workers.models.part_file import exclusive_part
from workers.models.pulling import Bringing, bring_for_job, fetched, pull, pull_named, push
from workers.models.registry import MODELS, find_model
from workers.models.spec import ModelSpec, UnknownModelError, WeightsError
from workers.models.weights import verify

WEIGHTS = bytes(range(256)) * 4000
MINE = OwnModel(
    name="mine",
    architecture="sam_vit_b",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    size_bytes=len(WEIGHTS),
    parameter_count=93_735_472,
    origin="a test",
    licence="MIT",
    added=date(2026, 11, 26),
)
LOOPBACK = Manner(backoff_seconds=0, plain_http_on_loopback=True)
WORKER = Bringing(manner=LOOPBACK, is_public=False)

Answer = Callable[[BaseHTTPRequestHandler], None]


class Site(ThreadingHTTPServer):
    """Answers each path by its entry of `answers`: bytes, or a function that writes what it likes. Else 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/models"
        self.answers: dict[str, bytes | Answer] = {}
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path.removeprefix("/models/"))
        if answer is None:
            self.send_error(404)
        elif isinstance(answer, bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        else:
            answer(self)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        site.shutdown()
        thread.join()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes this process a machine with its own weights folder and this mirror."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def make(name: str, mirror: Path | str | None = None) -> Path:
        monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / name))
        monkeypatch.setenv("MASKFLEET_WEIGHTS_MIRROR", "" if mirror is None else str(mirror))
        settings.cache_clear()
        return tmp_path / name

    yield make
    settings.cache_clear()


def keep(folder: Path, model: OwnModel = MINE, weights: bytes = WEIGHTS) -> ModelSpec:
    folder.mkdir(exist_ok=True)
    (folder / f"{model.name}.safetensors").write_bytes(weights)
    write_own(model)
    return find_model(model.name)


def anything(spec: ModelSpec) -> None:
    """A job that takes whatever the mirror has."""


def test_a_model_travels_through_a_folder_with_what_is_known_about_it(
    node: Callable[..., Path], tmp_path: Path
) -> None:
    sent = push(keep(node("first")), str(tmp_path / "mirror"))
    second = node("second", tmp_path / "mirror")

    paths = pull_named("mine", Bringing())

    assert sent == [f"{tmp_path}/mirror/mine.safetensors", f"{tmp_path}/mirror/mine.toml"]
    assert paths == [second / "mine.safetensors"]
    assert verify(find_model("mine")).ok
    assert (second / "mine.toml").read_bytes() == toml_of(MINE)
    assert sorted(path.name for path in second.iterdir()) == ["mine.safetensors", "mine.toml"]


def test_a_decoder_brings_its_base(node: Callable[..., Path], tmp_path: Path) -> None:
    first = node("first")
    keep(first)
    its = {"name": "head", "base": "mine", "base_sha256": MINE.sha256, "defaults": {"pred_iou_thresh": 0.4}}
    head = MINE.model_copy(update=its)
    push(keep(first, head), str(tmp_path / "mirror"))
    node("second", tmp_path / "mirror")

    assert [path.stem for path in pull_named("head", Bringing())] == ["mine", "head"]
    assert find_model("head").defaults == {"pred_iou_thresh": 0.4}

    node("third", tmp_path / "mirror")
    other = MINE.model_copy(update={"sha256": hashlib.sha256(b"other").hexdigest(), "size_bytes": 5})
    keep(tmp_path / "third", other, b"other")
    with pytest.raises(WeightsError, match=r"head: its base mine is sam_vit_b with sha256 \w+, expected a whole sam"):
        pull_named("head", Bringing())


def test_a_mirror_whose_bases_stand_on_each_other_is_refused(node: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    for name, base in (("head", "neck"), ("neck", "head")):
        own = MINE.model_copy(update={"name": name, "base": base, "base_sha256": MINE.sha256})
        (tmp_path / "mirror" / f"{name}.toml").write_bytes(toml_of(own))
    node("second", tmp_path / "mirror")

    with pytest.raises(WeightsError, match="head: its base neck is built on head, expected a whole sam_vit_b"):
        bring_for_job("head", anything, WORKER)


def test_a_public_model_is_taken_from_the_mirror_first_and_by_a_worker_only_from_there(
    node: Callable[..., Path], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = ModelSpec(
        name="tiny",
        family="test",
        loader="nowhere:load",
        weights_file="tiny.pth",
        url=f"{site.url}/authors/tiny.pth",
        sha256=MINE.sha256,
        size_bytes=len(WEIGHTS),
        parameter_count=1,
        prompts=(),
        licence="MIT",
    )
    monkeypatch.setitem(MODELS, "tiny", public)
    site.answers = {"authors/tiny.pth": WEIGHTS}
    node("first", f"{site.url}/copies/")

    with pytest.raises(WeightsError, match=r"tiny: http://.*/copies/tiny.pth: HTTP 404"):
        bring_for_job("tiny", anything, WORKER)
    assert pull(public, Bringing(manner=LOOPBACK)).read_bytes() == WEIGHTS
    assert site.asked == ["/models/copies/tiny.pth"] * 2 + ["/models/authors/tiny.pth"]

    node("second", f"{site.url}/copies/")
    site.answers = {"copies/tiny.pth": WEIGHTS}
    site.asked.clear()
    bring_for_job("tiny", anything, WORKER)
    assert verify(public).ok
    assert site.asked == ["/models/copies/tiny.pth"]


def test_workers_of_one_machine_share_one_download(node: Callable[..., Path], site: Site) -> None:
    began, go = threading.Event(), threading.Event()

    def slowly(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(WEIGHTS)))
        request.end_headers()
        request.wfile.write(WEIGHTS[:1000])
        began.set()
        go.wait()
        request.wfile.write(WEIGHTS[1000:])

    site.answers = {"mine.toml": toml_of(MINE), "mine.safetensors": slowly}
    node("first", site.url)
    waits = threading.Semaphore(0)
    waiting = Bringing(manner=LOOPBACK, is_public=False, while_waiting=waits.release)

    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(bring_for_job, "mine", anything, waiting) for _ in range(6)]
        began.wait()
        for _ in range(5):
            waits.acquire()
        go.set()
        for each in done:
            each.result()

    assert site.asked.count("/models/mine.safetensors") == 1
    assert verify(find_model("mine")).ok


def test_what_is_raised_while_waiting_ends_the_wait(node: Callable[..., Path], tmp_path: Path) -> None:
    class LeaseGone(Exception):
        pass

    def gone() -> None:
        raise LeaseGone

    mirror = tmp_path / "mirror"
    push(keep(node("first")), str(mirror))
    second = node("second", mirror)
    second.mkdir()
    with exclusive_part(second / "mine.safetensors"), pytest.raises(LeaseGone):
        bring_for_job("mine", anything, Bringing(is_public=False, while_waiting=gone))


def test_a_download_that_was_killed_is_in_nobodys_way(node: Callable[..., Path], site: Site) -> None:
    site.answers = {"mine.toml": toml_of(MINE), "mine.safetensors": WEIGHTS}
    folder = node("first", site.url)
    folder.mkdir()
    (folder / "mine.safetensors.part").write_bytes(b"of another file")

    bring_for_job("mine", anything, WORKER)

    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "mine.toml"]


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(b"# more\n" * 10_000)
    except OSError:
        pass


def elsewhere(request: BaseHTTPRequestHandler) -> None:
    request.send_response(302)
    request.send_header("Location", "http://weights.example.invalid/mine")
    request.end_headers()


def in_circles(request: BaseHTTPRequestHandler) -> None:
    request.send_response(302)
    request.send_header("Location", request.path)
    request.end_headers()


HOSTILE: dict[str, tuple[bytes | Answer | None, bytes | Answer | None, str]] = {
    "wrong bytes": (None, WEIGHTS[::-1], r"mine: http://.* sent another file, with sha256 \w+; expected sha256"),
    "a shorter file": (None, WEIGHTS[:-1], r"has a file of unknown format .* of 1,023,999 bytes, expected 1,024,000"),
    "an endless body": (None, endless, "sent more than the 1,024,000 bytes expected"),
    "a redirect to plain http": (None, elsewhere, r"refusing http://weights\.example\.invalid/mine: .* https only"),
    "redirects without end": (None, in_circles, r"mine: http://.*[Rr]edirects"),
    "a huge TOML": (b"#" * 10_000_000, WEIGHTS, "mine.toml sent more than 16,384 bytes"),
    "an endless TOML": (endless, WEIGHTS, "mine.toml sent more than 16,384 bytes"),
    "a TOML elsewhere": (elsewhere, WEIGHTS, "https only"),
    "no TOML at all": (b"<html>", WEIGHTS, r"mine.toml: cannot be read as TOML"),
    "a TOML with a way out": (
        toml_of(MINE) + b"name = '../../escape'\nweights_file = '/etc/passwd'",
        b"",
        "has a file of unknown format .* of 0 bytes",
    ),
    "a TOML of everything": (
        toml_of(MINE).replace(b"1024000", b"9999999999999999"),
        WEIGHTS,
        "size_bytes: Input should be less than or equal to",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_mirror_gives_a_named_error_and_no_model(what: str, node: Callable[..., Path], site: Site) -> None:
    toml, weights, said = HOSTILE[what]
    site.answers = {"mine.toml": toml or toml_of(MINE), "mine.safetensors": weights or b""}
    folder = node("first", site.url)

    with pytest.raises(WeightsError, match=said):
        bring_for_job("mine", anything, WORKER)

    assert not (folder / "mine.toml").exists()
    assert not (folder / "mine.safetensors").exists()
    assert sum(path.stat().st_size for path in folder.glob("*")) < 10
    assert not (folder.parent / "escape").exists()


def test_a_model_that_the_job_does_not_mean_is_not_taken(node: Callable[..., Path], tmp_path: Path) -> None:
    push(keep(node("first")), str(tmp_path / "mirror"))
    second = node("second", tmp_path / "mirror")

    def refuse(spec: ModelSpec) -> None:
        raise WeightsError(f"{spec.name} is another one")

    with pytest.raises(WeightsError, match="mine is another one"):
        bring_for_job("mine", refuse, Bringing(is_public=False))

    assert not second.exists()


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(node: Callable[..., Path], tmp_path: Path) -> None:
    push(keep(node("first")), str(tmp_path / "mirror"))
    second = node("second", tmp_path / "mirror")
    second.write_bytes(b"a file where the folder should be")  # like a read-only folder, for root too

    with pytest.raises(WeightsError, match=r"mine: cannot (write|read) .*second/mine.safetensors"):
        bring_for_job("mine", anything, Bringing(is_public=False))


def test_without_a_mirror_a_worker_asks_nobody(node: Callable[..., Path]) -> None:
    node("first")
    bring_for_job("mine", anything, WORKER)
    with pytest.raises(UnknownModelError, match="unknown model 'mine'; known: "):
        pull_named("mine", Bringing())
    with pytest.raises(WeightsError, match="no mirror: set MASKFLEET_WEIGHTS_MIRROR, or give --to"):
        push(find_model("sam_nano"), None)


def test_nothing_is_pushed_that_is_not_right_here(node: Callable[..., Path], tmp_path: Path, site: Site) -> None:
    mine = keep(node("first"), weights=b"damaged")
    with pytest.raises(WeightsError, match=r"mine: .*first/mine.safetensors is a file of unknown format"):
        push(mine, str(tmp_path / "mirror"))
    with pytest.raises(WeightsError, match="nothing is written to an https mirror"):
        push(keep(tmp_path / "first"), site.url)

    assert not (tmp_path / "mirror").exists()


def test_a_checkpoint_comes_from_an_address_with_its_sha256(node: Callable[..., Path], site: Site) -> None:
    site.answers = {"a.pth": WEIGHTS, "endless.pth": endless}
    folder = node("first")
    address = site.url.replace("http://", "https://")

    def bring(url: str, sha256: str = MINE.sha256, max_bytes: int = 2_000_000) -> bytes:
        with fetched(
            url, name="mine", sha256=sha256, max_bytes=max_bytes, show=lambda *_: None, manner=LOOPBACK
        ) as path:
            return path.read_bytes()

    assert bring(f"{site.url}/a.pth") == WEIGHTS
    assert list(folder.iterdir()) == []
    for url, changes, said in (
        ("a.pth", {"sha256": "ab" * 32}, "expected sha256 abab"),
        ("a.pth", {"max_bytes": 1000}, "of 1,024,000 bytes, expected at most 1,000 bytes"),
        ("endless.pth", {}, "sent more than the at most 2,000,000 bytes"),
        ("none.pth", {}, "HTTP 404"),
    ):
        with pytest.raises(WeightsError, match=said):
            bring(f"{site.url}/{url}", **changes)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="attempts failed"):
        bring(f"{address}/a.pth")
    for url in ("s3://", "s3://bucket", "s3://bucket/", "https://host/models/"):
        with pytest.raises(WeightsError, match=f"^{url}: names no file, expected s3://bucket/key or https://host/path"):
            bring(url)


def test_an_address_of_another_kind_is_refused() -> None:
    from workers.errors import SourceError

    for address in ("ftp://host/models", "file:///models", "s3://"):
        with pytest.raises(SourceError):
            open_mirror(address, Manner())
