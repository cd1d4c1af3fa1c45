"""A tuned decoder as a model: loaded with its base, and read from the kept embeddings of its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import Engine, text

from db import corrections, jobs, leases, results, reviewed_masks
from db.embeddings import EmbeddableAsset
from db.jobs import Job
from db.leases import NewOutcome
from db.prompts import store_prompts
from db.publishing import LsProject
from db.settings import Settings, settings
from orchestrator.jobs.request import Request
from orchestrator.tuning.install import install
from orchestrator.tuning.lessons import make_plan
from tests.factories import chunk_ids, claim, make_job, pending, record
from tests.integration.test_kept_embeddings import draw, make_nano_job
from tests.reviewed_job import LABEL, draw_scenes, plant_review
from workers.clicks.decoding import Decoding
from workers.clicks.messages import ClickRequest
from workers.embeddings.address import EmbeddingFormat, embedding_of
from workers.embeddings.store import EmbeddingStore
from workers.models import loading
from workers.models.decoders import load_decoder
from workers.models.files import model_version, weights_path, weights_sha256
from workers.models.loading import load_model
from workers.models.nano import load_sam_nano
from workers.models.own import identity_of, remove_own
from workers.models.registry import find_model
from workers.models.spec import ModelError, ModelSpec, WeightsError
from workers.models.tuned import require_tunable, write_decoder
from workers.prompts import Prompt
from workers.running.chunk import run_chunk
from workers.running.worker import Worker
from workers.storage.objects import open_objects
from workers.tuning.plan import Plan, TuneError

pytestmark = pytest.mark.integration

NANO = find_model("sam_nano")
PROJECT = LsProject("http://ls.example", 7)
CONFIG = (
    '<View><Image name="image" value="$image"/>'
    '<PolygonLabels name="p" toName="image"><Label value="{}"/></PolygonLabels></View>'
)


@pytest.fixture(autouse=True)
def weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MASKFLEET_WEIGHTS_DIR", str(tmp_path / "weights"))
    monkeypatch.setattr(loading, "_loaded", {})  # as in a new process
    settings.cache_clear()
    yield tmp_path / "weights"
    settings.cache_clear()


@pytest.fixture
def tuned(tmp_path: Path) -> ModelSpec:
    """sam_nano with a decoder that is a little different."""
    decoder = load_sam_nano("cpu").mask_decoder.state_dict()
    changed = {name: value * 1.01 for name, value in decoder.items()}
    write_decoder(changed, tmp_path / "decoder.safetensors")
    plan = Plan(
        name="ours",
        model="sam_nano",
        weights_sha256=NANO.sha256,
        job=1,
        project=7,
        server="http://ls.example",
        source="s3://bucket/photos",
        seed=1,
        assets=[],
    )
    install(plan, tmp_path / "decoder.safetensors", {})
    return find_model("ours")


class CountedModel:
    """A loaded model that counts the images that its encoder gets."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.encoded = 0

    def embed(self, images: Any, **asked: Any) -> Any:
        self.encoded += len(images)
        return self._model.embed(images, **asked)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def worker_of(engine: Engine, models: dict[str, CountedModel], store: Path) -> Worker:
    def load(name: str) -> Any:
        return models.setdefault(name, CountedModel(load_model(find_model(name), "cpu")))

    return Worker(
        name="one",
        engine=engine,
        settings=Settings(embeddings=str(store), batch_size=2),
        load_model=load,
        load_detector=lambda asked: pytest.fail("no detector was asked"),
        draining=lambda: False,
        on_hang=lambda: pytest.fail("it hangs"),
    )


def test_a_tuned_model_is_its_base_with_another_decoder(tuned: ModelSpec) -> None:
    base, ours = (load_model(spec, "cpu").sam.state_dict() for spec in (NANO, tuned))  # type: ignore[attr-defined]
    changed = {name for name, value in base.items() if not torch.equal(value, ours[name])}

    assert changed
    assert all(name.startswith("mask_decoder.") for name in changed)
    assert weights_path(tuned).stat().st_size < weights_path(NANO).stat().st_size
    assert model_version(tuned, {}) != model_version(NANO, {})
    assert (tuned.base, tuned.base_sha256) == ("sam_nano", NANO.sha256)
    assert load_decoder(tuned, "cpu").low_hw == (128, 128)


