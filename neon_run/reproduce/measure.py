"""The two stages of a row that measure: the search for (snapshot, w, guidance), and the numbers of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from neon_core.backbone import Backbone
from neon_core.distributed import barrier, broadcast_object, is_main, print0
from neon_core.merge import NeonWeights
from neon_files.atomic import atomic_path
from neon_files.checkpoint import read_checkpoint, write_checkpoint
from neon_files.errors import UserError
from neon_run.reproduce.controls import random_direction
from neon_run.rows import Row
from neon_run.search.growing import GrowingSweep
from neon_run.search.interval import block_statistics, bootstrap_fids, interval
from neon_run.search.quick import Axis, Budget, search
from neon_run.search.sweep import BASE, early_stopped_grid

STEPS_PER_RANGE = 6  # a first step of the search is this part of the paper's range
RANDOM, REAL = "random-direction", "real-data"  # snapshots that are controls
MAX_SAMPLE_SIDE = 192  # pixels in the report


def find(row: Row, plan: Any, counts: Any, sweep: GrowingSweep, seeds: Sequence[int]) -> dict[str, Any]:
    """{"best", "base_best", "points", "images"}: Neon's best setting, and the base's own best guidance.

    Every rank calls it. Every point shares its seeds, the first ones of the evaluation, which it can be grown to.
    """
    points: list[dict[str, Any]] = []

    def measured(snapshot: str, w: float, guidance: float | None, count: int) -> float:
        varied = {row.guidance: guidance} if row.guidance else {}
        result = sweep.grown(snapshot, w, seeds, count, **varied)
        points.append(_point(result, guidance))
        return result["fid"]

    names = list(sweep.snapshots)
    guidance_start = row.recipe.evaluate.get(row.guidance) if row.guidance else None
    if plan.search == "official":
        grid, count = row.grid, min(row.grid.num_images, len(seeds))
        best = early_stopped_grid(
            names, grid.ws, grid.guidances, lambda s, w, g: measured(s, w, g, count), grid.tolerance
        )
        bases = [(measured(BASE, 0.0, g, count), g) for g in grid.guidances]
        base_guidance = min(bases, key=lambda found: found[0])[1]
    else:
        budget = Budget(ranking_images=counts.ranking, deciding_images=counts.deciding)
        lengths = _step_lengths(sweep, evenly(names, plan.snapshots)[::-1])
        w_axis = _axis(row.w_range, row.recipe.w)
        g_axis = _axis(row.guidance_range, guidance_start) if row.guidance else None
        found = search(measured, lengths, w_axis, g_axis, budget).best
        best = found.snapshot, found.w, found.guidance
        base_guidance = None
        if g_axis is None:
            measured(BASE, 0.0, None, counts.deciding)
        else:  # the same search along one axis, which is the guidance here
            alone = search(lambda _, g, __, n: measured(BASE, 0.0, g, n), {BASE: 1.0}, g_axis, None, budget)
            base_guidance = alone.best.w
    return {
        "best": {"snapshot": best[0], "w": best[1], "guidance": best[2]},
        "base_best": {"guidance": base_guidance},
        "points": points,
        "images": images_of(points),
    }


def final(
    row: Row,
    plan: Any,
    counts: Any,
    sweep: GrowingSweep,
    seeds: Sequence[int],
    found: Mapping[str, Any],
    out_dir: Path,
) -> dict[str, Any]:
    """Everything the report shows: base and Neon on all seeds and on a second block, which no search has seen; there
    also the curve over w and the controls (on the first block where there is no second); and samples. Every rank calls
    it; what has been sampled is grown, not made again."""
    best, base_guidance = found["best"], found["base_best"]["guidance"]
    points: list[dict[str, Any]] = []

    def at(snapshot: str, w: float, guidance: float | None, block: Sequence[int], count: int) -> dict[str, Any]:
        varied = {row.guidance: guidance} if row.guidance else {}
        result = sweep.grown(snapshot, w, block, count, **varied)
        points.append(_point(result, guidance) | {"block": "first" if block is seeds else "second"})
        return result

    ends = {"base": (BASE, 0.0, base_guidance), "neon": (best["snapshot"], best["w"], best["guidance"])}
    whole = {name: at(*end, seeds, len(seeds)) for name, end in ends.items()}
    out: dict[str, Any] = {"final": {name: _numbers(result) for name, result in whole.items()}}
    out["intervals"] = _intervals(row, plan, sweep, seeds, ends, whole)
    fresh = range(max(seeds) + 1, max(seeds) + 1 + len(seeds)) if plan.second_block else seeds
    count, w_best = counts.deciding, best["w"]
    if plan.controls:
        curve = plan.curve or [round(w_best * part, 6) for part in (0.5, 1.5)]
        for w in dict.fromkeys([-1.0, 0.0, *curve, w_best]):
            at(best["snapshot"], w, best["guidance"], fresh, count)
        at(BASE, 0.0, base_guidance, fresh, count)
        if w_best:
            path = _write_random(sweep, best["snapshot"], plan.seed, out_dir / "controls")
            sweep.snapshots[RANDOM] = path
            at(RANDOM, w_best, best["guidance"], fresh, count)
    if REAL in sweep.snapshots:
        at(REAL, -1.0, best["guidance"], fresh, count)
    if plan.second_block:
        out["second_block"] = {name: _numbers(at(*end, fresh, len(seeds))) for name, end in ends.items()}
    _write_samples(row, sweep, seeds[: math.prod(plan.samples)], best, out_dir / "samples")
    out["file_differs_by"] = _difference_of_file(sweep, best, out_dir / "neon.safetensors")
    own = [{k: v for k, v in point.items() if k != "block"} for point in points if point["block"] == "first"]
    others = [point for point in points if point["block"] == "second"]
    grown = images_of([*found["points"], *own]) - found["images"]
    return {**out, "points": points, "images": grown + images_of(others)}


def images_of(points: Sequence[Mapping[str, Any]]) -> int:
    """What points of one seed list cost: each setting's largest count, since it grows."""
    cost: dict[tuple, int] = {}
    for point in points:
        key = (point["snapshot"], point["w"], point["guidance"])
        cost[key] = max(cost.get(key, 0), point["num_images"])
    return sum(cost.values())


