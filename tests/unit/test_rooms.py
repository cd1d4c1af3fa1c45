from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("db", "workers", "orchestrator")

# Modules that no test names, each with the tests that run it by another door: its command, or the module that uses it.
RUN_BY = {
    "orchestrator.cli.tune": "e2e/test_tune.py",
    "orchestrator.pages.tune": "e2e/test_tune.py",
    "workers.running.from_store": "integration/test_tuned_models.py",
    "workers.tuning.held_out": "e2e/test_tune.py",
    "db.base": "integration/test_migrations.py",
    "db.counter_tables": "integration/test_migrations.py",
    "orchestrator.jobs.inventory": "unit/test_key_lists.py",
    "orchestrator.jobs.key_tables": "unit/test_key_lists.py",
    "orchestrator.jobs.named_keys": "unit/test_key_lists.py",
    "orchestrator.jobs.shards": "integration/test_listing.py",
    "workers.running.same_bytes": "integration/test_same_bytes.py",
    "workers.compiler": "unit/test_compiler.py",
    "db.copying": "integration/test_prompted_jobs.py",
    "db.mask_prompt": "integration/test_mask_prompts.py",
    "db.mask_rows": "integration/test_queries.py",
    "db.ls_tables": "integration/test_migrations.py",
    "db.metrics": "metrics/test_metrics.py",
    "db.migrations.env": "integration/test_migrations.py",
    "db.migrations.versions.0001_first_tables": "integration/test_migrations.py",
    "db.migrations.versions.0002_label_studio": "integration/test_migrations.py",
    "db.migrations.versions.0003_review": "integration/test_migrations.py",
    "db.migrations.versions.0004_prompt_matches": "integration/test_migrations.py",
    "db.migrations.versions.0005_unjudged": "integration/test_migrations.py",
    "db.migrations.versions.0006_assist": "integration/test_migrations.py",
    "db.migrations.versions.0007_operators": "integration/test_migrations.py",
    "db.migrations.versions.0010_counters": "integration/test_migrations.py",
    "db.migrations.versions.0011_scale": "integration/test_migrations.py",
    "db.migrations.versions.0012_mask_partitions": "integration/test_migrations.py",
    "db.migrations.versions.0013_fair_listing": "integration/test_migrations.py",
    "db.migrations.versions.0014_prediction_counter": "integration/test_migrations.py",
    "db.migrations.versions.0015_same_bytes": "integration/test_migrations.py",
    "db.migrations.versions.0016_lone_points": "integration/test_migrations.py",
    "db.migrations.versions.0017_state_of_tasks": "integration/test_migrations.py",
    "db.copied_outcomes": "integration/test_same_bytes.py",
    "orchestrator.label_studio.config_xml": "unit/test_controls.py",
    "db.review_counts": "label_studio/test_review.py",
    "db.review_order": "label_studio/test_review_order.py",
    "db.reviewed_masks": "label_studio/test_review.py",
    "db.texts": "unit/test_storage.py",
    "workers.allocator": "unit/test_allocator.py",
    "workers.storage.bucket_objects": "integration/test_export_parts.py",
    "workers.storage.place": "integration/test_export_parts.py",
    "orchestrator.cli.__main__": "e2e/test_run.py",
    "orchestrator.cli.app": "e2e/test_run.py",
    "orchestrator.board.board": "integration/test_board.py",
    "orchestrator.board.charts": "integration/test_board.py",
    "orchestrator.board.door": "integration/test_board.py",
    "orchestrator.board.handlers": "integration/test_board.py",
    "orchestrator.board.home": "integration/test_board.py",
    "orchestrator.board.job": "integration/test_board.py",
    "orchestrator.board.photos": "integration/test_board.py",
    "orchestrator.board.service": "integration/test_board.py",
    "orchestrator.cli.board": "integration/test_board.py",
    "orchestrator.cli.gallery": "e2e/test_folder.py",
    "orchestrator.cli.delete": "e2e/test_folder.py",
    "orchestrator.cli.doctor": "e2e/test_deployment.py",
    "orchestrator.cli.migrate": "e2e/test_deployment.py",
    "orchestrator.cli.config": "unit/test_config_command.py",
    "orchestrator.cli.errors": "e2e/test_run.py",
    "orchestrator.cli.export": "integration/test_export.py",
    "orchestrator.cli.main": "unit/test_root.py",
    "orchestrator.cli.jobs": "e2e/test_deployment.py",
    "orchestrator.cli.label_studio": "label_studio/test_publish.py",
    "orchestrator.cli.models": "unit/test_weights.py",
    "orchestrator.cli.operate": "e2e/test_deployment.py",
    "orchestrator.cli.options": "e2e/test_run.py",
    "orchestrator.cli.own_models": "integration/test_own_model_jobs.py",
    "orchestrator.cli.request": "e2e/test_run.py",
    "orchestrator.cli.review": "label_studio/test_review.py",
    "orchestrator.cli.submit": "e2e/test_run.py",
    "orchestrator.export.files": "integration/test_export.py",
    "orchestrator.export.parquet": "integration/test_export_parts.py",
    "orchestrator.export.parts": "integration/test_export_parts.py",
    "orchestrator.export.processes": "integration/test_export_parts.py",
    "orchestrator.export.png_file": "integration/test_export.py",
    "orchestrator.jobs.activity": "faults/test_operators.py",
    "orchestrator.jobs.findings": "reports/test_prompt_reports.py",
    "orchestrator.export.yolo_images": "integration/test_yolo.py",
    "orchestrator.jobs.metrics": "metrics/test_metrics.py",
    "orchestrator.jobs.reports": "integration/test_detected_jobs.py",
    "orchestrator.jobs.survey": "reports/test_prompt_reports.py",
    "orchestrator.jobs.version": "unit/test_submit.py",
    "orchestrator.label_studio.doubts": "label_studio/test_publish.py",
    "orchestrator.label_studio.outgoing": "label_studio/test_publish.py",
    "orchestrator.label_studio.refusals": "label_studio/test_publish.py",
    "orchestrator.label_studio.sending": "label_studio/test_publish.py",
    "orchestrator.label_studio.tokens": "label_studio/test_publish.py",
    "orchestrator.local.doctor": "e2e/test_deployment.py",
    "orchestrator.local.interrupts": "e2e/test_run.py",
    "orchestrator.local.run": "e2e/test_run.py",
    "orchestrator.pages.page": "unit/test_gallery.py",
    "orchestrator.pages.review": "label_studio/test_review.py",
    "orchestrator.prompts.coco": "unit/test_prompt_files.py",
    "orchestrator.prompts.coco_boxes": "unit/test_prompt_files.py",
    "orchestrator.prompts.json_items": "unit/test_prompt_files.py",
    "orchestrator.prompts.key_forms": "unit/test_key_matching.py",
    "orchestrator.prompts.yolo": "integration/test_yolo.py",
    "orchestrator.shapes.outline_tracing": "unit/test_regions.py",
    "orchestrator.terminal.console": "e2e/test_deployment.py",
    "orchestrator.assist.picks": "integration/test_assist.py",
    "orchestrator.assist.running": "label_studio/test_assist.py",
    "orchestrator.cli.assist": "label_studio/test_assist.py",
    "orchestrator.terminal.jobs": "e2e/test_deployment.py",
    "orchestrator.terminal.publish": "label_studio/test_publish.py",
    "orchestrator.terminal.review": "label_studio/test_review.py",
    "orchestrator.terminal.rows": "integration/test_detected_jobs.py",
    "workers.class_names": "unit/test_yolo_lines.py",
    "workers.detectors.checkpoint": "unit/test_transformers_detector.py",
    "workers.detectors.onnx_detector": "unit/test_detectors.py",
    "workers.detectors.onnx_file": "unit/test_detectors.py",
    "workers.detectors.open_vocabulary": "unit/test_phrases.py",
    "workers.detectors.transformers_detector": "unit/test_transformers_detector.py",
    "workers.engine.device": "faults/test_faults.py",
    "workers.images.boxes": "unit/test_heif.py",
    "workers.images.formats": "unit/test_images.py",
    "workers.images.headers": "unit/test_images.py",
    "workers.images.tiff": "unit/test_tiff_layouts.py",
    "workers.models.folders": "unit/test_sam3.py",
    "workers.models.state_dicts": "unit/test_adding.py",
    "workers.models.onnx_session": "unit/test_onnx_decoder.py",
    "workers.models.sam3": "unit/test_sam3.py",
    "workers.models.transformers_checkpoints": "unit/test_transformers_detector.py",
    "workers.running.keeping": "integration/test_kept_embeddings.py",
    "workers.running.device_lock": "faults/test_operators.py",
    "workers.running.heart": "faults/test_operators.py",
    "workers.running.held_lease": "faults/test_faults.py",
    "workers.running.looks": "integration/test_prompted_jobs.py",
    "workers.running.metrics": "metrics/test_metrics.py",
    "workers.running.run_dir": "faults/test_operators.py",
    "workers.running.tasks": "faults/test_faults.py",
    "workers.storage.bucket": "integration/test_storage.py",
    "workers.storage.client": "integration/test_stores.py",
    "workers.storage.folder": "unit/test_storage.py",
    "workers.storage.refusals": "integration/test_stores.py",
    "workers.stored_masks": "integration/test_export.py",
    "workers.training.nano_loss": "unit/test_nano.py",
    "workers.training.shapes": "unit/test_scenes.py",
    "workers.training.textures": "unit/test_scenes.py",
}


