"""Does the claim of a row hold? Distances as ratios to the base at its own best, over runs and blocks of seeds.

Every distance is to the held-out reference where there is one, on blocks of seeds that no search has seen. The claim
(`neon_run.row.Acceptance`) must hold in every run, for the means over its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from neon_run.reproduce.measure import LONGER, RANDOM, REAL
from neon_run.search.quick import Settings
from neon_run.search.sweep import BASE

BASE_OWN_BEST = "base"
PLACES = {  # name -> heading
    BASE_OWN_BEST: "base, own best",
    "self_trained": "self-trained",
    "neon": "Neon",
    "random": "random direction",
    "away": "away from real",
    "real": "as long on real",
    "longer": "base, twice as long",
}
SIGMAS = 3.0


def distances(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """name of `PLACES` -> the distance on every fresh block; {} where there was no fresh block.

    Base and Neon of all images of a block, controls of as many as they had. Of a control that was measured at two
    settings of the sampler, the lower one: its best counts.
    """
    points, few, most = _fresh(results)
    best, of_base = results["best"], results["base_best"]["settings"]
    snapshot, w, settings = best["snapshot"] if best["w"] else BASE, best["w"], best["settings"]
    wanted = {
        BASE_OWN_BEST: (BASE, 0.0),
        "self_trained": (best["snapshot"], -1.0),
        "neon": (snapshot, w),
        "random": (RANDOM, w),
        "away": (REAL, w),
        "real": (REAL, -1.0),
        "longer": (LONGER, -1.0),
    }
    found: dict[str, list[float]] = {}
    for name, place in wanted.items():
        either = {BASE_OWN_BEST: [of_base], "neon": [settings]}.get(name, [settings, of_base])
        count = most if name in (BASE_OWN_BEST, "neon") else few
        measured = [values for chosen in either if (values := _on_blocks(points, count, *place, chosen))]
        if measured:
            found[name] = min(measured, key=sum)
    return found


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """name -> mean distance over the fresh blocks, divided by that of the base, of equally many images."""
    found, (points, few, _) = distances(results), _fresh(results)
    of_few = _on_blocks(points, few, BASE, 0.0, results["base_best"]["settings"])
    if BASE_OWN_BEST not in found or not of_few:
        return {}
    by = {BASE_OWN_BEST: found[BASE_OWN_BEST], "neon": found[BASE_OWN_BEST]}
    return {name: float(np.mean(values) / np.mean(by.get(name, of_few))) for name, values in found.items()}


def _fresh(results: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], int, int]:
    """The points on fresh blocks, and the least and the largest of their numbers of images."""
    points = [point for point in results["points"]["evaluate"] if point["block"] != "first"]
    counts = [point["num_images"] for point in points]
    return points, min(counts, default=0), max(counts, default=0)


def _on_blocks(
    points: Sequence[Mapping[str, Any]], count: int, snapshot: str, w: float, settings: Settings
) -> list[float]:
    """The distance of `count` images at one place, block by block."""
    at = {
        point["block"]: point.get("fid_heldout", point["fid"])
        for point in points
        if point["num_images"] == count
        and (point["snapshot"], point["w"], point["settings"]) == (snapshot, w, settings)
    }
    return [at[block] for block in sorted(at)]  # "second" before "third"


def failures(results: Mapping[str, Any]) -> list[str]:
    """What one run does not hold of its row's claim, a sentence each; [] also where the row claims nothing."""
    claim = results.get("acceptance")
    if not claim:
        return []
    found = ratios(results)
    limits = {"neon": claim["neon"], **dict.fromkeys(("random", "away"), claim["controls"])}
    limits["self_trained"] = claim["self_trained"]
    problems = []
    for name, limit in limits.items():
        value, bound = found.get(name, math.nan), "most" if name == "neon" else "least"
        if not (value <= limit if name == "neon" else value >= limit):
            problems.append(f"{PLACES[name]}: {value:.3f} of the base, claimed at {bound} {limit:g}")
    return problems


def gains(runs: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """How much lower Neon's distance is than the base's, as a part of the base's, over several runs of a row: {"mean",
    "standard_error", "low", "high", "sigmas"}; None for fewer than two.

    A run counts once, with its mean over blocks, so the error holds the chance of training and of sampling. The 95 %
    interval is Student's with n - 1 degrees of freedom.
    """
    values = [1 - found["neon"] for run in runs if "neon" in (found := ratios(run))]
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    reach = float(stdtrit(len(values) - 1, 0.975)) * error
    sigmas = mean / error if error else math.copysign(math.inf, mean)
    return {"mean": mean, "standard_error": error, "low": mean - reach, "high": mean + reach, "sigmas": sigmas}
