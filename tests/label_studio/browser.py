"""A headless Chromium, driven through chromedriver's own protocol: W3C WebDriver, JSON over HTTP."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from numpy.typing import NDArray

from tests.redis_server import free_port
from tests.waiting import wait_for

WINDOW_WH = (1600, 1000)


class NoBrowser(RuntimeError):
    """A program is missing; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Browser:
    """One window, WINDOW_WH CSS pixels of one device pixel each, about."""

    http: httpx.Client

    def open(self, url: str) -> None:
        self._send("url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; `return` gives the answer, arguments come as `arguments`."""
        return self._send("execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, what: str, seconds: float = 300) -> Any:
        """Wait until the script returns something that is true, and return it."""
        found: list[Any] = []

        def look() -> bool:
            found.append(self.run(script, *arguments))
            return bool(found[-1])

        wait_for(look, what, seconds=seconds)
        return found[-1]

    def drag(self, *way: Sequence[float]) -> None:
        """Press the mouse at the first x, y of the window, go along the others, and let go; one place is a click."""
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y), "duration": 100} for x, y in way]
        pressed = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": pressed}
        self.act(mouse)

    def act(self, *devices: dict[str, Any]) -> None:
        """Perform the actions of input devices, tick by tick, as WebDriver describes them."""
        self._send("actions", {"actions": list(devices)})

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        answer = self.http.get("screenshot")
        answer.raise_for_status()
        return base64.b64decode(answer.json()["value"])

    def pixels(self) -> NDArray[np.uint8]:
        """What the window shows, (H, W, 3) RGB."""
        bgr = cv2.imdecode(np.frombuffer(self.screenshot(), np.uint8), cv2.IMREAD_COLOR)
        assert bgr is not None
        return np.ascontiguousarray(bgr[:, :, ::-1]).astype(np.uint8)

    def emulate(self, width: int, height: int, *, dark: bool = False) -> None:
        """Show pages as a screen of this size in CSS pixels does, in its light or dark colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        colours = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": colours}})

    def type(self, text: str) -> None:
        """Press and release the keys of the text, in what has the focus."""
        keys = [{"type": kind, "value": letter} for letter in text for kind in ("keyDown", "keyUp")]
        self.act({"type": "key", "id": "keyboard", "actions": keys})

    def _send(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.is_success, answer.text[:2000]
        return answer.json()["value"]


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in `folder`. Raises NoBrowser where it or chromedriver is not installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = " and ".join(n for n, p in (("chromium", chromium), ("chromedriver", driver)) if p is None)
        raise NoBrowser(f"no {missing} on PATH: on Debian, apt-get install chromium chromium-driver")
    port = free_port()
    with (
        (folder / "chromedriver.log").open("wb") as log,
        subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log) as process,
    ):
        try:
            base = f"http://127.0.0.1:{port}"
            wait_for(lambda: _answers(base), f"chromedriver, see {log.name}")
            options = {"binary": chromium, "args": _arguments(folder)}
            wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
            made = httpx.post(f"{base}/session", json={"capabilities": wanted}, timeout=300)
            assert made.is_success, made.text[:2000]
            session = f"{base}/session/{made.json()['value']['sessionId']}/"
            with httpx.Client(base_url=session, timeout=300) as http:
                yield Browser(http=http)
                http.delete("")
        finally:
            process.terminate()


def _arguments(folder: Path) -> list[str]:
    size = ",".join(map(str, WINDOW_WH))
    # Containers give /dev/shm 64 MB and run as root, where Chromium's own sandbox does not start.
    return [
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--disable-component-update",
        "--disable-background-networking",
        "--force-device-scale-factor=1",
        f"--window-size={size}",
        f"--user-data-dir={folder / 'profile'}",
    ]


def _answers(base: str) -> bool:
    try:
        return bool(httpx.get(f"{base}/status", timeout=30).json()["value"]["ready"])
    except httpx.TransportError:
        return False
