"""What to tell a person when a job found nothing, too little, or more than was meant. Works on a job's row, or on a
survey before there is a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.prompts.key_matching import Rule

_LINKS = "link_out_of_source"


def nothing_found(
    source: str, assets: int, skipped: Mapping[str, int], matched: Mapping[str, Any] | None
) -> str | None:
    """Why a job has nothing to do, and how to fix it. None if it has something. assets: how many were listed."""
    if not assets:
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()))
        return f"{source}: no asset found; skipped {left_out or 'nothing'}. {_remedy(skipped)}"
    if matched is not None and not matched["assets_matched"]:
        named = ", ".join(matched["unmatched_first"])
        return (
            f"{source}: none of the prompts' {matched['unmatched']:,} keys means one of its {assets:,} assets: "
            f"{named}. A key is the asset's path below the source; `--dry-run` lists some of those"
        )
    return None


def _remedy(skipped: Mapping[str, int]) -> str:
    if skipped.get(_LINKS):
        return (
            "The links lead out of the folder, where workers may not read: give the folder that they lead to, or one "
            "that holds both"
        )
    if skipped.get("not_a_file"):
        return "Links to folders, and links to nothing, are not followed: give the folder itself"
    if skipped.get("not_image_suffix"):
        return "Pictures of other suffixes are taken with --include"
    if skipped.get("not_included") or skipped.get("excluded"):
        return "Check --include and --exclude, which are compared with whole keys"
    return "Check the path"


def matching_rows(matched: Mapping[str, Any] | None) -> dict[str, str]:
    """How many keys each rule found, which keys mean no asset, and which mean several. Empty if all are exact."""
    if matched is None:
        return {}
    by_rule = {rule: matched["by_rule"][rule] for rule in Rule if rule in matched["by_rule"]}
    rules = ", ".join(f"{n:,} by {rule}" for rule, n in by_rule.items())
    several = "; ".join(f"{one['key']} means {', '.join(one['assets'])}" for one in matched["several_first"])
    return {
        "keys matched": rules if set(by_rule) - {Rule.KEY} else "",
        "keys not in the job": _listed(matched["unmatched"], matched["unmatched_first"]),
        "ambiguous keys": f"{_listed(matched['ambiguous'], matched['ambiguous_first'])}; not used: several assets or "
        "several keys look alike"
        if matched["ambiguous"]
        else "",
        "keys of several assets": f"{matched['several']:,}: {several}; each of these assets has the prompts"
        if matched["several"]
        else "",
    }


def _listed(count: int, first: list[str]) -> str:
    more = ", …" if count > len(first) else ""
    return f"{count:,}: {', '.join(first)}{more}" if count else ""
