"""The board in a real browser, beside a run that goes on; and what it tells nobody without the password."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, text

from db import jobs
from db.publishing import LsProject
from db.session import DBAPIError, open_engine
from orchestrator.board.board import Board
from orchestrator.board.password import BoardError, Password
from orchestrator.board.photos import Photos
from orchestrator.board.readings import Readings
from orchestrator.board.service import serve
from orchestrator.label_studio.review_numbers import read_review
from orchestrator.pages.review import write_review
from tests.deployment import draw_pictures, terminate
from tests.e2e.test_run import MASKFLEET, environment, run
from tests.label_studio.browser import Browser, NoBrowser, open_browser
from tests.needs import miss
from tests.reviewed_job import draw_scenes, plant_review
from tests.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NAME = "<img src=x onerror=alert(1)> street"
PICTURES = 70
AWAY = open_engine("postgresql://nobody@127.0.0.1:1/none")  # connects to nothing


@dataclass(frozen=True, slots=True)
class Running:
    """A board beside a run. url: its first page. run: the run's process, which labels nothing while `hold` is there."""

    url: str
    password: str
    run: subprocess.Popen[bytes]
    log: Path
    hold: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("board")
    source = draw_pictures(folder / "pictures", PICTURES, special={"zz broken.png": (253, 251, 7)})
    (source / "half & <b>.jpg").write_bytes(b"a text")
    words = ["run", "--devices", "cpu", str(source), "--out", str(folder / "out"), "--model", "stub", "--name", NAME]
    slow = environment(MASKFLEET_STUB_SECONDS="0.5", MASKFLEET_CHUNK_SIZE="8", MASKFLEET_BATCH_SIZE="2")
    hold = folder / "hold"
    slow["MASKFLEET_STUB_HOLD"] = str(hold)
    with (folder / "run.log").open("wb") as log:
        job = subprocess.Popen([*MASKFLEET, *words], env=slow, stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: "succeeded in" in worker_log(folder / "out"), "the first chunk")
    hold.touch()
    with board_of(folder / "out") as (url, password):
        yield Running(url, password, job, folder / "board.log", hold)
    hold.unlink(missing_ok=True)
    terminate(job, 120)


def worker_log(out: Path) -> str:
    log = out / ".maskfleet" / "worker.log"
    return log.read_text() if log.exists() else ""


@contextmanager
def board_of(out: Path) -> Iterator[tuple[str, str]]:
    """`maskfleet board OUT`: its first page, and the password that it made."""
    log = out.parent / "board.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*MASKFLEET, "board", str(out), "--port", "0"], env=environment(), stdout=file, stderr=file
        )
    try:
        wait_for(lambda: "its password is" in log.read_text(), "the board", logs=log.read_text)
        said = log.read_text()
        [url] = re.findall(r"the board is at (http://127\.0\.0\.1:\d+)/jobs/1", said)
        [password] = re.findall(r"its password is (\S+)", said)
        yield url, password
    finally:
        assert terminate(process) == 0
        assert "ERROR" not in log.read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with open_browser(tmp_path_factory.mktemp("browser")) as opened:
            yield opened
    except NoBrowser as error:
        miss(str(error))


def text_of(browser: Browser, selector: str = "body") -> str:
    return str(browser.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))


LABELED = """return Number([...document.querySelectorAll('#standing .tiles div')]
    .find(tile => tile.querySelector('dt').innerText == 'labeled').querySelector('dd').innerText)"""


def test_a_person_logs_in_and_sees_a_job_go_on_until_it_is_done(browser: Browser, running: Running) -> None:
    browser.emulate(1280, 900)
    browser.open(f"{running.url}/jobs/1")
    browser.wait("return document.activeElement.id == 'password'", what="the login")
    browser.type(running.password + "\ue007")  # Enter

    browser.wait("return document.querySelector('#live')?.innerText == 'live'", what="the live page")
    before = browser.run(LABELED)
    assert browser.run("return document.querySelector('#standing .chip').innerText") == "running"
    running.hold.unlink()  # only now: on a busy machine the job could be over before the page is there
    browser.wait("return document.querySelector('.standing').innerText.includes('left')", what="the time left")
    browser.wait("return document.querySelector('#workers').innerText.includes('in hand')", what="a worker")
    browser.wait(f"{LABELED} > arguments[0]", before, what="more labeled images without a reload")
    browser.wait(
        "return document.querySelector('#standing .chip').innerText == 'done'", what="the end of the job", seconds=600
    )
    assert browser.run(LABELED) == PICTURES
    browser.wait("return document.querySelector('#pictures img')?.naturalWidth > 0", what="a photo")
    browser.run("document.querySelector('#failures').scrollIntoView()")
    browser.wait("return document.querySelector('#failures img')?.naturalWidth > 0", what="a failed photo")

    failures = text_of(browser, "#failures")
    assert "not_image · 1" in failures
    assert "half & <b>.jpg" in failures
    assert "internal · 1" in failures
    assert browser.run("return document.querySelectorAll('#pictures .masks path').length") > 10
    browser.wait("return document.querySelectorAll('#time path').length == 2", what="both outcomes over time")
    assert "Not published" in text_of(browser, "#people")