def test_a_tuned_model_without_its_base_or_with_another_decoder_is_refused(tuned: ModelSpec) -> None:
    with pytest.raises(WeightsError, match=r"made for the sam_nano with sha256 0000.*but sam_nano here has d10e"):
        load_model(replace(tuned, base_sha256="0" * 64), "cpu")
    weights_path(tuned).write_bytes(weights_path(tuned).read_bytes()[:-1])
    with pytest.raises(WeightsError, match="expected the decoder of ours"):
        load_model(tuned, "cpu")
    with pytest.raises(ModelError, match=r"the decoder of sam2\.1 cannot be tuned"):
        require_tunable(find_model("sam2.1_tiny"))


@pytest.mark.parametrize("prompts", [False, True])
def test_a_job_with_a_tuned_model_reads_kept_embeddings_and_encodes_nothing(
    engine: Engine, tmp_path: Path, tuned: ModelSpec, prompts: bool
) -> None:
    source, models = draw(tmp_path / "pictures", 3), dict[str, CountedModel]()
    worker = worker_of(engine, models, tmp_path / "kept")
    first = make_nano_job(engine, source, keep_embeddings="all")
    [chunk] = chunk_ids(engine, first)
    run_chunk(worker, chunk)
    assert models["sam_nano"].encoded == 3

    stored = Request(source=str(source), model="ours", params={"points_per_side": 2}).asked()
    stored |= {"prompts": {"format": "jsonl"}, "params": {}} if prompts else {}
    job = make_tuned_job(engine, source, tuned, **stored)
    if prompts:
        with engine.begin() as db:
            asked = json.dumps([Prompt(box_xyxy=(10, 10, 90, 80)).as_json()])
            store_prompts(db, job_id=job.id, rows=[(f"{n}.png", asked) for n in range(3)])
            db.execute(text("UPDATE job SET matched = '{}' WHERE id = :id"), {"id": job.id})
    [chunk] = chunk_ids(engine, job)
    report = run_chunk(worker, chunk)

    assert report is not None
    assert report.labeled == 3
    assert models["ours"].encoded == 0
    assert models["sam_nano"].encoded == 3


def make_tuned_job(engine: Engine, source: Path, spec: ModelSpec, **asked: Any) -> Job:
    made = make_nano_job(engine, source, **{**asked, "own_model": identity_of(spec)})
    version = model_version(spec, {"params": {"points_per_side": 2}})
    with engine.begin() as db:
        db.execute(
            text("UPDATE job SET model = :m, model_version = :v WHERE id = :id"),
            {"m": spec.name, "v": version, "id": made.id},
        )
        found = jobs.get_job(db, job_id=made.id)
    assert found is not None
    return found


def test_a_click_on_a_kept_embedding_is_answered_by_the_tuned_decoder(
    engine: Engine, tmp_path: Path, tuned: ModelSpec
) -> None:
    source, models = draw(tmp_path / "pictures", 1), dict[str, CountedModel]()
    job = make_nano_job(engine, source, keep_embeddings="all")
    [chunk] = chunk_ids(engine, job)
    run_chunk(worker_of(engine, models, tmp_path / "kept"), chunk)
    with engine.begin() as db:
        [asset] = results.labeled_assets(db, job_id=job.id)
        etag = db.execute(text("SELECT etag FROM asset WHERE id = :id"), {"id": asset.asset_id}).scalar_one()
    of = embedding_of(
        EmbeddableAsset(
            asset_id=asset.asset_id,
            source=str(source),
            key=asset.key,
            etag=etag,
            model="ours",
            model_version=f"ours@{weights_sha256(tuned)[:8]}+0",
            fast=False,
        ),
        EmbeddingFormat.FP16,
    )
    assert of.model == "sam_nano"
    decoding = Decoding(EmbeddingStore(open_objects(str(tmp_path / "kept"))))
    prompt = Prompt(box_xyxy=(10, 10, 90, 80))
    request = ClickRequest(n=1, stamp=of.stamp, size_hw=asset.size_hw, prompt=prompt, decoder="ours")

    base, ours = (decoding.answer(replace(request, decoder=name)) for name in (None, "ours"))

    assert base.mask is not None
    assert ours.mask is not None
    assert base.mask.predicted_iou != ours.mask.predicted_iou


def test_a_service_that_runs_answers_with_the_decoder_that_took_the_name(tmp_path: Path, tuned: ModelSpec) -> None:
    decoding = Decoding(EmbeddingStore(open_objects(str(tmp_path / "kept"))))
    before = decoding.load("ours")
    assert decoding.load("ours") is before
    remove_own("ours")
    changed = {name: value * 1.2 for name, value in load_sam_nano("cpu").mask_decoder.state_dict().items()}
    write_decoder(changed, tmp_path / "decoder.safetensors")
    install(Plan(name="ours", model="sam_nano", weights_sha256=NANO.sha256, job=1, project=7, server="http://ls.example",
                 source="s3://bucket/photos", seed=1, assets=[]), tmp_path / "decoder.safetensors", {})  # fmt: skip

    assert decoding.load("ours") is not before


