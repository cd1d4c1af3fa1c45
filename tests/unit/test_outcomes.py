"""The outcome of an asset that raised an error."""

from __future__ import annotations

import pytest

from db.leases import Asset
from workers.models import loading
from workers.running.outcomes import ProcessUnfit, failed_outcome

ASSET = Asset(id=7, key="a.png", deaths_alone=None, etag="e", size_bytes=1)


def test_an_asset_is_too_large_for_the_device_only_where_no_other_jobs_model_is_in_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = MemoryError("CUDA out of memory")
    monkeypatch.setattr(loading, "_loaded", {"this job's": object()})
    assert failed_outcome(ASSET, full, job_id=1).error_kind == "gpu_oom"

    monkeypatch.setattr(loading, "_loaded", {"this job's": object(), "another's": object()})
    with pytest.raises(ProcessUnfit, match="asset 7 does not fit beside the models of other jobs"):
        failed_outcome(ASSET, full, job_id=1)
