"""The results.json of `neon reproduce`, as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def upgraded(results: Mapping[str, Any]) -> dict[str, Any]:
    """A results.json with a dictionary of settings in every point, also one from the time when guidance was the only
    setting that a search varied."""

    def point(old: Mapping[str, Any]) -> dict[str, Any]:
        guidance = old.get("guidance")
        return {"settings": {} if guidance is None else {results["guidance"]: guidance}, **old}

    ends = {name: point(results[name]) for name in ("best", "base_best") if name in results}
    points = {stage: [point(old) for old in listed] for stage, listed in results.get("points", {}).items()}
    return {**results, **ends, "points": points}
