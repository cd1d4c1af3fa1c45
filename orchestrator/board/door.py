"""What every answer of the board has in common: the login, the headers, the frame of a page."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from tornado.escape import url_escape
from tornado.web import RequestHandler

from orchestrator.board.board import Board
from orchestrator.board.password import Password
from orchestrator.board.photos import Photos
from orchestrator.pages.page import HERE as PAGES
from orchestrator.pages.page import filled, safe_text

_HERE = Path(__file__).parent
_COOKIE = "maskfleet_board"
_LOGIN_DAYS = 7
_WRONG_PASSWORD_SECONDS = 0.5
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

_SAID = {
    401: "Log in first.",
    404: "There is no such page, or the job was deleted.",
    503: "Postgres does not answer. Try again in a moment.",
}


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Served:
    """What the handlers share. guessing: one try of the password at a time, so that guessing is slow. ending: set when
    the board ends, so that events end too."""

    board: Board
    photos: Photos
    password: Password
    stop: threading.Event
    reading: ThreadPoolExecutor
    decoding: ThreadPoolExecutor
    guessing: asyncio.Lock = field(default_factory=asyncio.Lock)
    ending: asyncio.Event = field(default_factory=asyncio.Event)


class Handler(RequestHandler):
    """Refuses whoever is not logged in."""

    is_open = False

    def initialize(self, served: Served) -> None:
        self.served = served

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        if not self.is_open and self.get_signed_cookie(_COOKIE, max_age_days=_LOGIN_DAYS) is None:
            self.refuse()

    def refuse(self) -> None:
        """A page sends to the login; whatever else a page asks for is refused."""
        self.redirect(f"/login?next={url_escape(self.request.path)}")

    async def read(self, read: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.served.reading, partial(read, *arguments))

    def show(self, template: str, title: str, parts: Mapping[str, Iterable[str]], *, events: str = "") -> None:
        """Answer with head.html and one of the templates, filled. events: the address of the page's events."""
        text = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("head.html", template))
        frame: dict[str, Iterable[str]] = {
            "title": [title],
            "logo": [(PAGES / "logo.svg").read_text(encoding="utf-8")],
            "events": [events],
            "version": [version("maskfleet")],
        }
        self.finish("".join(filled(f"{text}</body>\n</html>\n", {**frame, **parts})))

    def write_error(self, status_code: int, **_: Any) -> None:
        self.show("message.html", str(status_code), {"said": [_SAID.get(status_code, "Something went wrong.")]})

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """The address and the body of a request are never logged."""
        if status := getattr(value, "status_code", 0):
            log.info("%s: %d", self.request.path[:40], status)
        else:
            log.error("%s could not be shown", self.request.path[:40], exc_info=(typ, value, tb))


class Login(Handler):
    is_open = True

    def get(self) -> None:
        self._ask("")

    async def post(self) -> None:
        async with self.served.guessing:
            is_right = self.served.password.fits(self.get_body_argument("password", "", strip=False))
            if not is_right:
                await asyncio.sleep(_WRONG_PASSWORD_SECONDS)
        if not is_right:
            self.set_status(403)
            self._ask('<p class="bad" role="alert">This is not the password.</p>')
            return
        is_safe = self.request.protocol == "https"
        self.set_signed_cookie(_COOKIE, "1", expires_days=_LOGIN_DAYS, httponly=True, samesite="Lax", secure=is_safe)
        self.redirect(self._next(), status=303)

    def _ask(self, said: str) -> None:
        self.show("login.html", "Log in", {"said": [said], "next": [safe_text(self._next())]})

    def _next(self) -> str:
        """A path of this server, whatever was sent."""
        given = self.get_argument("next", "/")
        is_path = given.startswith("/") and not given.startswith(("//", "/\\")) and given.isprintable()
        return given if is_path else "/"


class Logout(Handler):
    is_open = True

    def post(self) -> None:
        self.clear_cookie(_COOKIE)
        self.redirect("/login", status=303)


class Health(Handler):
    is_open = True

    def get(self) -> None:
        self.finish({"status": "UP"})


class File(Handler):
    """The style and the script, which hold nothing of a job."""

    is_open = True
    FILES: ClassVar[dict[str, tuple[str, tuple[Path, ...]]]] = {
        "board.css": ("text/css", (PAGES / "style.css", _HERE / "board.css")),
        "board.js": ("text/javascript", (_HERE / "board.js",)),
    }

    def get(self, name: str) -> None:
        content_type, paths = self.FILES[name]
        self.set_header("Content-Type", f"{content_type}; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.finish("".join(path.read_text(encoding="utf-8") for path in paths))


class Unknown(Handler):
    def get(self) -> None:
        self.send_error(404)

    post = put = patch = delete = head = options = get
