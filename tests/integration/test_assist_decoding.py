"""Clicks answered by decoder children from stored embeddings, by many reviewers, and embeddings that are not right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, text

from db import embeddings
from db.states import EmbeddingState
from orchestrator.assist.ahead import within_budget
from orchestrator.assist.answers import Assistant
from orchestrator.assist.children import Children
from orchestrator.assist.decoding import Decoder
from orchestrator.label_studio.drawn import mask_from_region
from tests.assisted import PROJECT, SERVER, PublishedAsset, embedding_of_asset, keep_embedding, published_asset
from tests.label_studio.reviewing import disc
from tests.pixels import decode_counts
from tests.waiting import wait_for
from workers.embeddings.address import EmbeddingFormat, EmbeddingOf
from workers.embeddings.store import EmbeddingStore
from workers.models.files import weights_sha256
from workers.models.loading import load_model
from workers.models.registry import find_model
from workers.models.spec import Model
from workers.params import PromptParams
from workers.prompts import Prompt
from workers.storage.objects import open_objects
from workers.training.scenes import draw_scene

pytestmark = pytest.mark.integration

SIZE_HW = (240, 320)
VERSION = f"sam_nano@{weights_sha256(find_model('sam_nano'))[:8]}+00000000"
STORED = disc(160, 120, 30, SIZE_HW)


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_model(find_model("sam_nano"), "cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingStore]:
    folder = str(tmp_path_factory.mktemp("store") / "kept")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MASKFLEET_EMBEDDINGS", folder)
        yield EmbeddingStore(open_objects(folder))


@pytest.fixture(scope="module")
def children(store: EmbeddingStore) -> Iterator[Children]:
    started = Children(("-P", "-m", "workers.clicks.child"), 2, seconds=60, models=lambda: ["sam_nano"])
    wait_for(lambda: started.ready() == 2, "the decoder children")
    yield started
    started.close()


def scene_of(number: int) -> Any:
    return draw_scene(91_000_000_000_000 + number, SIZE_HW).image


def published(engine: Engine, number: int) -> PublishedAsset:
    return published_asset(
        engine, [STORED], key=f"{number}.png", task_id=100 + number, model="sam_nano", model_version=VERSION
    )


def keep(engine: Engine, store: EmbeddingStore, nano: Model, asset: PublishedAsset, number: int) -> EmbeddingOf:
    return keep_embedding(engine, store, nano, asset, scene_of(number))


def answer(assistant: Assistant, asset: PublishedAsset, x: float, y: float) -> tuple[str, Any]:
    """Who answered, and the pixels."""
    (found,) = assistant.answer(asset.body(asset.point(x, y)))["results"]
    pixels = np.any([mask_from_region(region, size_hw=SIZE_HW) for region in found["result"]], axis=0)
    return found["model_version"].rpartition("/")[2], pixels


def assistant_of(engine: Engine, children: Children) -> Assistant:
    decoder = Decoder(engine, children, EmbeddingFormat.FP16)
    return Assistant(engine, SERVER, [PROJECT], decode=decoder, as_="brush")


def test_ten_reviewers_at_once_get_the_answers_of_one_alone(
    engine: Engine, store: EmbeddingStore, children: Children, nano: Model
) -> None:
    assets = [published(engine, number) for number in range(5)]
    for number, asset in enumerate(assets):
        keep(engine, store, nano, asset, number)
    assistant = assistant_of(engine, children)
    places = np.random.default_rng(3).uniform((5, 5), (315, 235), (8, 2)).tolist()
    clicks = [(asset, x, y) for asset in assets for x, y in places]

    alone = [answer(assistant, *click) for click in clicks]
    with ThreadPoolExecutor(10) as reviewers:
        together = list(reviewers.map(lambda click: answer(assistant, *click), clicks))

    assert [who for who, _ in together] == ["decoder"] * len(clicks)
    assert all((one == other).all() for (_, one), (_, other) in zip(alone, together, strict=True))
    ((expected,),) = nano.prompted(
        scene_of(0), nano.embed([scene_of(0)])[0], [Prompt(points=((*places[0], 1),))], PromptParams()
    )
    pixels = decode_counts(expected.counts, SIZE_HW)
    assert (alone[0][1] == pixels).mean() > 0.99


@pytest.mark.parametrize("damage", ["absent", "cut off", "of other weights", "not ours"])
def test_an_embedding_that_is_not_right_is_answered_from_stored_masks_and_wanted_again(
    engine: Engine, store: EmbeddingStore, children: Children, nano: Model, damage: str
) -> None:
    asset = published(engine, 0)
    of = keep(engine, store, nano, asset, 0)
    content = store.read(of.address)
    if damage == "absent":
        store.delete(of.address)
    elif damage == "cut off":
        store.write(of.address, content[: len(content) // 2])
    elif damage == "of other weights":
        store.write(of.address, content.replace(of.weights_sha256.encode(), b"0" * 64))
    else:
        store.write(of.address, b"something else")
    assistant = assistant_of(engine, children)

    who, pixels = answer(assistant, asset, 160, 120)
    assert who == "stored"
    assert (pixels == STORED).mean() > 0.99
    with engine.begin() as db:
        row = db.execute(text("SELECT state FROM embedding WHERE address = :a"), {"a": of.address}).scalar_one()
    assert row == EmbeddingState.WANTED
    keep(engine, store, nano, asset, 0)
    assert answer(assistant, asset, 160, 120)[0] == "decoder"


def test_a_click_before_there_is_an_embedding_wants_it_once(engine: Engine, children: Children) -> None:
    asset = published(engine, 0)
    assistant = assistant_of(engine, children)
    threads = [threading.Thread(target=answer, args=(assistant, asset, 160, 120)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with engine.begin() as db:
        rows = db.execute(text("SELECT address, state FROM embedding")).all()
    assert [tuple(row) for row in rows] == [(embedding_of_asset(engine, asset).address, "wanted")]


def test_a_model_without_points_is_answered_from_stored_masks_and_wants_nothing(
    engine: Engine, children: Children
) -> None:
    asset = published_asset(engine, [STORED], model="sam3", model_version="sam3@00000000+00000000")
    assert answer(assistant_of(engine, children), asset, 160, 120)[0] == "stored"
    with engine.begin() as db:
        assert db.execute(text("SELECT count(*) FROM embedding")).scalar_one() == 0


def test_no_more_is_kept_ahead_than_the_budget_holds(engine: Engine, store: EmbeddingStore, nano: Model) -> None:
    assert within_budget(engine, 200, budget_bytes=1) == 200  # nothing is stored yet, so no size is known
    for number in range(2):
        keep(engine, store, nano, published(engine, number), number)
    with engine.begin() as db:
        size_bytes = embeddings.totals(db).size_bytes // 2

    assert within_budget(engine, 200, budget_bytes=5 * size_bytes) == 5
    assert within_budget(engine, 3, budget_bytes=5 * size_bytes) == 3