def evenly(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, evenly spaced, the last always among them."""
    places = {round(place) for place in np.linspace(len(names) - 1, 0, max(count, 1) + 1)[:-1]}
    return [names[place] for place in sorted(places)]


def _axis(limits: tuple[float, float], start: float) -> Axis:
    low, high = limits
    return Axis(low, high, float(min(max(start, low), high)), (high - low) / STEPS_PER_RANGE)


def _step_lengths(sweep: GrowingSweep, names: Sequence[str]) -> dict[str, float]:
    """|theta_syn - theta_base| of each snapshot that has moved; UserError where none has."""
    lengths = {}
    for name in names:
        theta_syn = read_checkpoint(sweep.snapshots[name]).state
        lengths[name] = NeonWeights(sweep.backbone.net, sweep.theta_base, theta_syn).distance()
    moved = {name: length for name, length in lengths.items() if length > 0}
    if not moved:
        raise UserError(f"{', '.join(names)}: equal to the base, so there is no direction to search; train for longer")
    return moved


def _point(result: Mapping[str, Any], guidance: float | None) -> dict[str, Any]:
    kept = ("snapshot", "w", "num_images", "fid", "fid_heldout")
    return {name: result[name] for name in kept if name in result} | {"guidance": guidance}


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("fid", "fid_heldout", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "density",
            "coverage", "seeds")  # fmt: skip
    return {name: result[name] for name in kept if name in result}


def _intervals(row, plan, sweep, seeds, ends, whole) -> dict[str, Any]:
    """Of base, Neon and their difference, by the bootstrap; the same blocks are drawn for both."""
    out, drawn = None, {}
    for name, (snapshot, w, guidance) in ends.items():
        varied = {row.guidance: guidance} if row.guidance else {}
        total = sweep.statistics(snapshot, w, seeds, **varied)
        if total is not None:
            print0(f"bootstrap: {name}, {plan.resamples} resamples")
            blocks = block_statistics(total.features, sweep.batch_size)
            drawn[name] = bootstrap_fids(blocks, sweep.evaluator.reference, resamples=plan.resamples, seed=plan.seed)
    if is_main():
        out = {name: interval(whole[name]["fid"], values) for name, values in drawn.items()}
        gain = whole["base"]["fid"] - whole["neon"]["fid"]
        out["gain"] = interval(gain, drawn["base"] - drawn["neon"])
    return broadcast_object(out)


def _difference_of_file(sweep: GrowingSweep, best: Mapping[str, Any], path: Path) -> float:
    """The largest difference of any weight between the merged file and the network that was measured."""
    sweep.move(best["snapshot"], best["w"])
    written, worst = read_checkpoint(path).state, 0.0
    for name, value in sweep.backbone.net.named_parameters():
        worst = max(worst, float((written[name].double() - value.detach().cpu().double()).abs().max()))
    sweep.restore()
    return worst


def _write_random(sweep: GrowingSweep, snapshot: str, seed: int, folder: Path) -> Path:
    path = folder / f"{RANDOM}-{snapshot}-seed{seed}.safetensors"
    if is_main() and not path.exists():
        moved = random_direction(sweep.theta_base, read_checkpoint(sweep.snapshots[snapshot]).state, seed)
        told = {"control": RANDOM, "seed": seed, "as_long_as": snapshot}
        write_checkpoint(path, moved, config=sweep.backbone.network_config(), metadata=told)
    barrier()
    return path


def _write_samples(row: Row, sweep: GrowingSweep, few: Sequence[int], best: Mapping[str, Any], folder: Path) -> None:
    """The same seeds, labels and guidance with the three networks: <folder>/{base,self-trained,neon}/00.png."""
    settings = dict(sweep.settings)
    if row.guidance and best["guidance"] is not None:
        settings[row.guidance] = best["guidance"]
    for name, w in (("base", 0.0), ("self-trained", -1.0), ("neon", best["w"])):
        sweep.move(best["snapshot"], w)
        if is_main():
            for number, image in enumerate(_sample(sweep.backbone, few, settings, sweep.batch_size)):
                with atomic_path(folder / name / f"{number:02d}.png") as temporary:
                    _picture(image).save(temporary, format="png")
    sweep.restore()
    barrier()


def _sample(backbone: Backbone, seeds: Sequence[int], settings: dict, batch_size: int) -> Tensor:
    labels = backbone.assign_labels(seeds, **settings)
    parts = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        parts.append(backbone.sample(seeds[part], None if labels is None else labels[part], **settings).cpu())
    return torch.cat(parts)


def _picture(image: Tensor) -> PIL.Image.Image:
    """uint8 [C, H, W], shrunk to what a report needs."""
    array = image.numpy()
    picture = PIL.Image.fromarray(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))
    picture.thumbnail((MAX_SAMPLE_SIDE, MAX_SAMPLE_SIDE))
    return picture
