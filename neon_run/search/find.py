"""The search for snapshot, w and settings of the sampler over measured points: ours, or the official grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from neon_core.merge import NeonWeights
from neon_files.checkpoint import read_state
from neon_files.errors import UserError
from neon_run.row import Grid, Range, Row
from neon_run.search.growing import GrowingSweep
from neon_run.search.quick import Axis, Budget, Measure, Settings, search
from neon_run.search.sweep import BASE, early_stopped_grid

STEPS_PER_RANGE = 6  # a first step of the search is this part of the paper's range


@dataclass(frozen=True)
class SearchPlan:
    """The kind of search, and its number of images."""

    kind: str = "quick"  # quick | official
    snapshots: int = 4  # of the fine-tune, evenly spaced, that the quick search visits
    ranking_images: int = Budget().ranking_images  # per setting of the quick search
    deciding_images: int = Budget().deciding_images  # of its best two, and of the controls


def find(row: Row, plan: SearchPlan, sweep: GrowingSweep, seeds: Sequence[int]) -> dict[str, Any]:
    """{"best": {"snapshot", "w", "settings"}, "base_best": {"settings"}, "points", "images"}: Neon's best, and the
    base's own best settings of the sampler: the same search along the same axes, without w.

    Every rank calls it. All points share their seeds, the first ones of `seeds`. The quick search keeps statistics,
    which more images can be added to; the official one, of many more points, keeps the points alone.
    """
    points: list[dict[str, Any]] = []

    def measure(snapshot: str, w: float, settings: Settings, count: int) -> float:
        if plan.kind == "quick":
            result = sweep.grown(snapshot, w, seeds, count, **settings)
        else:
            result = sweep.measure(snapshot, w, seeds[:count], **settings)
        points.append(point_of(result, settings))
        return result["fid"]

    if plan.kind == "quick":
        best, of_base = _quick(row, plan, sweep, measure)
    else:
        best, of_base = _official(row.grid, list(sweep.snapshots), measure, min(row.grid.num_images, len(seeds)))
    return {
        "best": dict(zip(("snapshot", "w", "settings"), best, strict=True)),
        "base_best": {"settings": of_base},
        "points": points,
        "images": images_of(points),
    }


def _quick(row: Row, plan: SearchPlan, sweep: GrowingSweep, measure: Measure) -> tuple[tuple, Settings]:
    budget = Budget(ranking_images=plan.ranking_images, deciding_images=plan.deciding_images)
    lengths = step_lengths(sweep, evenly(list(sweep.snapshots), plan.snapshots)[::-1])
    axes = {name: _axis(limits, row.evaluate[name]) for name, limits in row.axes.items()}
    best = search(measure, lengths, _axis(Range(*row.w_range), row.w), axes, budget).best
    return (best.snapshot, best.w, best.settings), _base_best(axes, budget, measure)


def _base_best(axes: Mapping[str, Axis], budget: Budget, measure: Measure) -> Settings:
    """The same search with the first setting of the sampler in the place of w."""
    if not axes:
        measure(BASE, 0.0, {}, budget.deciding_images)
        return {}
    (first, axis), *others = axes.items()

    def settings_of(value: float, further: Settings) -> Settings:
        return {first: axis.setting(value), **further}

    def of_base(_: str, value: float, further: Settings, count: int) -> float:
        return measure(BASE, 0.0, settings_of(value, further), count)

    best = search(of_base, {BASE: 1.0}, axis, dict(others), budget).best
    return settings_of(best.w, best.settings)


def _official(grid: Grid, snapshots: Sequence[str], measure: Measure, count: int) -> tuple[tuple, Settings]:
    measured: list[tuple[float, tuple]] = []

    def fid(snapshot: str, w: float, settings: Settings) -> float:
        measured.append((measure(snapshot, w, settings, count), (snapshot, w, settings)))
        return measured[-1][0]

    values = {name: sorted(values) for name, values in grid.settings.items()}
    _, _, base_settings = early_stopped_grid([BASE], [0.0], values, fid, grid.tolerance)
    if not any(math.isfinite(value) for value, _ in measured):
        raise UserError("the base's images are not finite at any setting of the grid; check its file")
    measured.clear()  # the base wins only where the grid holds w = 0
    for snapshot in snapshots:
        _, w, settings = early_stopped_grid([snapshot], sorted(grid.ws), values, fid, grid.tolerance)
        for around in neighbours(w, settings, grid.refine) if grid.refine else ():
            fid(snapshot, *around)
    lowest, best = min(measured, key=lambda pair: pair[0])
    if not math.isfinite(lowest):
        raise UserError("no setting of the search gave finite images; check the snapshots, or search smaller w")
    return best, base_settings


def neighbours(w: float, settings: Settings, step: float) -> list[tuple[float, Settings]]:
    """The points one step around (w, settings) that are positive throughout: eight with guidance, two of w alone."""
    places = [[round(value + i * step, 6) for i in (-1, 0, 1)] for value in (w, *settings.values())]
    around = [place for place in product(*places) if place != (w, *settings.values()) and min(place) > 0]
    return [(place[0], dict(zip(settings, place[1:], strict=True))) for place in around]


def point_of(result: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The entries of a measured point that are kept."""
    kept = ("snapshot", "w", "num_images", "fid", "fid_heldout")
    return {name: result[name] for name in kept if name in result} | {"settings": settings}


def images_of(points: Sequence[Mapping[str, Any]]) -> int:
    """The images sampled for points of one seed list: each setting's largest count, since it grows."""
    cost: dict[tuple, int] = {}
    for point in points:
        key = (point["snapshot"], point["w"], *point["settings"].items())
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


def _axis(limits: Range, start: float) -> Axis:
    low, high, whole = limits
    step = (high - low) / STEPS_PER_RANGE
    return Axis(low, high, float(min(max(start, low), high)), max(step, 1.0) if whole else step, whole)
