"""The search for snapshot, w and guidance over measured points: ours, or the official grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neon_core.merge import NeonWeights
from neon_files.checkpoint import read_state
from neon_files.errors import UserError
from neon_run.row import Grid, Row
from neon_run.search.growing import GrowingSweep
from neon_run.search.quick import Axis, Budget, search
from neon_run.search.sweep import BASE, early_stopped_grid

STEPS_PER_RANGE = 6  # a first step of the search is this part of the paper's range
Measure = Callable[[str, float, float | None, int], float]  # snapshot, w, guidance, images -> FID


@dataclass(frozen=True)
class SearchPlan:
    """The kind of search, and its number of images."""

    kind: str = "quick"  # quick | official
    snapshots: int = 4  # of the fine-tune, evenly spaced, that the quick search visits
    ranking_images: int = Budget().ranking_images  # per setting of the quick search
    deciding_images: int = Budget().deciding_images  # of its best two, and of the controls


def find(row: Row, plan: SearchPlan, sweep: GrowingSweep, seeds: Sequence[int]) -> dict[str, Any]:
    """{"best": {"snapshot", "w", "guidance"}, "base_best": {"guidance"}, "points", "images"}: Neon's best setting, and
    the base's best guidance.

    Every rank calls it. All points share their seeds, the first ones of `seeds`. The quick search keeps statistics,
    which more images can be added to; the official one, of many more points, keeps the points alone.
    """
    points: list[dict[str, Any]] = []

    def measure(snapshot: str, w: float, guidance: float | None, count: int) -> float:
        varied = {row.guidance: guidance} if row.guidance else {}
        if plan.kind == "quick":
            result = sweep.grown(snapshot, w, seeds, count, **varied)
        else:
            result = sweep.measure(snapshot, w, seeds[:count], **varied)
        points.append(point_of(result, guidance))
        return result["fid"]

    if plan.kind == "quick":
        best, base_guidance = _quick(row, plan, sweep, measure)
    else:
        best, base_guidance = _official(row.grid, list(sweep.snapshots), measure, min(row.grid.num_images, len(seeds)))
    return {
        "best": dict(zip(("snapshot", "w", "guidance"), best, strict=True)),
        "base_best": {"guidance": base_guidance},
        "points": points,
        "images": images_of(points),
    }


def _quick(row: Row, plan: SearchPlan, sweep: GrowingSweep, measure: Measure) -> tuple[tuple, float | None]:
    budget = Budget(ranking_images=plan.ranking_images, deciding_images=plan.deciding_images)
    lengths = step_lengths(sweep, evenly(list(sweep.snapshots), plan.snapshots)[::-1])
    w_axis = _axis(row.w_range, row.w)
    guidance_axis = None
    if row.guidance and row.guidance_range:
        guidance_axis = _axis(row.guidance_range, row.evaluate[row.guidance])
    best = search(measure, lengths, w_axis, guidance_axis, budget).best
    if guidance_axis is None:
        measure(BASE, 0.0, None, plan.deciding_images)
        return (best.snapshot, best.w, None), None
    # The same search along one axis, the guidance.
    alone = search(lambda _, g, __, n: measure(BASE, 0.0, g, n), {BASE: 1.0}, guidance_axis, None, budget)
    return (best.snapshot, best.w, best.guidance), alone.best.w


def _official(grid: Grid, snapshots: Sequence[str], measure: Measure, count: int) -> tuple[tuple, float | None]:
    measured: dict[tuple, float] = {}

    def fid(snapshot: str, w: float, guidance: float | None) -> float:
        measured[snapshot, w, guidance] = measure(snapshot, w, guidance, count)
        return measured[snapshot, w, guidance]

    values = [value for value in grid.guidances if value is not None]
    guidances = sorted(values) if len(values) == len(grid.guidances) else grid.guidances
    of_base = early_stopped_grid([BASE], [0.0], guidances, fid, grid.tolerance)
    if not math.isfinite(measured[of_base]):
        raise UserError("the base's images are not finite at any guidance of the grid; check its file")
    base_guidance = of_base[2]
    measured.clear()  # the base wins only where the grid holds w = 0
    for snapshot in snapshots:
        _, w, guidance = early_stopped_grid([snapshot], sorted(grid.ws), guidances, fid, grid.tolerance)
        for around in neighbours(w, guidance, grid.refine) if grid.refine else ():
            fid(snapshot, *around)
    best = min(measured, key=measured.__getitem__)
    if not math.isfinite(measured[best]):
        raise UserError("no setting of the search gave finite images; check the snapshots, or search smaller w")
    return best, base_guidance


def neighbours(w: float, guidance: float | None, step: float) -> list[tuple[float, float | None]]:
    """The eight points around (w, guidance), or the two around w, that are positive throughout."""
    ws = [round(w + i * step, 6) for i in (-1, 0, 1)]
    guidances = [None] if guidance is None else [round(guidance + i * step, 6) for i in (-1, 0, 1)]
    around = [(a, b) for a in ws for b in guidances if (a, b) != (w, guidance)]
    return [(a, b) for a, b in around if a > 0 and (b is None or b > 0)]


def point_of(result: Mapping[str, Any], guidance: float | None) -> dict[str, Any]:
    """The entries of a measured point that are kept."""
    kept = ("snapshot", "w", "num_images", "fid", "fid_heldout")
    return {name: result[name] for name in kept if name in result} | {"guidance": guidance}


def images_of(points: Sequence[Mapping[str, Any]]) -> int:
    """The images sampled for points of one seed list: each setting's largest count, since it grows."""
    cost: dict[tuple, int] = {}
    for point in points:
        key = (point["snapshot"], point["w"], point["guidance"])
        cost[key] = max(cost.get(key, 0), point["num_images"])
    return sum(cost.values())


def evenly(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, evenly spaced, the last always among them."""
    places = {round(place) for place in np.linspace(len(names) - 1, 0, max(count, 1) + 1)[:-1]}
    return [names[place] for place in sorted(places)]


def step_lengths(sweep: GrowingSweep, names: Sequence[str]) -> dict[str, float]:
    """|theta_syn - theta_base| of each snapshot that has moved; UserError where none has."""
    lengths = {}
    for name in names:
        theta_syn = read_state(sweep.snapshots[name], sweep.theta_base)
        lengths[name] = NeonWeights(sweep.backbone.net, sweep.theta_base, theta_syn).distance()
    moved = {name: length for name, length in lengths.items() if length > 0}
    if not moved:
        raise UserError(f"{', '.join(names)}: equal to the base, so there is no direction to search; train for longer")
    return moved


def _axis(limits: tuple[float, float], start: float) -> Axis:
    low, high = limits
    return Axis(low, high, float(min(max(start, low), high)), (high - low) / STEPS_PER_RANGE)