def test_the_first_page_has_all_jobs_and_a_name_is_no_markup(running: Running, browser: Browser) -> None:
    browser.emulate(1280, 900)
    browser.open(running.url)
    browser.wait("return document.querySelectorAll('.job').length == 1", what="the list of jobs")

    assert NAME in text_of(browser, "#jobs")
    assert browser.run("return document.querySelectorAll('.job img').length") == 0
    browser.run("document.querySelector('.job a').focus()")
    browser.type("\ue007")
    browser.wait("return location.pathname == '/jobs/1'", what="the job's page by keyboard")
    assert browser.run("return document.querySelector('h1').innerText") == NAME


@pytest.mark.parametrize("path", ["/", "/jobs/1", "/login", "/nothing"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_a_phone_and_asks_no_other_host(running: Running, browser: Browser, path: str, dark: bool) -> None:
    browser.emulate(390, 844, dark=dark)
    browser.open(f"{running.url}{path}")

    assert browser.run("return document.documentElement.scrollWidth") <= 390
    asked = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(address.startswith((running.url, "data:")) for address in asked)
    background = browser.run("return getComputedStyle(document.documentElement).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background)[:3])) < 60) is dark


def test_a_sample_is_enlarged_and_closed_by_keyboard(running: Running, browser: Browser) -> None:
    browser.emulate(1280, 900)
    browser.open(f"{running.url}/jobs/1")
    browser.wait("return document.querySelector('#pictures .shot')", what="samples")

    browser.run("document.querySelector('#pictures .shot').focus()")
    browser.type("\ue007")
    assert browser.wait("return document.querySelector('dialog[open] .large svg path')", what="the large picture")
    browser.type("\ue00c")  # Escape
    browser.wait("return !document.querySelector('dialog[open]')", what="the end of the large picture")


def test_without_the_password_nothing_is_told(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as stranger:
        pages = {path: stranger.get(path) for path in ("/", "/jobs/1", "/nothing")}
        wrong = stranger.post("/login", data={"password": "not this one", "next": "/"})
        forged = httpx.get(
            f"{running.url}/jobs/1",
            cookies={"maskfleet_board": "2|1:0|10:1|15:maskfleet_board|4:MQ==|0"},
            timeout=60,
        )
        health = stranger.get("/health")

        assert {path: page.status_code for path, page in pages.items()} == dict.fromkeys(pages, 302)
        assert all(page.headers["location"].startswith("/login?next=") for page in (*pages.values(), forged))
        for path in ("/events", "/jobs/1/events", "/jobs/1/photos/1"):
            assert stranger.get(path).status_code == 401
        assert wrong.status_code == 403
        assert "set-cookie" not in wrong.headers
        assert health.json() == {"status": "UP"}
        assert all("street" not in answer.text for answer in (*pages.values(), wrong, forged, health))


def test_who_is_logged_in_gets_pages_under_a_strict_policy_and_is_sent_nowhere_else(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as person:
        sent = person.post("/login", data={"password": running.password, "next": "//elsewhere.example/"})
        page = person.get("/jobs/1")
        photo = person.get(re.findall(r'src="(/jobs/1/photos/\d+)"', page.text)[0])
        missing = [person.get(path).status_code for path in ("/jobs/99", "/jobs/99/events", "/jobs/1/photos/999999")]
        changed = [person.request(method, "/jobs/1").status_code for method in ("POST", "DELETE")]

    assert (sent.status_code, sent.headers["location"]) == (303, "/")
    cookie = sent.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|\son\w+=", re.sub(r"onerror=alert\(1\)", "", page.text))
    assert photo.headers["content-type"] == "image/jpeg"
    assert missing == [404, 404, 404]
    assert changed == [405, 405]
    assert "Server" not in page.headers


def test_its_connections_refuse_to_write(database_url: str) -> None:
    engine = open_engine(database_url, read_only=True)
    with pytest.raises(DBAPIError, match="read-only"), engine.begin() as db:
        jobs.insert_job(db, name="", source="/x", model="m", model_version="v", asked={}, fresh=False)
    engine.dispose()


def test_what_people_did_is_shown(engine: Engine, tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 3)
    project = LsProject("http://label-studio:8080", 7)
    job = plant_review(engine, tmp_path / "scenes", scenes, model="stub", model_version="stub@1+2", ls_project=project)

    shown = Board(engine).job(job)["people"]

    tiles = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)<", shown))
    assert (tiles["published"], tiles["reviewed"], tiles["corrected"], tiles["waiting"]) == ("3", "3", "3", "0")
    assert (tiles["edited"], tiles["deleted"]) == ("3", "3")
    assert "Label Studio project 7" in shown


def test_a_board_without_postgres_says_so_and_keeps_answering(engine: Engine) -> None:
    with engine.begin() as db:
        db.execute(text("ALTER TABLE job RENAME TO away"))

    regions = Board(engine).home()

    assert "Postgres did not answer" in regions["jobs"]
    with engine.begin() as db:
        db.execute(text("ALTER TABLE away RENAME TO job"))


@contextmanager
def served(engine: Engine, password: str) -> Iterator[httpx.Client]:
    """A board in this process."""
    stop, ports = threading.Event(), list[int]()
    started = threading.Event()

    def heard(port: int) -> None:
        ports.append(port)
        started.set()

    serving = threading.Thread(
        target=serve,
        args=(Board(engine), Photos(engine), Password(password), stop),
        kwargs={"host": "127.0.0.1", "port": 0, "started": heard},
    )
    serving.start()
    try:
        assert started.wait(60)
        with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", trust_env=False, timeout=60) as person:
            yield person
    finally:
        stop.set()
        serving.join()


def test_a_password_with_spaces_at_its_ends_is_taken_as_it_is() -> None:
    with served(AWAY, " twelve and more ") as person:
        assert person.post("/login", data={"password": "twelve and more"}).status_code == 403
        assert person.post("/login", data={"password": " twelve and more "}).status_code == 303


def test_a_photo_without_postgres_is_asked_for_again_and_no_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    with served(AWAY, "twelve and more") as person:
        person.post("/login", data={"password": "twelve and more"})
        answers = {path: person.get(path).status_code for path in ("/jobs/1", "/jobs/1/photos/1", "/jobs/1/events")}

    assert answers == dict.fromkeys(answers, 503)
    assert not [record for record in caplog.records if record.exc_info]


def test_ten_viewers_read_once() -> None:
    readings, read, gate = Readings(10), [], threading.Barrier(10)

    def look() -> None:
        gate.wait()
        readings.get("jobs", 60, lambda: read.append(1))

    viewers = [threading.Thread(target=look) for _ in range(10)]
    for viewer in viewers:
        viewer.start()
    for viewer in viewers:
        viewer.join()

    assert len(read) == 1


def test_a_short_password_is_refused_and_a_made_one_is_long() -> None:
    with pytest.raises(BoardError, match="at least 12"):
        Password("short")
    made = Password(None)
    assert len(made.text) >= 16
    assert made.fits(made.text)
    assert not made.fits(made.text + " ")


def test_a_taken_port_is_said(tmp_path: Path, running: Running) -> None:
    port = running.url.rpartition(":")[2]
    run(draw_pictures(tmp_path / "pictures", 1), "--out", tmp_path / "out", "--model", "stub")

    done = subprocess.run(
        [*MASKFLEET, "board", str(tmp_path / "out"), "--port", port],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 2
    assert "choose another --port" in done.stderr


def test_the_page_of_a_review_of_a_job_without_a_name_has_its_number(engine: Engine, tmp_path: Path) -> None:
    scenes = draw_scenes(tmp_path / "scenes", 1)
    project = LsProject("http://label-studio:8080", 8)
    job = plant_review(engine, tmp_path / "scenes", scenes, model="stub", model_version="stub@1+3", ls_project=project)

    write_review(engine, read_review(engine, replace(job, name=""), project), tmp_path / "review.html")

    assert f"<h1>job {job.id}</h1>" in (tmp_path / "review.html").read_text()
