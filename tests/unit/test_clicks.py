"""The decoder child: its messages, its answers, what it keeps, and what cannot break it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pixels import decode_counts
from workers.clicks.decoding import Decoding
from workers.clicks.messages import (
    Answer,
    ClickAnswer,
    ClickMask,
    ClickRequest,
    LoadAnswer,
    LoadRequest,
    MessageError,
    Ready,
    Request,
    read_answer,
    read_request,
    to_line,
)
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.codec import encode
from workers.embeddings.store import EmbeddingStore
from workers.images.pixels import RgbImage
from workers.masks import BoolMask
from workers.models.decoders import NoEncoder
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene

NANO = find_model("sam_nano")
SIZE_HW = (240, 320)
FP16, INT8 = EmbeddingFormat.FP16, EmbeddingFormat.INT8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(open_objects(str(tmp_path / "kept")))


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model(NANO, "cpu")


def scene(number: int) -> RgbImage:
    return draw_scene(91_000_000_000_000 + number, SIZE_HW).image


def keep(
    store: EmbeddingStore, nano: Model, image: RgbImage, key: str = "a", of: EmbeddingFormat = FP16
) -> EmbeddingOf:
    [embedding] = nano.embed([image])
    made = EmbeddingOf(
        model="sam_nano",
        weights_sha256=weights_sha256(NANO),
        fast=False,
        format=of,
        source="s",
        key=key,
        etag="e",
    )
    store.write(made.address, encode(embedding, made))
    return made


def click(of: EmbeddingOf, prompt: Prompt, n: int = 1, mask_counts: str | None = None) -> ClickRequest:
    return ClickRequest(n=n, stamp=of.stamp, size_hw=SIZE_HW, prompt=prompt, mask_counts=mask_counts)


def point(x: float, y: float) -> Prompt:
    return Prompt(points=((x, y, 1),))


# Messages

REQUEST = ClickRequest(
    n=7,
    stamp=EmbeddingOf(
        model="sam_nano", weights_sha256="ab" * 32, fast=True, format=FP16, source="s", key="k", etag="e"
    ).stamp,
    size_hw=(10, 20),
    prompt=Prompt(box_xyxy=(1, 2, 3, 4), points=((1, 2, 0),)),
    mask_counts="0123",
)


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, mask_counts=None), LoadRequest(load="sam_nano")])
def test_a_request_comes_back_as_it_was_sent(request_: Request) -> None:
    line = to_line(request_)
    assert line.count(b"\n") == 1
    assert read_request(line) == request_


@pytest.mark.parametrize(
    "answer",
    [
        Ready(),
        LoadAnswer(loaded="sam_nano"),
        LoadAnswer(loaded="x", error="unknown"),
        ClickAnswer(n=1, missing="absent"),
        ClickAnswer(n=None, error="not JSON"),
        ClickAnswer(n=2, mask=ClickMask(counts="04", bbox_xywh=(0.0, 1.0, 2.0, 3.0), area_px=4, predicted_iou=0.5)),
    ],
)
def test_an_answer_comes_back_as_it_was_sent(answer: Answer) -> None:
    assert read_answer(to_line(answer)) == answer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": "1"}, "n '1': expected a whole number"),
        ({"address": "../../etc/passwd"}, "expected <weights>/<format>/<content>"),
        ({"model": None}, "model 'None': expected a string"),
        ({"size_hw": [0, 5]}, "expected .height, width."),
        ({"size_hw": [100_000, 100_000]}, "expected at most"),
        ({"prompt": {"points": [[1, 2, 0]]}}, "prompt: points: all are outside"),
        ({"prompt": {"points": [[float("nan"), 2, 1]]}}, "prompt: points"),
        ({"prompt": 5}, "prompt: 5"),
        ({"mask_counts": 5}, "expected COCO run lengths"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_number(change: dict[str, Any], said: str) -> None:
    line = json.dumps(REQUEST.as_json() | change).encode()
    with pytest.raises(MessageError, match=said) as caught:
        read_request(line)
    assert caught.value.n == (None if "n" in change else 7)


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000, b'{"n": 1}', b"null"])
def test_garbage_is_no_message(line: bytes) -> None:
    with pytest.raises(MessageError):
        read_request(line)
    with pytest.raises(MessageError):
        read_answer(line)


# Answers


@pytest.mark.slow
@pytest.mark.parametrize(("of", "mean", "least"), [(FP16, 0.999, 0.99), (INT8, 0.995, 0.9)])
def test_clicks_on_scenes_are_answered_as_by_the_model_on_the_image(
    store: EmbeddingStore, nano: Model, of: EmbeddingFormat, mean: float, least: float
) -> None:
    decoding, ious = Decoding(store), []
    for number in range(5):
        drawn = draw_scene(91_000_000_000_000 + number, SIZE_HW)
        kept = keep(store, nano, drawn.image, f"{number}", of)
        [embedding] = nano.embed([drawn.image])
        for prompt in prompts_on(drawn.masks):
            [[expected]] = nano.prompted(drawn.image, embedding, [prompt], PromptParams())
            answer = decoding.answer(click(kept, prompt))
            assert answer.mask is not None, answer
            ious.append(iou(decode_counts(answer.mask.counts, SIZE_HW), decode_counts(expected.counts, SIZE_HW)))
            assert answer.mask.predicted_iou == pytest.approx(expected.predicted_iou, abs=0.05)

    assert len(ious) > 30
    assert np.mean(ious) >= mean
    assert np.min(ious) >= least


def prompts_on(masks: Any) -> Iterator[Prompt]:
    """A point inside and the box of each mask."""
    for mask in masks:
        ys, xs = np.nonzero(mask)
        middle = len(ys) // 2
        yield point(float(xs[middle]), float(ys[middle]))
        yield Prompt(box_xyxy=(float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)))


def iou(one: BoolMask, other: BoolMask) -> float:
    return 1.0 if not (one | other).any() else float((one & other).sum() / (one | other).sum())


def test_absent_truncated_and_foreign_embeddings_are_missing(
    store: EmbeddingStore, nano: Model, tmp_path: Path
) -> None:
    kept = keep(store, nano, scene(0))
    other = keep(store, nano, scene(1), "other")
    path = tmp_path / "kept" / kept.address
    content = path.read_bytes()
    request = click(kept, point(100, 100))

    def missing() -> str:
        answer = Decoding(store).answer(request)
        assert answer.mask is None
        assert answer.error is None
        assert answer.missing is not None
        return answer.missing

    path.write_bytes(content[: len(content) // 2])
    assert missing().startswith("damaged: ")
    path.write_bytes((tmp_path / "kept" / other.address).read_bytes())
    assert missing().startswith("foreign: ")
    path.unlink()
    assert missing().startswith("absent: ")
    request = replace(request, stamp=replace(request.stamp, weights_sha256="00" * 32))
    assert "of weights 00000000, here are d10efaca" in missing()


def test_an_embedding_that_cannot_be_read_now_is_not_made_again(
    store: EmbeddingStore, nano: Model, tmp_path: Path
) -> None:
    kept = keep(store, nano, scene(0))
    path = tmp_path / "kept" / kept.address
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")  # a store that refuses: links do not lead out of it

    answer = Decoding(store).answer(click(kept, point(100, 100)))

    assert (answer.mask, answer.missing) == (None, None)
    assert str(answer.error).startswith("away: ")
    path.unlink()
    (tmp_path / "elsewhere").rename(path)
    assert Decoding(store).answer(click(kept, point(100, 100))).mask is not None


def test_a_click_that_cannot_be_answered_says_why_and_costs_no_other_click(store: EmbeddingStore, nano: Model) -> None:
    kept, decoding = keep(store, nano, scene(0)), Decoding(store)

    for prompt, said in (
        (point(900, 100), "lies outside the image of 320 x 240 pixels"),
        (Prompt(text="bus"), "a prompt by text"),
    ):
        assert said in str(decoding.answer(click(kept, prompt)).error)
    refined = click(kept, point(100, 100), mask_counts="no run lengths")
    assert "not the run lengths" in str(decoding.answer(refined).error)
    unknown = replace(click(kept, point(1, 1)), stamp=replace(kept.stamp, model="sam_vit_x"))
    assert "unknown model 'sam_vit_x'" in str(decoding.answer(unknown).error)
    assert decoding.answer(click(kept, point(100, 100))).mask is not None


def test_a_mask_of_an_image_is_refined_and_the_images_own_answers_stay(store: EmbeddingStore, nano: Model) -> None:
    kept, decoding = keep(store, nano, scene(0)), Decoding(store)
    prompt = point(100, 100)
    plain = decoding.answer(click(kept, prompt))
    assert plain.mask is not None

    refined = decoding.answer(click(kept, Prompt(points=((20, 20, 1),)), mask_counts=plain.mask.counts))

    assert refined.mask is not None
    assert refined != decoding.answer(click(kept, Prompt(points=((20, 20, 1),))))
    assert decoding.answer(click(kept, prompt)) == plain


def test_the_kept_images_stay_within_their_bytes_and_the_last_clicked_stay(store: EmbeddingStore, nano: Model) -> None:
    one = 4 * 128 * 32 * 32 * 4
    images = [keep(store, nano, scene(n), f"{n}") for n in range(4)]
    decoding = Decoding(store, most_kept_bytes=3 * one)
    answers = [decoding.answer(click(kept, point(100, 100))) for kept in images]
    assert decoding.kept_bytes == 3 * one

    for kept in images:
        store.delete(kept.address)
    again = [decoding.answer(click(kept, point(100, 100))) for kept in images[::-1]]

    assert again[:3] == answers[:0:-1]
    assert str(again[3].missing).startswith("absent: ")


def test_no_encoder_is_built(store: EmbeddingStore, nano: Model) -> None:
    decoding = Decoding(store)
    decoding.answer(click(keep(store, nano, scene(0)), point(100, 100)))

    decoder: Any = decoding.load("sam_nano")

    assert isinstance(decoder.sam.image_encoder, NoEncoder)
    assert list(decoder.sam.image_encoder.parameters()) == []


# The process


@contextmanager
def child(folder: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKFLEET_")}
    if folder is not None:
        environment["MASKFLEET_EMBEDDINGS"] = str(folder)
    command = [sys.executable, "-P", "-m", "workers.clicks.child"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[bytes], *lines: bytes) -> list[Answer]:
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    for line in lines:
        process.stdin.write(line)
        process.stdin.flush()
        answers.append(read_answer(process.stdout.readline()))
    return answers


@pytest.mark.slow
def test_a_child_answers_in_order_survives_garbage_and_ends_with_its_input(
    store: EmbeddingStore, nano: Model, tmp_path: Path
) -> None:
    kept = keep(store, nano, scene(0))
    request = click(kept, point(100, 100), n=5)
    with child(tmp_path / "kept") as process:
        assert process.stdout is not None
        assert read_answer(process.stdout.readline()) == Ready()
        answers = tell(
            process,
            to_line(LoadRequest(load="sam_nano")),
            to_line(LoadRequest(load="sam_vit_x")),
            b"{broken\n",
            to_line(request),
            b'{"n": 6}\n',
            to_line(replace(request, n=7)),
        )
        process.stdin.close()  # type: ignore[union-attr]
        assert process.wait(60) == 0
        assert process.stdout.read() == b""

    loaded, unknown, garbage, first, wrong, second = answers
    assert loaded == LoadAnswer(loaded="sam_nano")
    assert isinstance(unknown, LoadAnswer)
    assert "known: sam_vit_h" in str(unknown.error)
    assert isinstance(garbage, ClickAnswer)
    assert (garbage.n, garbage.mask) == (None, None)
    assert first == Decoding(store).answer(request)
    assert (wrong.n, bool(wrong.error)) == (6, True)  # type: ignore[union-attr]
    assert second == replace(first, n=7)


@pytest.mark.slow
def test_what_a_library_prints_does_not_reach_the_protocol(tmp_path: Path) -> None:
    program = (
        "from workers.clicks import child; import os; answers = child._take_stdout();"
        "print('printed', flush=True); os.system('echo shell'); answers.write(b'answer'); answers.flush()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=300)
    assert done.stdout == b"answer"
    assert b"printed" in done.stderr
    assert b"shell" in done.stderr


@pytest.mark.slow
def test_a_killed_child_gives_no_half_answer_and_one_without_a_store_says_what_to_set(tmp_path: Path) -> None:
    with child(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == b""
        assert process.wait() == -signal.SIGKILL
    with child(None) as process:
        assert process.wait(120) == 2
        assert b"MASKFLEET_EMBEDDINGS is not set" in process.stderr.read()  # type: ignore[union-attr]


def test_the_messages_load_no_torch() -> None:
    program = "import workers.clicks.messages, workers.embeddings.store, sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-P", "-c", program]).strip() == b"False"