@pytest.mark.slow  # a process for each; import-linter holds the same of every module
@pytest.mark.parametrize(
    "module",
    [
        "orchestrator.cli.main",
        "orchestrator.jobs.dispatch",
        "orchestrator.pages.gallery",
        "orchestrator.assist.running",
        "workers.running.tasks",
    ],
)
def test_importing_a_room_loads_no_torch(module: str) -> None:
    program = f"import {module}, sys; sys.exit('torch' in sys.modules or 'segment_anything' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


def test_each_module_is_named_by_a_test_or_runs_in_one_that_is_said() -> None:
    tests = set((ROOT / "tests").rglob("*.py")) - set((ROOT / "tests" / "benchmarks").iterdir()) - {Path(__file__)}
    named = {name for path in tests for name in names_in(ast.parse(path.read_text()))}
    there = set(modules())

    assert sorted(there - named - RUN_BY.keys()) == [], "name them in a test, or in RUN_BY with the test that runs them"
    assert sorted(RUN_BY.keys() - there) == [], "gone"
    assert [test for test in RUN_BY.values() if not (ROOT / "tests" / test).is_file()] == []


def modules() -> Iterator[str]:
    """The product's modules that hold more than a package's docstring."""
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        body = ast.parse(path.read_text()).body
        if path.name != "__init__.py" or len(body) > 1:
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def names_in(tree: ast.AST) -> Iterator[str]:
    """What a test imports, and the words it may give to `python -m` or to a subprocess."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
