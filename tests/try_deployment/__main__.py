"""The compose deployment on the Docker engine that is there: built, used, broken, upgraded and restored.

`make try-deployment [OLD=commit] [OUT_DIR=folder]`; 25 minutes on two free cores, an hour on busy ones, and 25 GB of
disk. It needs `docker` with compose, its ports free, and the images' base. It works on a copy of this repository, in a
compose project of its own, which it removes. BUILD_CA=file gives the build a proxy's certificate authority.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tests.try_deployment import building, joining, living, reviewing, serving, storing, upgrading
from tests.try_deployment.report import Report
from tests.try_deployment.stack import ROOT, Stack

PARTS = {
    "build": building.build,
    "old": upgrading.begin_with_the_old,
    "up": living.come_up,
    "untouched": living.stay_untouched,
    "store": storing.photos_in_and_exports_out,
    "kills": living.survive_kills,
    "review": reviewing.publish_and_review,
    "reviewers": reviewing.many_reviewers,
    "assist": serving.answer_clicks,
    "board": serving.open_the_board,
    "frozen": living.replace_a_frozen_worker,
    "change": building.change_a_line,
    "join": joining.join_a_worker_over_tls,
    "restore": upgrading.restore_into_fresh_volumes,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", metavar="COMMIT", help="also begin with this version's code and tables, and upgrade")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "try-deployment")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="on the stack that is up")
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    parser.add_argument("--no-cache", action="store_true", help="build as if nothing had been built before")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    report = Report(args.out / "table.md")
    stack = Stack(args.out, old=args.old, no_cache=args.no_cache)
    try:
        for name, part in PARTS.items():
            if name in args.only and (name != "old" or args.old):
                report.part(name, lambda part=part: part(stack, report))  # type: ignore[misc]
    finally:
        if not args.keep:
            stack.compose("down", "--volumes", "--timeout", "10", check=False)
    print(report.table())
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