def plan_of(engine: Engine, job: Job, *, config: str = CONFIG.format(LABEL), ls_project: LsProject = PROJECT) -> Plan:
    return make_plan(engine, job, ls_project, config=config, name="ours", seed=1, settings=Settings())


def planted(engine: Engine, folder: Path, count: int = 10, version: str | None = None) -> Job:
    version = version or model_version(NANO, {})
    return plant_review(
        engine, folder, draw_scenes(folder, count), model="sam_nano", model_version=version, ls_project=PROJECT
    )


def test_a_plan_has_what_people_left_and_what_they_deleted(engine: Engine, tmp_path: Path) -> None:
    job = planted(engine, tmp_path / "scenes")
    plan = plan_of(engine, job)

    scenes = draw_scenes(tmp_path / "again", 10)
    assert [len(asset.masks) for asset in plan.assets] == [len(masks) for masks in scenes]
    assert np.array_equal(plan.assets[0].size_hw, scenes[0][0].shape)
    assert all([wrong.point_xy for wrong in asset.wrong] == [(4.5, 4.5)] for asset in plan.assets)
    with engine.begin() as db:
        assert len(corrections.corrected_assets(db, job_id=job.id, ls_project=PROJECT)) == 10


def test_what_cannot_teach_is_said_before_anything_is_trained(engine: Engine, tmp_path: Path) -> None:
    job = planted(engine, tmp_path / "scenes")
    other = make_job(engine, source="s3://other/place", model="sam_nano", model_version=model_version(NANO, {}))

    with pytest.raises(TuneError, match="was one renamed"):
        plan_of(engine, job, config=CONFIG.format("cell"))
    with pytest.raises(TuneError, match=r"annotations of another source.*job \d+ is over s3://other/place"):
        plan_of(engine, other)
    with pytest.raises(TuneError, match="run `maskfleet review 1` first"):
        plan_of(engine, replace(job, id=1), ls_project=LsProject("http://ls.example", 8))
    with pytest.raises(WeightsError, match="but the job was made with 00000000"):
        embedding_of(asset_of(replace(job, model_version="sam_nano@00000000+0")), EmbeddingFormat.FP16)
    with engine.begin() as db:
        db.execute(text("UPDATE ls_region SET verdict = 'deleted'"))
    with pytest.raises(TuneError, match="10 annotations, and none has a mask"):
        plan_of(engine, job)
    with engine.begin() as db:
        db.execute(text("UPDATE ls_region SET verdict = 'kept'"))
        db.execute(text("DELETE FROM ls_annotation WHERE annotation_id = 1"))
    with pytest.raises(TuneError, match="9 annotated assets can be used; a tuning needs at least 10"):
        plan_of(engine, job)


def test_annotations_of_a_picture_that_was_replaced_are_not_those_of_the_new_one(
    engine: Engine, tmp_path: Path
) -> None:
    before = planted(engine, tmp_path / "scenes")
    (tmp_path / "scenes" / "000.png").write_bytes((tmp_path / "scenes" / "001.png").read_bytes())
    version = model_version(NANO, {})
    later = make_nano_job(engine, tmp_path / "scenes")
    with engine.begin() as db:
        db.execute(text("UPDATE job SET model_version = :v WHERE id = :id"), {"v": version, "id": later.id})
    [chunk_id] = chunk_ids(engine, later)
    chunk = claim(engine, chunk_id)
    assert chunk is not None
    with engine.begin() as db:
        assert leases.answer_from_stored(db, chunk=chunk) == 9
    record(engine, chunk, [NewOutcome(asset_id=a.id, width=5, height=4, segment_ms=1) for a in pending(engine, chunk)])

    with engine.begin() as db:
        read = {job.id: corrections.corrected_assets(db, job_id=job.id, ls_project=PROJECT) for job in (before, later)}
        assert len(read[before.id]) == reviewed_masks.annotated_assets(db, job_id=before.id) == 10
        assert [one.key for one in read[later.id]] == [f"{n:03}.png" for n in range(1, 10)]
        assert reviewed_masks.annotated_assets(db, job_id=later.id) == 9


def asset_of(job: Job) -> EmbeddableAsset:
    return EmbeddableAsset(
        asset_id=1, source=job.source, key="a", etag="e", model=job.model, model_version=job.model_version, fast=False
    )
