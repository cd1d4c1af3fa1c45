"""A job's prompts, detector and phrases as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.jobs.findings import matching_rows


def prompt_rows(report: dict[str, Any]) -> dict[str, str]:
    """The lines of a job's page about its prompts; empty where there is nothing to say."""
    unused = "".join(f"{first['key']}: {first['error']}" for first in report["unused_first"][:1])
    return {
        "prompts": f"{report['prompts']:,} of {report['file']} ({report['format']})",
        "unreadable prompts": f"{report['bad']:,}, first {report['bad_first'][0]}" if report["bad"] else "",
        "other text files": f"{report['passed_over']:,}, first {report['passed_over_first'][0]}; they hold no labels"
        if report.get("passed_over")
        else "",
        **(matching_rows(report) if report["by_rule"] is not None else {}),
        "with unused prompts": f"{report['unused']:,}, first {unused}" if report["unused"] else "",
    }


def detector_rows(report: dict[str, Any]) -> dict[str, str]:
    """The lines of a job's page about its detector; empty where there is nothing to say."""
    unused = "".join(f"{first['key']}: {first['error']}" for first in report["unused_first"][:1])
    unmapped = _classes(report["unmapped"])
    return {
        "detector": f"{report['name']} ({report['kind']}, {report['identity'][:15]}), scores above "
        f"{report['threshold']:g}",
        "detected": _classes(report["found"]),
        "not in the label map": f"{unmapped}; kept under their own names" if unmapped else "",
        "with unusable boxes": f"{report['unused']:,}, first {unused}" if report["unused"] else "",
    }


def _classes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def text_rows(report: list[dict[str, Any]]) -> dict[str, str]:
    """The line of a job's page about its phrases."""
    named = (f"{p['masks']:,} {p['text']}{'' if p['label'] == p['text'] else ' as ' + p['label']}" for p in report)
    return {"text": ", ".join(named)}
