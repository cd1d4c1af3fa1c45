"""Print the result of `make coverage` for the docs: lines and branches that ran, and the files with the fewest."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from coverage import Coverage

LOWEST = 5


def main() -> None:
    report = read_report()
    print(f"Of {figure(report['totals'])}.\n")
    print("| file | of its lines and branches |\n|---|---|")
    files = sorted(report["files"].items(), key=lambda item: item[1]["summary"]["percent_covered"])
    for name, file in files[:LOWEST]:
        print(f"| `{name}` | {figure(file['summary'])} |")


def read_report() -> dict[str, Any]:
    """The report of the file .coverage, read from its JSON form."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"
        measured = Coverage(messages=False)
        measured.load()
        measured.json_report(outfile=str(out))
        report: dict[str, Any] = json.loads(out.read_text())
    return report


def figure(summary: dict[str, Any]) -> str:
    lines, branches = summary["num_statements"], summary["num_branches"]
    line_share = 100 * summary["covered_lines"] / max(1, lines)
    branch_share = 100 * summary["covered_branches"] / max(1, branches)
    return f"{lines:,} lines {line_share:.1f} % ran, of {branches:,} branches {branch_share:.1f} %"


if __name__ == "__main__":
    main()
