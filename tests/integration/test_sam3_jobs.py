"""SAM 3 through the real commands: its weights from a hub on loopback, text and examples over a folder of images."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from pycocotools.coco import COCO

from tests.e2e.test_run import MASKFLEET, environment, run
from tests.integration.test_detected_jobs import draw

pytestmark = pytest.mark.integration
pytest.importorskip("transformers")

COMMIT = "cd" * 20


class Hub(BaseHTTPRequestHandler):
    """Gives its files only to requests with the token `good`, like a gated repository on huggingface.co."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/facebook/sam3/tree/"):
            listed = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in self.files.items()]
            self.answer(json.dumps(listed).encode())
        elif path.startswith("/api/models/facebook/sam3"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "facebook/sam3", "sha": COMMIT, "siblings": siblings}).encode())
        elif self.headers.get("Authorization") != "Bearer good":
            self.answer(b"", status=403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            content = self.files[path.rpartition("/")[2]]
            self.answer(content, **{"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content)}"'})

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a hub with these files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubOfFiles", (Hub,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def maskfleet(*words: str, code: int, **settings: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*MASKFLEET, *words], env=environment(**settings), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


def test_its_weights_come_from_the_hub_to_who_accepted_the_licence(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "sam3.pt": b"\x80pickle"}
    with serve(files) as address:
        reach = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "MASKFLEET_WEIGHTS_DIR": str(tmp_path / "w")}
        refused = maskfleet("models", "pull", "sam3", code=2, **reach)
        pulled = maskfleet("models", "pull", "sam3", code=0, HF_TOKEN="good", **reach)

    assert "accept it at https://huggingface.co/facebook/sam3, set HF_TOKEN" in " ".join(refused.stderr.split())
    assert pulled.stdout.strip() == str(tmp_path / "w" / "sam3")
    brought = {file.name: file.read_bytes() for file in (tmp_path / "w" / "sam3").iterdir() if file.is_file()}
    assert brought == {name: content for name, content in files.items() if name != "sam3.pt"}
    verified = maskfleet("models", "verify", "sam3", code=0, MASKFLEET_WEIGHTS_DIR=str(tmp_path / "w"))
    assert "a checkpoint with sha256" in verified.stdout


def test_text_and_examples_over_a_folder_give_any_number_of_masks_each(tmp_path: Path) -> None:
    from tests.tiny_checkpoints import save_sam3

    source = draw(tmp_path / "images")
    save_sam3(tmp_path / "weights" / "sam3")
    weights = {"MASKFLEET_WEIGHTS_DIR": str(tmp_path / "weights")}
    words = [source, "--model", "sam3", "--devices", "cpu", "--json", "--param", "text_threshold=0"]

    done = run(*words, "--out", tmp_path / "out", "--text", "red bus", "--text", "car:vehicle", **weights)

    summary = json.loads(done.stdout)
    assert summary["assets"] == {"listed": 3, "labeled": 3, "failed": 0}
    assert summary["text"] == [
        {"text": "red bus", "label": "red bus", "masks": 27},
        {"text": "car", "label": "vehicle", "masks": 27},
    ]
    coco = COCO(tmp_path / "out" / "coco.json")
    assert {coco.cats[a["category_id"]]["name"] for a in coco.anns.values()} == {"red bus", "vehicle"}
    assert all(coco.annToMask(annotation).shape == (240, 320) for annotation in coco.anns.values())

    asked = [{"exemplar_box_xyxy": [180, 40, 280, 120], "negative_box_xyxy": [30, 130, 110, 210], "label": "x"}]
    lines = [{"key": "side.jpg", "prompts": asked}, {"key": "dark.png", "prompts": [{"text": "b" * 50}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = run(*words, "--out", tmp_path / "out2", "--prompts", tmp_path / "p.jsonl", code=1, **weights)
    summary = json.loads(shown.stdout)
    assert (summary["masks"], summary["without_prompts"]) == (9, 1)
    [failed] = summary["failed"]
    assert (failed["key"], failed["error_kind"]) == ("dark.png", "bad_prompt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "sam3 makes no masks of everything: tell it what to look for"),
        (["--detector", "d.onnx"], "sam3 takes no boxes of a detector, only text and exemplar"),
        (["--prompts", "p.jsonl"], "a prompt by box, expected text or exemplar"),
        (["--text", "bus"], "no folder with config.json and safetensors; run `maskfleet models pull sam3`"),
    ],
)
def test_what_it_cannot_is_said_before_anything_starts(tmp_path: Path, words: list[str], said: str) -> None:
    from tests.onnx_detectors import write_colour_detector

    write_colour_detector(tmp_path / "d.onnx", classes="a\nb\nc")
    (tmp_path / "p.jsonl").write_text('{"key": "a.jpg", "prompts": [{"box_xyxy": [1, 1, 9, 9]}]}')
    nowhere = {"MASKFLEET_WEIGHTS_DIR": str(tmp_path / "none")}
    done = run(".", "--out", "out", "--model", "sam3", *words, code=2, cwd=tmp_path, **nowhere)
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
